"""Every operation the engine runs itself, as one thing: sums of weighted neighbouring pixels, channel by channel.

A convolution is one; a linear layer is one on maps of one pixel; so are pooling, normalisation, a sum of values and
their concatenation, with weights that are no parameters. Maxima and products are made of pixels in the same way.
"""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from vdbench.sparse.code import IDENTITY, Activation, Combine
from vdbench.sparse.graph import (
    Add,
    Affine,
    AvgPool2d,
    Clip,
    Concat,
    Conv2d,
    Expand,
    Flatten,
    Graph,
    LeakyReLU,
    Linear,
    LinearAtPlaces,
    MaxPool2d,
    Multiply,
    Op,
    Padding,
    Pair,
    Pointwise,
    Pool2d,
    Shape,
)
from vdbench.sparse.layout import maps
from vdbench.sparse.opaque import ChannelsLast, Reshape

MOST_TERMS = 2**24  # of a linear layer: those of more take too long to compile, and too much memory, for what they gain


@dataclass(frozen=True)
class Entries:
    """Terms of the sums, sorted by `row`, the output channel: pixel (y, x) of `channel` of input `source`, counted
    from where the output pixel lies, times `weight`."""

    row: np.ndarray
    source: np.ndarray
    channel: np.ndarray
    y: np.ndarray
    x: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class Stencil:
    """One native operation: `ops` of the graph in one, from the values `inputs` to the value `name`.

    `combine` says what is made of the terms; only sums have weights. `stride` is 0 where all output pixels read one.
    `shape` is that before pooling by `pool`, which takes the maximum of windows side by side. `bias` has one number a
    channel, or (channels, height, width) of them.
    """

    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    shape: Shape
    entries: Entries
    bias: np.ndarray
    stride: Pair = (1, 1)
    combine: Combine = "sum"
    activation: Activation = IDENTITY
    pool: Pair = (1, 1)

    def computed(self) -> tuple[int, int]:
        """Height and width of what is computed before pooling."""
        height, width = maps(self.shape)
        return height - height % self.pool[0], width - width % self.pool[1]

    @property
    def name(self) -> str:
        """Of its value, like any operation's."""
        return self.ops[-1].name

    def halo(self, size: tuple[int, int]) -> Padding:
        """How far the sums reach outside inputs with maps of this size."""
        (height, width), e = self.computed(), self.entries
        if not len(e.row):
            return (0, 0, 0, 0)
        below = (height - 1) * self.stride[0] + int(e.y.max()) - (size[0] - 1)
        right = (width - 1) * self.stride[1] + int(e.x.max()) - (size[1] - 1)
        return (max(0, -int(e.y.min())), max(0, below), max(0, -int(e.x.min())), max(0, right))

    def part(self, first: int, stop: int) -> "Stencil":
        """Some of the output channels alone."""
        e = self.entries
        here = slice(*np.searchsorted(e.row, [first, stop]))
        row, *others = (column[here] for column in (e.row, e.source, e.channel, e.y, e.x, e.weight))
        shape = (stop - first, *self.shape[1:])
        return replace(self, shape=shape, entries=Entries(row - first, *others), bias=self.bias[first:stop])

    @property
    def multiply_adds(self) -> int:
        """For one example, over all output pixels that are computed."""
        height, width = self.computed()
        return len(self.entries.row) * height * width if self.combine == "sum" else 0


def _entries(row, source, channel, y, x, weight) -> Entries:  # type: ignore[no-untyped-def]
    kinds = [*5 * [np.int32], np.float32]
    columns = [
        np.broadcast_to(np.asarray(column).astype(kind, copy=False), np.shape(row))
        for column, kind in zip((row, source, channel, y, x, weight), kinds, strict=True)
    ]
    if np.any(columns[0][1:] < columns[0][:-1]):
        order = np.argsort(columns[0], kind="stable")
        columns = [column[order] for column in columns]
    return Entries(*columns)


