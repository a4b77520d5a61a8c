"""What sums, differences, products and quotients are in the engine's terms: see `handlers`. One of the operands may be
the same for every example: a number, or one for every channel."""

from typing import Any

import torch
from torch import Tensor

from vdbench.sparse.graph import Add, Affine, Expand, Multiply, Op, Shape
from vdbench.sparse.slot import Slot


def add(slot: Slot, a: Any, b: Any, alpha: Any = 1) -> Op | None:
    if not isinstance(a, Op):
        return _affine(slot, b, alpha, a)
    if not isinstance(b, Op):
        return _affine(slot, a, 1, alpha * b)
    if alpha != 1:
        multiple = _affine(slot.part("multiple", b.shape), b, alpha, 0)
        return add(slot, a, multiple) if multiple else None
    return _of_two(slot, Add, a, b)


def subtract(slot: Slot, a: Any, b: Any, alpha: Any = 1) -> Op | None:
    return add(slot, a, b, -alpha)


def multiply(slot: Slot, a: Any, b: Any) -> Op | None:
    if isinstance(a, Op) and isinstance(b, Op):
        return _of_two(slot, Multiply, a, b)
    return _affine(slot, a, b, 0) if isinstance(a, Op) else _affine(slot, b, a, 0)


def divide(slot: Slot, a: Any, b: Any) -> Op | None:
    if not isinstance(a, Op) or isinstance(b, Op):
        return None
    return _affine(slot, a, 1 / torch.as_tensor(b, dtype=torch.float64), 0)


def negative(slot: Slot, x: Op) -> Op | None:
    return _affine(slot, x, -1, 0)


def _of_two(slot: Slot, kind: type[Op], a: Op, b: Op) -> Op | None:
    """Of values of one shape, or of maps and a number for each of them."""
    if {a.shape, b.shape} - {slot.shape, (*slot.shape[:1], 1, 1)}:
        return None
    whole = [x if x.shape == slot.shape else slot.part("maps", slot.shape).put(Expand, x) for x in (a, b)]
    return slot.put(kind, *whole)


def _affine(slot: Slot, x: Op, scale: Any, shift: Any) -> Op | None:
    """scale * x + shift; None where that is not finite, or not the same for all numbers of a channel."""
    factors, offsets = _by_channel(scale, x.shape), _by_channel(shift, x.shape)
    if factors is None or offsets is None or slot.shape != x.shape:
        return None
    return slot.put(Affine, x, scale=slot.array(factors), shift=slot.array(offsets))


def _by_channel(constant: Any, shape: Shape) -> Tensor | None:
    """What meets every channel of a value of this shape, float32; None where that differs from place to place."""
    tensor = torch.as_tensor(constant, dtype=torch.float32)
    sizes = (1,) * (1 + len(shape) - tensor.dim()) + tuple(tensor.shape)
    if len(sizes) != 1 + len(shape) or sizes[1] not in (1, shape[0]) or max((sizes[0], *sizes[2:])) > 1:
        return None
    return tensor.reshape(-1).expand(shape[0]) if tensor.isfinite().all() else None
