"""Exact simplification of a network with zeros: the same function in fewer and smaller layers.

Exact in real arithmetic, so that floating-point results differ in rounding alone. A weight is gone if it is zero, never
because weights sum to zero.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from vdbench.sparse.graph import (
    Add,
    Affine,
    Concat,
    Conv2d,
    Flatten,
    Graph,
    Input,
    InputOfPlaces,
    Linear,
    Multiply,
    Op,
)
from vdbench.sparse.opaque import ChannelsFirst, ChannelsLast, Opaque, Reshape

Layer = Linear | Conv2d
VIEWS = Flatten, Reshape, ChannelsFirst, ChannelsLast
Mask = np.ndarray  # bool (channels,) of a value


def compact(graph: Graph) -> Graph:
    """The network without what cannot change its output, the shapes of its input and output as they were; what went
    is told in `removed`, what there was in `weights`. Compacting again finds nothing more.
    """
    weights = {op.name: op.weight.size for op in graph.ops if isinstance(op, Layer)}
    graph = fold_affine(fold_reshape(graph))
    return replace(drop_unread(fold_constants(graph)), weights=weights | graph.weights)


def fold_reshape(graph: Graph) -> Graph:
    """Let the network read its input in the shape, and the order of axes, that its first operation gives it."""
    ops = {op.name: op for op in graph.ops}
    readers = _readers(ops, graph.input.name)
    if len(readers) != 1 or not isinstance(readers[0], Reshape | ChannelsFirst) or readers[0] is graph.output:
        return graph
    if isinstance(graph.input, InputOfPlaces) or all(isinstance(op, VIEWS) for op in graph.ops[1:]):
        return graph  # nothing is computed whose input could be read in another order
    kind = Input if isinstance(readers[0], Reshape) else InputOfPlaces
    ops[graph.input.name] = kind(name=graph.input.name, shape=readers[0].shape, given=graph.input.example)
    _bypass(ops, readers[0].name)
    return fold_reshape(replace(graph, ops=tuple(ops.values())))


def fold_affine(graph: Graph) -> Graph:
    """Take every Affine into the layer or Affine before it, where nothing else reads that, or else into the layers that
    read it: not those that pad, whose zeros outside the image it does not reach. Others stay, but for those that change
    nothing.
    """
    ops = {op.name: op for op in graph.ops}
    affines = {op.name: op for op in graph.ops if isinstance(op, Affine)}
    for name, affine in affines.items():
        maker = ops[ops[name].inputs[0]]
        if isinstance(maker, Layer | Affine) and len(_readers(ops, maker.name)) == 1:
            ops[maker.name] = _scaled(maker, affine)
            _bypass(ops, name)
        elif (affine.scale == 1).all() and not affine.shift.any() and _readers(ops, name):
            _bypass(ops, name)
    for affine in reversed([op for op in ops.values() if isinstance(op, Affine)]):
        readers = _readers(ops, affine.name)
        if readers and all(isinstance(reader, Layer) and not _pads(reader) for reader in readers):
            ops |= {reader.name: _taking(reader, affine) for reader in readers if isinstance(reader, Layer)}
            _bypass(ops, affine.name)
    return Graph(tuple(ops.values()), graph.removed)


def _readers(ops: dict[str, Op], name: str) -> list[Op]:
    return [op for op in ops.values() if name in op.inputs]


def _bypass(ops: dict[str, Op], name: str) -> None:
    """Take an operation out, so that what read it reads what it read."""
    (before,) = ops.pop(name).inputs
    for reader in _readers(ops, name):
        inputs = tuple(before if source == name else source for source in reader.inputs)
        ops[reader.name] = replace(reader, inputs=inputs)


def fold_constants(graph: Graph) -> Graph:
    """Take constants into the biases of the layers that read them. A unit that reads nothing but constants is one
    itself, a map of them where it differs from place to place; one walk in order follows them through everything but
    what is opaque. Weights on constants become zero. Behind padding a bias becomes a map, since a constant is not seen
    outside the image.
    """
    ops: list[Op] = []
    constants: dict[str, _Constants] = {}
    for op in graph.ops:
        given = [constants[name] for name in op.inputs]
        if isinstance(op, Layer):
            op, constants[op.name] = _absorbed(op, given[0])
        else:
            constants[op.name] = _carried(op, given)
        ops.append(op)
    return Graph(tuple(ops), graph.removed)


def drop_unread(graph: Graph) -> Graph:
    """Drop units that no later weight reads, found in one walk from the output back. A unit stays where its place must
    be kept: in a value that something opaque reads, in the input, beside one that is read in a sum or in a group of a
    convolution, and alone in its value; its own weights are then zero, so that it costs nothing.
    """
    read = _read(graph)
    keep = _kept(graph, read)
    ops = tuple(_sliced(op, read[op.name], keep) for op in graph.ops)
    removed = {}
    for before, after in zip(graph.ops, ops, strict=True):
        if isinstance(before, Layer) and isinstance(after, Layer) and (text := _told(before, after, keep[before.name])):
            removed[before.name] = text
    return Graph(ops, removed | graph.removed)


def _by_group(layer: Layer) -> np.ndarray:
    """Its weight as (groups, outputs of each, inputs of each, places)."""
    groups = layer.groups if isinstance(layer, Conv2d) else 1
    outputs, inputs = layer.weight.shape[:2]
    return layer.weight.reshape(groups, outputs // groups, inputs, -1)


def _dead(layer: Layer) -> Mask:
    """Units whose weights are all zero."""
    return np.all(layer.weight.reshape(len(layer.weight), -1) == 0, axis=1)


def _pads(layer: Layer) -> bool:
    return isinstance(layer, Conv2d) and any(layer.padding)


def _plus(bias: np.ndarray, addend: np.ndarray) -> np.ndarray:
    """The sum of biases, (out,) or (out, height, width): a map only where it is needed."""
    rank = max(bias.ndim, addend.ndim)
    first, second = (b.reshape(*b.shape, *[1] * (rank - b.ndim)) for b in (bias, addend))
    total = (first + second).astype(np.float32)
    return _narrow(total)


def _narrow(bias: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bias[:, 0, 0] if bias.ndim == 3 and (bias == bias[:, :1, :1]).all() else bias)


def _scaled(layer: Layer | Affine, affine: Affine) -> Layer | Affine:
    """A layer, or an affine map, and then an affine map as one."""
    scale = affine.scale.astype(np.float64)
    if isinstance(layer, Affine):
        both = layer.scale * scale, layer.shift * scale + affine.shift
        return replace(layer, scale=both[0].astype(np.float32), shift=both[1].astype(np.float32))
    weight = (layer.weight.T * scale).T.astype(np.float32)
    return replace(layer, weight=np.ascontiguousarray(weight), bias=_plus((layer.bias.T * scale).T, affine.shift))


def _taking(layer: Layer, affine: Affine) -> Layer:
    """An affine map and then a layer as one layer."""
    weight = _by_group(layer).astype(np.float64)
    scale, shift = (numbers.reshape(len(weight), 1, -1, 1) for numbers in (affine.scale, affine.shift))
    return replace(
        layer,
        weight=(weight * scale).reshape(layer.weight.shape).astype(np.float32),
        bias=_plus(layer.bias, (weight * shift).sum((2, 3)).ravel()),
    )


def _through(op: Op, masks: list[Mask]) -> Mask:
    """Channels of a value that are made of marked channels of its inputs alone, one for one."""
    match op:
        case Flatten():
            return np.repeat(masks[0], op.shape[0] // len(masks[0]))
        case Concat():
            return np.concatenate(masks)
        case Add() | Multiply():
            return masks[0] & masks[1]
        case _:
            return masks[0]


def _back(op: Op, mask: Mask, widths: list[int]) -> list[Mask]:
    """Channels of the inputs, so many in each, that marked channels of a value are made of."""
    match op:
        case Flatten():
            return [np.any(mask.reshape(widths[0], -1), axis=1)]
        case Concat():
            return np.split(mask, np.cumsum(widths)[:-1])
        case _:
            return [mask] * len(widths)


def _marks(op: Op, mark: bool) -> Mask:
    return np.full(op.shape[:1] or 1, mark)


@dataclass(frozen=True)
class _Constants:
    """Channels of a value that are the same for every example, and what they are: float64 (1, *shape), else zero."""

    known: Mask
    plane: Tensor

    @classmethod
    def of(cls, known: Mask, plane: Tensor) -> Self:
        return cls(known, plane * torch.from_numpy(known).view(-1, *[1] * (plane.dim() - 2)))


def _absorbed(layer: Layer, given: _Constants) -> tuple[Layer, _Constants]:
    """A layer that has taken in the constants among its inputs, and those among its outputs."""
    if given.known.any():
        weight = _by_group(layer)
        weight = np.where(given.known.reshape(len(weight), 1, -1, 1), np.float32(0), weight)
        bias = _plus(layer.bias, _contribution(layer, given))
        layer = replace(layer, weight=weight.reshape(layer.weight.shape), bias=bias)
    bias = layer.bias.reshape(*layer.bias.shape, *[1] * (len(layer.shape) - layer.bias.ndim))
    return layer, _Constants.of(_dead(layer), torch.from_numpy(bias).double().expand(1, *layer.shape))


def _contribution(layer: Layer, given: _Constants) -> np.ndarray:
    """What a layer makes of constants, its bias apart: (out,) or (out, height, width)."""
    nothing = np.zeros(len(layer.weight))
    if not given.plane.any():
        return nothing
    made = replace(layer, weight=layer.weight.astype(np.float64), bias=nothing)(given.plane)[0].numpy()
    even = made.ndim == 3 and not _pads(layer) and bool((given.plane == given.plane[..., :1, :1]).all())
    return made[:, 0, 0] if even else made


def _carried(op: Op, given: list[_Constants]) -> _Constants:
    if isinstance(op, Opaque) or not any(source.known.any() for source in given):
        return _Constants(_marks(op, False), torch.zeros((), dtype=torch.float64).expand(1, *op.shape))
    return _Constants.of(_through(op, [source.known for source in given]), op(*(source.plane for source in given)))


def _read(graph: Graph) -> dict[str, Mask]:
    """Channels of every value that the output depends on."""
    read = {op.name: _marks(op, op is graph.output) for op in graph.ops}
    for op in reversed(graph.ops):
        mask, inputs = read[op.name], [read[name] for name in op.inputs]
        if isinstance(op, Layer):
            links = np.any(_by_group(op), axis=3)
            masks = [(links & mask.reshape(len(links), -1, 1)).any(1).ravel()]
        elif isinstance(op, Opaque):
            masks = [np.ones_like(channels) for channels in inputs]
        else:
            masks = _back(op, mask, [len(channels) for channels in inputs])
        for channels, more in zip(inputs, masks, strict=True):
            channels |= more
    return read


def _kept(graph: Graph, read: dict[str, Mask]) -> dict[str, Mask]:
    """Channels of every value that stay: those read, and those that the operations between layers tie to them."""
    whole = {graph.input.name, graph.output.name}
    for op in graph.ops:
        if isinstance(op, Opaque):
            whole |= {op.name, *op.inputs}
    keep = {name: mask | (name in whole) for name, mask in read.items()}
    for mask in keep.values():
        mask[:1] |= not mask.any()  # no value is empty
    count = -1
    while count != (count := sum(int(mask.sum()) for mask in keep.values())):
        for op in graph.ops:
            _tie(op, keep[op.name], [keep[name] for name in op.inputs])
    return keep


def _tie(op: Op, mask: Mask, inputs: list[Mask]) -> None:
    """Mark, in place, what has to stay with what is marked."""
    if isinstance(op, Conv2d):
        both = [channels.reshape(op.groups, -1) for channels in (mask, inputs[0])]
        group = np.any(np.concatenate(both, axis=1), axis=1, keepdims=True)
        if group.sum() > 1:  # of groups all channels stay; a convolution down to one group is an ordinary one
            for channels in both:
                channels |= group
    elif not isinstance(op, Layer | Opaque | Input):
        for channels, more in zip(inputs, _back(op, mask, [len(channels) for channels in inputs]), strict=True):
            channels |= more
        if isinstance(op, Add | Multiply):
            mask |= inputs[0] | inputs[1]
        mask |= _through(op, inputs)


def _sliced(op: Op, read: Mask, keep: dict[str, Mask]) -> Op:
    """An operation on what is kept, the weights of kept units that nobody reads set to zero."""
    kept = keep[op.name]
    shape = (int(kept.sum()), *op.shape[1:])
    match op:
        case Linear() | Conv2d():
            weight, bias = op.weight[kept], op.bias[kept]
            weight[~read[kept]] = bias[~read[kept]] = 0
            inputs = keep[op.inputs[0]].reshape(len(_by_group(op)), -1)
            groups = inputs.any(1)
            if groups.sum() == 1:
                weight = weight[:, inputs[groups][0]]
            if isinstance(op, Conv2d):
                op = replace(op, groups=int(groups.sum()))
            return replace(op, shape=shape, weight=np.ascontiguousarray(weight), bias=_narrow(bias))
        case Affine():
            return replace(op, shape=shape, scale=op.scale[kept], shift=op.shift[kept])
        case Input() | Opaque():
            return op
        case _:
            return replace(op, shape=shape)


def _told(before: Layer, after: Layer, kept: Mask) -> str:
    """What went from a layer, for people to read; nothing if nothing did."""
    gone, dead = ~kept, _dead(before)
    reasons = {"constant": int((gone & dead).sum()), "unread": int((gone & ~dead).sum())}
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    reads = _by_group(after).any((1, 3))
    parts = [f"{gone.sum()} of {len(kept)} units ({why})"] if why else []
    return ", ".join([*parts, f"{(~reads).sum()} of {reads.size} inputs unread"] if not reads.all() else parts)
