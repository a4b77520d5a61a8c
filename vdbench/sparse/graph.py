"""A network as the engine sees it: operations on values without a batch axis, each value named after what makes it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Shape = tuple[int, ...]  # (channels,) or (channels, height, width)
Pair = tuple[int, int]
Padding = tuple[int, int, int, int]  # rows above and below, columns left and right


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation. `name` also names its value, of shape `shape`; `inputs` are names of earlier values."""

    name: str
    inputs: tuple[str, ...] = ()
    shape: Shape

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the operation means, in PyTorch, on values with a batch axis in front."""
        raise NotImplementedError

    @property
    def weight_count(self) -> int:
        """Numbers a multiplication is spent on, zeros left out."""
        return 0


def batch_shape(shape: Shape) -> str:
    """Of a batch of such values, for people to read."""
    return f"(N, {', '.join(map(str, shape))})"


def channels_first(value: Tensor, shape: Shape) -> Tensor:
    """A value (N, ..., channels) as maps of this shape."""
    channels, *places = shape
    return value.reshape(-1, *places, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Input(Op):
    """What the network is given; `given` is its shape outside, if the network reads it in another."""

    given: Shape | None = None

    @property
    def example(self) -> Shape:
        return self.given or self.shape

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0].reshape(-1, *self.shape)


@dataclass(frozen=True, kw_only=True)
class InputOfPlaces(Input):
    """Maps that are given with their channels behind, (..., channels), as linear layers take them."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return channels_first(inputs[0], self.shape)


@dataclass(frozen=True, kw_only=True)
class Weighted(Op):
    """What linear layers and convolutions share."""

    weight: np.ndarray = field(repr=False)
    bias: np.ndarray = field(repr=False)

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as PyTorch takes them; made once, since small layers are computed in as little time."""
        return torch.from_numpy(self.weight), torch.from_numpy(self.bias)

    @property
    def weight_count(self) -> int:
        return int(np.count_nonzero(self.weight))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "tensors"}


@dataclass(frozen=True, kw_only=True)
class Linear(Weighted):
    """weight (out, in), bias (out,)."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return functional.linear(inputs[0], *self.tensors)


@dataclass(frozen=True, kw_only=True)
class Conv2d(Weighted):
    """weight (out, in / groups, height, width); bias (out,), or (out, H, W) where it differs from place to place.
    Padding is with zeros."""

    stride: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __call__(self, *inputs: Tensor) -> Tensor:
        weight, bias = self.tensors
        if bias.dim() == 1:
            return self.convolved(inputs[0], weight, bias)
        return self.convolved(inputs[0], weight, None) + bias

    def convolved(self, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        top, bottom, left, right = self.padding
        padding = top, left
        if (top, left) != (bottom, right):
            value, padding = functional.pad(value, (left, right, top, bottom)), (0, 0)
        return functional.conv2d(value, weight, bias, self.stride, padding, self.dilation, self.groups)


@dataclass(frozen=True, kw_only=True)
class LinearAtPlaces(Conv2d):
    """A linear layer at every place of a map: a convolution of one pixel, which PyTorch computes as what it is."""

    def convolved(self, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(value.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Affine(Op):
    """scale and shift (channels,) of every channel: a normalisation that no layer before it could take in."""

    scale: np.ndarray = field(repr=False)
    shift: np.ndarray = field(repr=False)

    def __call__(self, *inputs: Tensor) -> Tensor:
        places = (-1, *[1] * (len(self.shape) - 1))
        return inputs[0] * torch.from_numpy(self.scale).view(places) + torch.from_numpy(self.shift).view(places)


@dataclass(frozen=True, kw_only=True)
class Clip(Op):
    """max(low, min(high, x)): ReLU is (0, inf), ReLU6 (0, 6), Hardtanh (-1, 1)."""

    low: float = 0.0
    high: float = float("inf")

    def __call__(self, *inputs: Tensor) -> Tensor:
        return (
            functional.relu(inputs[0]) if (self.low, self.high) == (0, np.inf) else inputs[0].clamp(self.low, self.high)
        )


@dataclass(frozen=True, kw_only=True)
class LeakyReLU(Op):
    """x where positive, slope times x elsewhere."""

    slope: float

    def __call__(self, *inputs: Tensor) -> Tensor:
        return functional.leaky_relu(inputs[0], self.slope)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "elu": functional.elu,
    "hardsigmoid": functional.hardsigmoid,
    "hardswish": functional.hardswish,
}


@dataclass(frozen=True, kw_only=True)
class Pointwise(Op):
    """One of FUNCTIONS, of every number by itself."""

    function: str

    def __call__(self, *inputs: Tensor) -> Tensor:
        return FUNCTIONS[self.function](inputs[0])


@dataclass(frozen=True, kw_only=True)
class Pool2d(Op):
    """What max- and average pooling share. Places outside the input take no part in a maximum and count as zeros in
    a mean, whose divisor is the kernel's size unless `count_include_pad` is off."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False


@dataclass(frozen=True, kw_only=True)
class MaxPool2d(Pool2d):
    def __call__(self, *inputs: Tensor) -> Tensor:
        return functional.max_pool2d(
            inputs[0], self.kernel, self.stride, self.padding, self.dilation, ceil_mode=self.ceil_mode
        )


@dataclass(frozen=True, kw_only=True)
class AvgPool2d(Pool2d):
    """Its dilation is always 1. Adaptive pooling is this wherever its windows are equal."""

    count_include_pad: bool = True
    divisor: int | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        return functional.avg_pool2d(
            inputs[0], self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor
        )


@dataclass(frozen=True, kw_only=True)
class Flatten(Op):
    """(channels, height, width) to (channels * height * width,)."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0].flatten(1)


@dataclass(frozen=True, kw_only=True)
class Add(Op):
    """The sum of two values of one shape."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0] + inputs[1]


@dataclass(frozen=True, kw_only=True)
class Multiply(Op):
    """The product of two values of one shape, number by number."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0] * inputs[1]


@dataclass(frozen=True, kw_only=True)
class Expand(Op):
    """(channels, 1, 1) to maps of one number each."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0].expand(-1, *self.shape)


@dataclass(frozen=True, kw_only=True)
class Concat(Op):
    """Values one behind the other along the channels."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, dim=1)


@dataclass(frozen=True)
class Graph:
    """Operations in an order in which they can run; the first is the only Input, the last makes the output.

    Attributes:
        removed: layer by layer, what exact compaction took out, for people to read.
        weights: layer by layer, how many there were before it, zeros and all.
    """

    ops: tuple[Op, ...]
    removed: dict[str, str] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    @property
    def input(self) -> Input:
        assert isinstance(self.ops[0], Input)
        return self.ops[0]

    @property
    def output(self) -> Op:
        return self.ops[-1]

    def __getitem__(self, name: str) -> Op:
        return next(op for op in self.ops if op.name == name)

    def __call__(self, batch: Tensor) -> Tensor:
        """The network in PyTorch, zeros and all: the reference every kernel is checked against."""
        last = {name: op for op in self.ops for name in op.inputs}  # who reads a value last
        values = {self.input.name: self.input(batch)}
        for op in self.ops[1:]:
            values[op.name] = op(*(values[name] for name in op.inputs))
            for name in {name for name in op.inputs if last[name] is op}:
                del values[name]
        return values[self.output.name]
