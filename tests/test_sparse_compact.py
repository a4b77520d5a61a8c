"""Compaction of graphs: the same function from fewer and smaller operations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_graphs import assert_same, size

from vdbench.sparse.compact import compact, drop_unread, fold_affine, fold_constants
from vdbench.sparse.graph import (
    Add,
    Affine,
    AvgPool2d,
    Clip,
    Concat,
    Conv2d,
    Flatten,
    Graph,
    Input,
    LeakyReLU,
    Linear,
    MaxPool2d,
    Multiply,
    Op,
    Pointwise,
)
from vdbench.sparse.opaque import Reshape, TorchOp


def sparse_weight(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> np.ndarray:
    """Small multiples of a half, so that sums are exact; some rows and columns all zero, some rows sum to zero."""
    weight = rng.integers(-2, 3, shape) * (rng.random(shape) < density) / 2
    if rng.random() < 0.5:
        halves = weight[0].reshape(-1)
        halves[len(halves) // 2 :] = -halves[: len(halves) - len(halves) // 2][::-1]
    weight[rng.random(shape[0]) < 0.3] = 0
    weight[:, rng.random(shape[1]) < 0.3] = 0
    return weight.astype(np.float32)


class Building:
    """Operations one after the other, each on the value before it, so that all of them count."""

    def __init__(self, rng: np.random.Generator, density: float, shape: tuple[int, ...]) -> None:
        self.rng, self.density = rng, density
        self.ops: list[Op] = [Input(name="input", shape=shape)]

    def add(self, kind: type[Op], *others: Op, **fields) -> None:
        inputs = [self.ops[-1], *others]
        op = kind(
            name=f"{kind.__name__}{len(self.ops)}",
            inputs=tuple(i.name for i in inputs),
            shape=inputs[0].shape,
            **fields,
        )
        try:
            out = op(*(torch.zeros(1, *i.shape) for i in inputs))
        except RuntimeError:  # a window larger than the image
            return
        if out.numel() and out.isfinite().all():  # a dilated window may lie in the padding alone: -inf
            self.ops.append(replace(op, shape=tuple(out.shape[1:])))

    def grid(self, *shape: int) -> np.ndarray:
        return (self.rng.integers(-3, 4, shape) / 2).astype(np.float32)

    def pick(self, *numbers):
        return numbers[self.rng.integers(len(numbers))]

    def pairs(self, *numbers: int) -> tuple[int, int]:
        return self.pick(*numbers), self.pick(*numbers)

    def layer(self) -> None:
        channels, *image = self.ops[-1].shape
        units = int(self.rng.integers(1, 7))
        if not image:
            return self.add(
                Linear, weight=sparse_weight(self.rng, (units, channels), self.density), bias=self.grid(units)
            )
        groups = self.pick(*(g for g in range(1, channels + 1) if channels % g == 0))
        units = groups * int(self.rng.integers(1, 4))
        shape = (units, channels // groups, *self.pairs(1, 2, 3))
        self.add(
            Conv2d,
            weight=sparse_weight(self.rng, shape, self.density),
            bias=self.grid(units),
            stride=self.pairs(1, 1, 2),
            padding=self.pick((0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 0)),
            dilation=self.pairs(1, 1, 2),
            groups=groups,
        )

    def affine(self) -> None:
        channels = self.ops[-1].shape[0]
        self.add(Affine, scale=2 ** self.grid(channels).round(), shift=self.grid(channels))

    def activation(self) -> None:
        self.pick(
            lambda: self.add(Clip),
            lambda: self.add(Clip, low=float(self.pick(-1, 0.5)), high=6.0),
            lambda: self.add(LeakyReLU, slope=0.25),
            lambda: self.add(Pointwise, function=self.pick("sigmoid", "gelu")),
        )()

    def pool(self) -> None:
        kernel = self.pairs(1, 2, 3)
        padding = (kernel[0] // 2, kernel[1] // 2) if self.pick(0, 1) else (0, 0)
        fields = {"kernel": kernel, "stride": self.pairs(1, 2), "padding": padding, "ceil_mode": bool(self.pick(0, 1))}
        if len(self.ops[-1].shape) == 3:
            if self.pick(0, 1):
                self.add(MaxPool2d, **fields, dilation=self.pairs(1, 1, 2))
            else:
                self.add(AvgPool2d, **fields, count_include_pad=bool(self.pick(0, 1)), divisor=self.pick(None, 3))

    def flatten(self) -> None:
        if len(self.ops[-1].shape) == 3:
            self.add(Flatten)

    def residual(self) -> None:
        if others := [op for op in self.ops if op.shape == self.ops[-1].shape]:
            self.add(self.pick(Add, Add, Multiply), self.pick(*others))

    def concat(self) -> None:
        if others := [op for op in self.ops if op.shape[1:] == self.ops[-1].shape[1:]]:
            self.add(Concat, self.pick(*others))

    def opaque(self) -> None:
        self.add(TorchOp, function=torch.tanh)


STEPS = ["layer"] * 5 + ["activation"] * 3 + ["affine", "pool", "flatten", "residual", "concat", "opaque"]


@st.composite
def networks(draw) -> Graph:
    shape = draw(st.sampled_from([(3,), (7,), (1, 1, 1), (2, 5, 4), (4, 7, 7), (3, 1, 6)]))
    density = draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
    building = Building(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), density, shape)
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=12)):
        getattr(building, step)()
    return Graph(tuple(building.ops))


@settings(max_examples=200, deadline=None)
@given(networks(), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_compacted_networks_compute_the_same(graph, examples, seed):
    batch = torch.from_numpy(np.random.default_rng(seed).integers(-4, 5, (examples, *graph.input.shape)) / 2).float()
    before = [op.weight.copy() for op in graph.ops if isinstance(op, Linear | Conv2d)]
    compacted = compact(graph)
    assert_same(compacted, graph, batch)
    for one_pass in (fold_affine, fold_constants, drop_unread):
        assert_same(one_pass(graph), graph, batch)
    assert (compacted.input, compacted.output.shape) == (graph.input, graph.output.shape)
    assert sum(op.weight_count for op in compacted.ops) <= sum(op.weight_count for op in graph.ops)
    assert size(compact(compacted)) == size(compacted)
    after = [op.weight for op in graph.ops if isinstance(op, Linear | Conv2d)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    for op in compacted.ops:
        if isinstance(op, Linear | Conv2d):
            for array in (op.weight, op.bias):
                assert array.dtype == np.float32 and array.flags.c_contiguous


def linear(name: str, source: str, weight, bias) -> Linear:
    weight = np.array(weight, np.float32)
    return Linear(name=name, inputs=(source,), shape=(len(weight),), weight=weight, bias=np.array(bias, np.float32))


def relu(name: str, source: Op) -> Clip:
    return Clip(name=name, inputs=(source.name,), shape=source.shape)


def perceptron(first, first_bias, second, second_bias) -> Graph:
    hidden = linear("first", "input", first, first_bias)
    ops = Input(name="input", shape=(hidden.weight.shape[1],)), hidden, relu("relu", hidden)
    return Graph((*ops, linear("second", "relu", second, second_bias)))


def test_constant_and_unread_units_go():
    graph = perceptron(
        [[1, 0, 2], [0, 0, 0], [0, 0, 0], [3, 0, 0]], [0, 5, -5, 1], [[1, 2, 3, 0], [0, -1, 1, 0]], [0.5, 0]
    )
    compacted = compact(graph)
    first, second = compacted["first"], compacted["second"]
    assert first.weight.tolist() == [[1, 0, 2]] and second.weight.tolist() == [[1], [0]]
    assert second.bias.tolist() == [0.5 + 2 * 5, -5]
    assert compacted["relu"].shape == (1,)
    assert compacted.removed == {"first": "3 of 4 units (2 constant, 1 unread), 1 of 3 inputs unread"}
    assert_same(compacted, graph, torch.randn(5, 3))


def test_constants_and_unread_units_are_followed_through_several_layers():
    """Of the second layer one unit reads constants alone, the other is not read, and so nobody reads the first."""
    first = linear("1", "input", [[0, 0], [1, 1], [1, 2]], [2, 0, 0])
    second = linear("2", "1", [[3, 0, 0], [0, 1, 1]], [1, 1])
    graph = Graph((Input(name="input", shape=(2,)), first, second, linear("3", "2", [[2, 0], [1, 0]], [0, 1])))
    compacted = compact(graph)
    assert compacted["3"].bias.tolist() == [14, 8]
    assert [op.weight_count for op in compacted.ops] == [0, 0, 0, 0]
    assert [op.shape for op in compacted.ops] == [(2,), (1,), (1,), (2,)]  # no value is empty
    assert compacted.removed["1"] == "2 of 3 units (2 unread), 2 of 2 inputs unread"
    assert_same(compacted, graph, torch.randn(5, 2))


def test_weights_that_sum_to_zero_are_no_zeros():
    graph = perceptron([[1, -1], [0, 0]], [0, 0], [[1, 1], [-1, 1]], [0, 0])
    compacted = compact(graph)
    assert compacted["first"].weight.tolist() == [[1, -1]] and compacted["second"].weight.tolist() == [[1], [-1]]


def test_a_network_with_nothing_to_remove_stays_as_it_is():
    graph = perceptron([[1, 2], [3, 4]], [1, 1], [[1, 2]], [0])
    compacted = compact(graph)
    assert size(compacted) == size(graph) and compacted.removed == {}


def scaled(name: str, source: str, scale, shift) -> Affine:
    numbers = (np.array(x, np.float32) for x in (scale, shift))
    return Affine(name=name, inputs=(source,), shape=(2,), **dict(zip(("scale", "shift"), numbers, strict=True)))


def test_affine_maps_become_one_and_those_that_change_nothing_go():
    entry = Input(name="input", shape=(2,))
    graph = Graph((entry, scaled("a", "input", [2, 3], [1, 0]), scaled("b", "a", [-1, 4], [5, 6])))
    compacted = compact(graph)
    assert [op.name for op in compacted.ops] == ["input", "a"]
    assert compacted["a"].scale.tolist() == [-2, 12] and compacted["a"].shift.tolist() == [4, 6]
    same = scaled("same", "input", [1, 1], [0, 0])
    total = Add(name="sum", inputs=("same", "input"), shape=(2,))
    assert [op.name for op in compact(Graph((entry, same, total))).ops] == ["input", "sum"]
    assert_same(compact(Graph((entry, same))), Graph((entry, same)), torch.randn(5, 2))


def test_the_input_is_read_in_the_shape_that_its_only_reader_gives_it():
    entry = Input(name="input", shape=(2, 3))
    steps = Reshape(name="a", inputs=("input",), shape=(3, 2)), Reshape(name="b", inputs=("a",), shape=(6,))
    graph = Graph((entry, *steps, linear("c", "b", [range(6)], [1])))
    compacted = compact(graph)
    assert [(op.name, op.shape) for op in compacted.ops] == [("input", (6,)), ("c", (1,))]
    assert compacted.input.example == (2, 3)
    assert_same(compacted, graph, torch.randn(5, 2, 3))
    assert compact(compacted).input == compacted.input
    other = Reshape(name="other", inputs=("input",), shape=(6,))
    graph = Graph((entry, steps[0], steps[1], other, Add(name="sum", inputs=("b", "other"), shape=(6,))))
    assert size(compact(graph)) == size(graph) and compact(graph).input == entry


def convolutions(padding: tuple[int, int, int, int], bias: float = 1.0) -> Graph:
    """A 1x1 convolution to two channels, one of them constant, and a 3x3 convolution that sums all."""
    ones = np.ones((1, 2, 3, 3), np.float32)
    first = np.array([1, 0], np.float32).reshape(2, 1, 1, 1)
    side = 4 + padding[0] + padding[1] - 2
    return Graph(
        (
            Input(name="input", shape=(1, 4, 4)),
            Conv2d(
                name="first", inputs=("input",), shape=(2, 4, 4), weight=first, bias=np.array([0, bias], np.float32)
            ),
            Conv2d(
                name="second",
                inputs=("first",),
                shape=(1, side, side),
                weight=ones,
                bias=np.zeros(1, np.float32),
                padding=padding,
            ),
        )
    )


def test_a_constant_behind_padding_becomes_a_map():
    graph = convolutions((1, 1, 1, 1))
    compacted = compact(graph)
    assert compacted["second"].weight.shape == (1, 1, 3, 3)
    assert compacted["second"].bias[0].tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]]
    assert_same(compacted, graph, torch.randn(2, 1, 4, 4))


@pytest.mark.parametrize(("padding", "bias", "expected"), [((0, 0, 0, 0), 1.0, 9), ((1, 1, 1, 1), 0.0, 0)])
def test_a_bias_that_is_the_same_everywhere_is_no_map(padding, bias, expected):
    assert compact(convolutions(padding, bias))["second"].bias.tolist() == [expected]


def test_a_network_that_is_its_input():
    graph = Graph((Input(name="input", shape=(3,)),))
    batch = torch.randn(2, 3)
    assert torch.equal(compact(graph)(batch), batch)