def _linear(op: Linear, inputs: list[Shape]) -> Stencil:
    row, feature = np.nonzero(op.weight)
    height, width = maps(inputs[0])
    channel, y, x = np.unravel_index(feature, (op.weight.shape[1] // (height * width), height, width))
    return Stencil((op,), op.inputs, op.shape, _entries(row, 0, channel, y, x, op.weight[row, feature]), op.bias)


def _conv(op: Conv2d, inputs: list[Shape]) -> Stencil:
    row, channel, ky, kx = np.nonzero(op.weight)
    outputs, per_group = op.weight.shape[:2]
    group = row // (outputs // op.groups)
    y, x = ky * op.dilation[0] - op.padding[0], kx * op.dilation[1] - op.padding[2]
    entries = _entries(row, 0, group * per_group + channel, y, x, op.weight[row, channel, ky, kx])
    return Stencil((op,), op.inputs, op.shape, entries, op.bias, op.stride)


def _pool(op: MaxPool2d | AvgPool2d, inputs: list[Shape]) -> Stencil:
    channel, ky, kx = (a.ravel() for a in np.indices((op.shape[0], *op.kernel)))
    y, x = ky * op.dilation[0] - op.padding[0], kx * op.dilation[1] - op.padding[1]
    weight = 1 / ((op.divisor if isinstance(op, AvgPool2d) else None) or op.kernel[0] * op.kernel[1])
    return Stencil(
        (op,),
        op.inputs,
        op.shape,
        _entries(channel, 0, channel, y, x, weight),
        np.zeros(op.shape[0], np.float32),
        op.stride,
        combine="maximum" if isinstance(op, MaxPool2d) else "sum",
    )


def _channelwise(op: Op, inputs: list[Shape]) -> Stencil:
    """Affine, Clip, LeakyReLU, Pointwise, Expand, Concat, Add, Multiply: an output channel is one, or made of two."""
    channels = np.arange(op.shape[0])
    scale, shift = np.ones(op.shape[0], np.float32), np.zeros(op.shape[0], np.float32)
    if isinstance(op, Affine):
        scale, shift = op.scale, op.shift
    if isinstance(op, Add | Multiply):
        both = np.concatenate([channels, channels])
        entries = _entries(both, np.repeat([0, 1], len(channels)), both, 0, 0, 1.0)
    elif isinstance(op, Concat):
        counts = [shape[0] for shape in inputs]
        source = np.repeat(np.arange(len(inputs)), counts)
        entries = _entries(channels, source, np.concatenate([np.arange(n) for n in counts]), 0, 0, 1.0)
    else:
        entries = _entries(channels, 0, channels, 0, 0, scale)
    stride = (0, 0) if isinstance(op, Expand) else (1, 1)
    combine: Combine = "product" if isinstance(op, Multiply) else "sum"
    return Stencil((op,), op.inputs, op.shape, entries, shift, stride, combine)


_FROM = {Linear: _linear, Conv2d: _conv, LinearAtPlaces: _conv, MaxPool2d: _pool, AvgPool2d: _pool}
_FROM |= dict.fromkeys((Affine, Clip, LeakyReLU, Pointwise, Add, Multiply, Expand, Concat), _channelwise)  # type: ignore[arg-type]


def _activated(stencil: Stencil, op: Op) -> Stencil:
    ops = stencil.ops if stencil.ops[-1] is op else (*stencil.ops, op)
    if isinstance(op, LeakyReLU):
        return replace(stencil, ops=ops, activation=Activation(slope=op.slope))
    if isinstance(op, Pointwise):
        return replace(stencil, ops=ops, activation=Activation(function=op.function))
    if isinstance(op, Clip):
        low, high = (None if np.isinf(bound) else bound for bound in (op.low, op.high))
        return replace(stencil, ops=ops, activation=Activation(low, high))
    return stencil


def stencil(op: Op, graph: Graph) -> Stencil | None:
    """The operation as a stencil; None where it is none and PyTorch has to run it."""
    inputs = [graph[source(name, graph)].shape for name in op.inputs]
    if type(op) not in _FROM or (isinstance(op, Pool2d) and not _is_plain(op, inputs[0], graph)):
        return None
    if isinstance(op, Linear | LinearAtPlaces) and op.weight_count > MOST_TERMS:
        return None
    alike = (1, 1) if isinstance(op, Expand) else maps(op.shape)
    if _FROM[type(op)] is _channelwise and any(maps(shape) != alike for shape in inputs):
        return None  # every number of a map that was flattened would be a channel of its own
    made = _FROM[type(op)](op, inputs)  # type: ignore[arg-type]
    return _activated(replace(made, inputs=tuple(source(name, graph) for name in op.inputs)), op)


def is_view(op: Op, graph: Graph) -> bool:
    """Whether an operation moves nothing: flattening, and at the network's end any other shape and order of axes too,
    since what is computed there is written in that order."""
    at_end = op is graph.output and graph.input.name not in op.inputs
    return isinstance(op, Flatten) or (isinstance(op, Reshape | ChannelsLast) and at_end)


def source(name: str, graph: Graph) -> str:
    """The value that `name` is a view of."""
    op = graph[name]
    return source(op.inputs[0], graph) if is_view(op, graph) else name


def _is_plain(op: Pool2d, shape: Shape, graph: Graph) -> bool:
    """No window differs from the others: the halo of zeros stands in for what lies outside."""
    spans = [(kernel - 1) * dilation + 1 for kernel, dilation in zip(op.kernel, op.dilation, strict=True)]
    inside = all(
        (out - 1) * stride + span <= size + 2 * pad
        for out, stride, span, size, pad in zip(op.shape[1:], op.stride, spans, shape[1:], op.padding, strict=True)
    )
    if isinstance(op, AvgPool2d):
        return inside and (not any(op.padding) or op.count_include_pad or op.divisor is not None)
    return (inside and not any(op.padding)) or _never_negative(op.inputs[0], graph)


def _never_negative(name: str, graph: Graph) -> bool:
    """Whether zeros are no more than any number of the value."""
    found: set[str] = set()
    for op in graph.ops:
        kept = isinstance(op, Pool2d | Concat | Add | Flatten) and found.issuperset(op.inputs)
        if kept or (isinstance(op, Clip) and op.low >= 0):
            found.add(op.name)
    return name in found


def fuse(graph: Graph, *, pooling: bool) -> list[Stencil | Op]:
    """The graph's operations in order, as stencils wherever they are that: activations, sums with an earlier value and,
    if `pooling`, pooling in windows side by side become part of what makes their input. Views are left out."""
    read = [source(name, graph) for op in graph.ops for name in op.inputs if not is_view(op, graph)]
    readers = Counter([*read, source(graph.output.name, graph)])
    fused: dict[str, Stencil | Op] = {}  # by the value it makes, in order
    for op in graph.ops[1:]:
        if is_view(op, graph):
            continue
        made = stencil(op, graph)
        for name in made.inputs if made else ():
            before = fused.get(name)
            if made and isinstance(before, Stencil) and readers[name] == 1:
                alike = all(maps(graph[x].shape) == maps(op.shape) for x in (*before.inputs, *made.inputs))
                joined = _joined(before, made, name, pooling=pooling, alike=alike or maps(op.shape) == (1, 1))
                if joined:
                    made = joined
                    del fused[name]
                    break
        fused[op.name] = made or op
    return list(fused.values())


def _joined(before: Stencil, after: Stencil, value: str, *, pooling: bool, alike: bool) -> Stencil | None:
    """`before` with `after`, which alone reads its value, taken in; None where that is not the same. `alike`: a
    position in any of the values that both read is the same position in the others, as sums need it."""
    op, ops = after.ops[0], (*before.ops, *after.ops)
    active = before.activation != IDENTITY
    if isinstance(op, Clip | LeakyReLU | Pointwise) and not active:
        may = after.activation.rises or before.pool == (1, 1)
        return replace(before, ops=ops, activation=after.activation) if may else None
    if isinstance(op, MaxPool2d) and pooling and before.pool == (1, 1) and before.combine == "sum":
        plain = op.kernel == op.stride and op.padding == (0, 0) and op.dilation == (1, 1) and not op.ceil_mode
        may = plain and before.activation.rises and max(op.kernel) <= 3
        return replace(before, ops=ops, pool=op.kernel) if may else None
    summed = before.stride == before.pool == (1, 1) and before.combine == "sum"
    if isinstance(op, Add) and alike and not active and summed:
        other = [name for name in after.inputs if name != value]
        if len(other) != 1:
            return None
        channels, old = np.arange(before.shape[0]), before.entries
        new = (channels, len(before.inputs), channels, 0, 0, 1.0)
        old_columns = (old.row, old.source, old.channel, old.y, old.x, old.weight)
        merged = [
            np.concatenate([a, np.broadcast_to(b, channels.shape)]) for a, b in zip(old_columns, new, strict=True)
        ]
        return replace(before, ops=ops, inputs=(*before.inputs, *other), entries=_entries(*merged))
    return None
