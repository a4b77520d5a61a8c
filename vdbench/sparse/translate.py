"""Calls of PyTorch's modules, functions and methods in the engine's terms."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from vdbench.sparse.graph import Op
from vdbench.sparse.handlers import HANDLERS, OF_NUMBERS, OF_SHAPES, cat, reorder
from vdbench.sparse.handlers_of_arithmetic import add, multiply, subtract
from vdbench.sparse.handlers_of_sequences import on_maps
from vdbench.sparse.modules import call_of
from vdbench.sparse.slot import Slot


def _leaves(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, tuple | list):
        for argument in arguments:
            yield from _leaves(argument)
    else:
        yield arguments


def translate(slot: Slot, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op | None:
    """The operation that makes what a call returns, added to `slot.ops`; None where PyTorch has to make it.

    Args:
        target: a function, the name of a method, or a module. args, kwargs: what it is called with; an `fx.Node` stands
            for a number or tensor that depends on the batch and is no value of the network.

    Raises:
        ValueError: a weight is NaN or infinite, or a variance negative.
    """
    if isinstance(target, nn.Module):
        call = call_of(target)
        if call is None:
            return None
        target, args = call[0], (*args, *call[1:])
    handler = HANDLERS.get(target)
    given = list(_leaves([args, list(kwargs.values())]))
    values = [a for a in given if isinstance(a, Op)]
    if handler is None or not values or any(0 in part.shape for part in (slot, *values)):
        return None
    if handler not in (add, subtract, multiply, cat) and (len(values) > 1 or not args or args[0] is not values[0]):
        return None
    if handler is not reorder and any(isinstance(a, fx.Node) for a in given):
        return None
    try:
        inspect.signature(handler).bind(slot, *args, **kwargs)
    except TypeError:  # an option the handler does not know
        return None
    if target in OF_NUMBERS and (made := on_maps(slot, handler, args, kwargs)):
        return made
    if target not in OF_SHAPES and {len(shape) for shape in (slot.shape, *(v.shape for v in values))} - {1, 3}:
        return None
    return handler(slot, *args, **kwargs)
