"""Sequences, and what has its channels last, in the engine's terms: see `handlers`.

A sequence is a map of one row, and a linear layer on several axes a convolution of one pixel. What they make is a map,
and the value in PyTorch's shape a view of it; what comes next reads the map itself, if it can.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vdbench.sparse import handlers_of_layers as layers
from vdbench.sparse import handlers_of_pooling as pooling
from vdbench.sparse.graph import AvgPool2d, LinearAtPlaces, MaxPool2d, Op, Shape
from vdbench.sparse.opaque import ChannelsFirst, ChannelsLast, Reshape
from vdbench.sparse.slot import Slot

Handler = Callable[..., Op | None]


def _map_behind(slot: Slot, x: Any) -> Op | None:
    """The map that a value is a view of, if it is one: with its channels last, or as a sequence (channels, places)."""
    if isinstance(x, ChannelsLast):
        return slot.source(x)
    rows = slot.source(x) if isinstance(x, Reshape) and len(x.shape) == 2 else None
    return rows if rows and rows.shape == (x.shape[0], 1, x.shape[1]) else None


def _view(slot: Slot, name: str, kind: type[Op], x: Op, shape: Shape) -> Op:
    """A view of a value: that which was made of it before, if there is one."""
    made = (op for op in slot.ops if type(op) is kind and op.inputs == (x.name,) and op.shape == shape)
    return next(made, None) or slot.part(name, shape).put(kind, x)


def _with_channels_first(slot: Slot, x: Op) -> Op:
    if isinstance(x, ChannelsLast):
        return slot.source(x)
    *places, channels = x.shape
    return _view(slot, "channels_first", ChannelsFirst, x, (channels, math.prod(places[:-1]), places[-1]))


def _with_channels_last(slot: Slot, x: Op) -> Op:
    return slot.part("channels_last", slot.shape).put(ChannelsLast, x)


def _as_rows(slot: Slot, x: Op) -> Op:
    behind = None if isinstance(x, ChannelsLast) else _map_behind(slot, x)  # whose channels are the places of x
    return behind or _view(slot, "rows", Reshape, x, (x.shape[0], 1, x.shape[1]))


def _as_sequence(slot: Slot, x: Op) -> Op:
    return slot.part("sequence", slot.shape).put(Reshape, x)


def on_maps(slot: Slot, handler: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op | None:
    """What a function of every number by itself makes of views of maps, computed on the maps; None where there are
    none, or not all in the same way."""
    views = [a for a in args if _map_behind(slot, a)]
    if not views:
        return None
    view, last = views[0], isinstance(views[0], ChannelsLast)
    to_map, from_map = (_with_channels_first, _with_channels_last) if last else (_as_rows, _as_sequence)
    shape = to_map(slot, view).shape
    by_channel = shape[:1] if last else (shape[0], 1)  # how numbers end that are one for every channel

    def fits(a: Any) -> bool:
        if isinstance(a, Op):
            return a.shape == view.shape and (last or not isinstance(a, ChannelsLast))
        if isinstance(a, Tensor) and a.numel() > 1:
            return a.numel() == shape[0] and a.shape[-len(by_channel) :] == by_channel
        return True

    def mapped(a: Any) -> Any:
        if isinstance(a, Op):
            return to_map(slot, a)
        if isinstance(a, Tensor) and a.numel() > 1:
            return a.reshape(-1, 1, 1)
        return a

    if not all(map(fits, args)) or slot.shape != view.shape:
        return None
    given = [mapped(a) for a in args]
    made = handler(replace(slot, shape=shape), *given, **kwargs)
    return view if made is given[0] else made and from_map(slot, made)


def linear(slot: Slot, x: Op, weight: Any, bias: Any = None) -> Op | None:
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    if len(x.shape) == 1:
        return layers.linear(slot, x, weight, bias)
    places = _with_channels_first(slot, x)
    made = replace(slot, shape=(len(weight), *places.shape[1:])).put(
        LinearAtPlaces, places, **layers.arrays(slot, weight[:, :, None, None], bias)
    )
    return _with_channels_last(slot, made)


def permute(slot: Slot, x: Op, *dims: Any) -> Op | None:
    """Channels moved behind the places, or before them."""
    order = [d % (1 + len(x.shape)) for d in (dims[0] if isinstance(dims[0], tuple | list) else dims)]
    *places, last = range(1, 1 + len(x.shape))
    if order == [0, last, *places] and isinstance(x, ChannelsLast):
        rows = slot.source(x)
        return rows if rows.shape == slot.shape else slot.put(Reshape, rows)
    if order == [0, 2, 1]:
        return slot.put(ChannelsLast, _as_rows(slot, x))
    if order == [0, 2, 3, 1]:
        return slot.put(ChannelsLast, x)
    return slot.put(ChannelsFirst, x) if order == [0, 3, 1, 2] else None


def transpose(slot: Slot, x: Op, dim0: int, dim1: int) -> Op | None:
    order = list(range(1 + len(x.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(slot, x, order)


def mean(slot: Slot, x: Op, dim: Any, keepdim: bool = False) -> Op | None:
    dims = {d % (1 + len(x.shape)) for d in (dim if isinstance(dim, tuple | list) else (dim,))}
    places = set(range(1, len(x.shape))) if isinstance(x, ChannelsLast) else {2}
    behind = _map_behind(slot, x)
    if behind and dims == places and not keepdim:
        return pooling.mean(slot, behind, (2, 3))
    return pooling.mean(slot, x, dim, keepdim)


OF_ROWS = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}  # what an option is along the axis of rows


def _row(size: Any, of_rows: int) -> Any:
    """An option for one axis as one for two."""
    if size is None or isinstance(size, str):
        return size
    sizes = tuple(size) if isinstance(size, Sequence) else (size,)
    return (of_rows, *sizes) if sizes else size  # a stride of () is none


def _on_rows(handler: Handler) -> Handler:
    """What a handler of maps makes of sequences (channels, places)."""
    signature = inspect.signature(handler)

    def on_rows(slot: Slot, x: Op, *args: Any, **kwargs: Any) -> Op | None:
        if len(x.shape) != 2:
            return None
        given = signature.bind(
            replace(slot, shape=(slot.shape[0], 1, slot.shape[1])), _as_rows(slot, x), *args, **kwargs
        )
        rows, options = given.arguments["x"], given.arguments
        options |= {name: _row(options[name], one) for name, one in OF_ROWS.items() if name in options}
        if isinstance(weight := options.get("weight"), Tensor) and weight.dim() == 3:
            options["weight"] = weight.unsqueeze(2)
        made = handler(*given.args, **given.kwargs)
        return x if made is rows else made and _as_sequence(slot, made)

    on_rows.__signature__ = signature  # type: ignore[attr-defined]
    return on_rows


conv1d, max_pool1d, avg_pool1d = map(_on_rows, (layers.conv2d, pooling.max_pool2d, pooling.avg_pool2d))
adaptive_avg_pool1d, adaptive_max_pool1d = (_on_rows(pooling.adaptive(kind)) for kind in (AvgPool2d, MaxPool2d))
_normalised = _on_rows(layers.batch_norm)


def batch_norm(slot: Slot, x: Op, *args: Any, **kwargs: Any) -> Op | None:
    if len(x.shape) in (1, 3):
        return layers.batch_norm(slot, x, *args, **kwargs)
    return _normalised(slot, x, *args, **kwargs)
