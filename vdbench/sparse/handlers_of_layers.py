"""What layers with weights are in the engine's terms, and normalisation: see `handlers`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdbench.sparse.graph import Affine, Conv2d, Linear, Op, Pair
from vdbench.sparse.opaque import Pad
from vdbench.sparse.slot import Slot, pair


def arrays(slot: Slot, weight: Tensor, bias: Tensor | None) -> dict[str, np.ndarray]:
    """Of a layer, which may have no bias."""
    return {"weight": slot.array(weight), "bias": slot.array(torch.zeros(len(weight)) if bias is None else bias)}


def linear(slot: Slot, x: Op, weight: Any, bias: Any = None) -> Op | None:
    return slot.put(Linear, x, **arrays(slot, weight, bias))


def _sides(padding: Any, kernel: Pair, dilation: Pair) -> tuple[int, ...]:
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(side for total in totals for side in (total // 2, total - total // 2))
    rows, columns = (0, 0) if padding == "valid" else pair(padding)
    return rows, rows, columns, columns


def conv2d(
    slot: Slot,
    x: Op,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Op | None:
    sides = _sides(padding, tuple(weight.shape[2:]), pair(dilation))
    if isinstance(x, Pad):  # with zeros, as the convolution itself
        sides = tuple(map(sum, zip(sides, x.padding, strict=True)))
        x = slot.source(x)
    return slot.put(
        Conv2d,
        x,
        **arrays(slot, weight, bias),
        stride=pair(stride),
        padding=sides,
        dilation=pair(dilation),
        groups=groups,
    )


def batch_norm(
    slot: Slot,
    x: Op,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Op | None:
    if training or running_mean is None or running_var is None:
        return None
    if (running_var + eps < 0).any():
        raise ValueError(f"layer {slot.name} has a negative variance: the model is damaged")
    scale = 1 / torch.sqrt(running_var.double() + eps) * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - running_mean * scale
    return slot.put(Affine, x, scale=slot.array(scale.float()), shift=slot.array(shift.float()))
