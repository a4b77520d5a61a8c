"""Graphs for tests of the sparse engine: put together by hand or traced, and compared."""

import numpy as np
import torch
from torch import nn

from vdbench.sparse.graph import Conv2d, Flatten, Graph, Input, Linear, Op
from vdbench.sparse.tracing import trace

IMAGE, VECTOR = (4, 6, 5), (6,)


class Builder:
    """A graph put together operation by operation, with random weights."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.ops: list[Op] = [Input(name="input", shape=shape)]
        self.rng = np.random.default_rng(seed)

    @property
    def last(self) -> Op:
        return self.ops[-1]

    def sparse(self, *shape: int, density: float) -> np.ndarray:
        left = self.rng.random(shape) < density
        return (self.rng.standard_normal(shape) * left / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    def numbers(self, count: int) -> np.ndarray:
        return self.rng.standard_normal(count).astype(np.float32)

    def add(self, kind: type[Op], shape: tuple[int, ...] | None = None, inputs: tuple[str, ...] = (), **parts) -> str:
        name = f"{kind.__name__.lower()}{len(self.ops)}"
        inputs = inputs or (self.last.name,)
        self.ops.append(kind(name=name, inputs=inputs, shape=shape or self.last.shape, **parts))
        return name

    def conv(
        self, out: int, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1), groups=1, density=0.4
    ):
        channels, height, width = self.last.shape
        (top, bottom, left, right), spans = padding, [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        size = (
            (height + top + bottom - spans[0] - 1) // stride[0] + 1,
            (width + left + right - spans[1] - 1) // stride[1] + 1,
        )
        weight = self.sparse(out, channels // groups, *kernel, density=density)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return self.add(Conv2d, (out, *size), weight=weight, bias=self.numbers(out), **geometry)

    def linear(self, out: int, density: float = 0.4) -> str:
        if len(self.last.shape) == 3:
            self.add(Flatten, (int(np.prod(self.last.shape)),))
        return self.add(
            Linear, (out,), weight=self.sparse(out, self.last.shape[0], density=density), bias=self.numbers(out)
        )

    def pool(self, kind: type[Op], kernel: int, stride: int | None = None, **parts) -> str:
        stride = stride or kernel
        channels, *size = self.last.shape
        shape = (channels, *((n - kernel) // stride + 1 for n in size))
        return self.add(kind, shape, kernel=(kernel, kernel), stride=(stride, stride), **parts)

    def graph(self) -> Graph:
        return Graph(tuple(self.ops))


def checked(model: nn.Module, *shape: int) -> Graph:
    """A model's graph, found equal to it on batches of other sizes than the example's, which may change the model's
    own input: it gets a copy."""
    graph = trace(model.eval(), torch.zeros(2, *shape))
    for examples in (1, 5):
        batch = torch.randn(examples, *shape)
        expected = model(batch.clone()).detach()
        found = graph(batch.clone())
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert [op.name for op in graph.ops] == list(dict.fromkeys(op.name for op in graph.ops))
    values = {}
    for op in graph.ops:
        values[op.name] = batch if not op.inputs else op(*(values[name] for name in op.inputs))
        assert values[op.name].shape == (5, *op.shape)
    return graph


def kinds(graph: Graph) -> list[str]:
    return [type(op).__name__ for op in graph.ops[1:]]


def assert_same(compacted: Graph, graph: Graph, batch: torch.Tensor) -> None:
    expected = graph(batch).detach()
    torch.testing.assert_close(compacted(batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def size(graph: Graph) -> list[tuple]:
    return [(op.name, op.shape, op.weight_count) for op in graph.ops]
