"""What the functions and methods of PyTorch are in the engine's terms.

Each handler has the signature of the torch function it stands for, after `slot`: values come as the `Op` that makes
them, constants as they are. It returns the operation that makes the result, or None where the engine has no such
operation. A module is translated as the function it calls.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vdbench.sparse.graph import (
    Add,
    Affine,
    AvgPool2d,
    Clip,
    Concat,
    Conv2d,
    Flatten,
    LeakyReLU,
    Linear,
    MaxPool2d,
    Op,
    Pair,
    Pointwise,
    Shape,
    Softmax,
)


@dataclass
class Slot:
    """Where a call stands: the name and shape of what it makes, and the operations so far."""

    name: str
    shape: Shape
    ops: list[Op]

    def put(self, kind: type[Op], *inputs: Op, **fields: Any) -> Op:
        op = kind(**{"name": self.name, "shape": self.shape, "inputs": tuple(i.name for i in inputs)} | fields)
        self.ops.append(op)
        return op

    def array(self, tensor: Tensor) -> np.ndarray:
        """A contiguous copy, its negative zeros made positive."""
        if not torch.isfinite(tensor).all():
            raise ValueError(f"layer {self.name} holds NaN or infinity: there is nothing exact to make of it")
        return np.add(tensor.detach().numpy(), np.float32(0), order="C")


def unused(name: str, ops: Sequence[Op]) -> str:
    """This name, with a number behind it if one of these operations has it."""
    taken = {op.name for op in ops}
    return next(n for n in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 1))) if n not in taken)


def _pair(numbers: Any) -> Pair:
    numbers = tuple(numbers) if isinstance(numbers, tuple | list) else (numbers,)
    first, second = numbers * 2 if len(numbers) == 1 else numbers
    return int(first), int(second)


def linear(slot: Slot, x: Op, weight: Any, bias: Any = None) -> Op | None:
    if len(x.shape) != 1:
        return None
    bias = torch.zeros(len(weight)) if bias is None else bias
    return slot.put(Linear, x, weight=slot.array(weight), bias=slot.array(bias))


def _sides(padding: Any, kernel: Pair, dilation: Pair) -> tuple[int, ...]:
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(side for total in totals for side in (total // 2, total - total // 2))
    rows, columns = (0, 0) if padding == "valid" else _pair(padding)
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
    return slot.put(
        Conv2d,
        x,
        weight=slot.array(weight),
        bias=slot.array(torch.zeros(len(weight)) if bias is None else bias),
        stride=_pair(stride),
        padding=_sides(padding, tuple(weight.shape[2:]), _pair(dilation)),
        dilation=_pair(dilation),
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


def relu(slot: Slot, x: Op, inplace: bool = False) -> Op | None:
    return slot.put(Clip, x)


def relu6(slot: Slot, x: Op, inplace: bool = False) -> Op | None:
    return slot.put(Clip, x, high=6.0)


def hardtanh(slot: Slot, x: Op, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Op | None:
    return clamp(slot, x, min_val, max_val)


def clamp(slot: Slot, x: Op, min: Any = None, max: Any = None) -> Op | None:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return None
    low, high = -np.inf if min is None else float(min), np.inf if max is None else float(max)
    return slot.put(Clip, x, low=low, high=high) if low <= high else None


def leaky_relu(slot: Slot, x: Op, negative_slope: float = 0.01, inplace: bool = False) -> Op | None:
    return slot.put(LeakyReLU, x, slope=float(negative_slope))


def _pointwise(function: str) -> Callable[..., Op | None]:
    def handler(slot: Slot, x: Op, inplace: bool = False) -> Op | None:
        return slot.put(Pointwise, x, function=function)

    return handler


def gelu(slot: Slot, x: Op, approximate: str = "none") -> Op | None:
    return slot.put(Pointwise, x, function="gelu" if approximate == "none" else "gelu_tanh")


def elu(slot: Slot, x: Op, alpha: float = 1.0, inplace: bool = False) -> Op | None:
    return slot.put(Pointwise, x, function="elu") if alpha == 1 else None


def _softmax(*, log: bool) -> Callable[..., Op | None]:
    def handler(slot: Slot, x: Op, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Op | None:
        return slot.put(Softmax, x, log=log) if dim in (1, -len(x.shape)) and dtype is None else None

    return handler


def max_pool2d(
    slot: Slot,
    x: Op,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Op | None:
    return slot.put(
        MaxPool2d,
        x,
        kernel=_pair(kernel_size),
        stride=_pair(stride or kernel_size),
        padding=_pair(padding),
        dilation=_pair(dilation),
        ceil_mode=ceil_mode,
    )


def avg_pool2d(
    slot: Slot,
    x: Op,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Op | None:
    return slot.put(
        AvgPool2d,
        x,
        kernel=_pair(kernel_size),
        stride=_pair(stride or kernel_size),
        padding=_pair(padding),
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor=divisor_override,
    )


def _window(size: int, windows: int) -> tuple[int, int] | None:
    """Kernel and stride of the windows adaptive pooling takes, None where they differ."""
    starts = [i * size // windows for i in range(windows)]
    kernels = {-((i + 1) * size // -windows) - starts[i] for i in range(windows)}
    strides = {b - a for a, b in itertools.pairwise(starts)} or set(kernels)
    return (kernels.pop(), strides.pop()) if len(kernels) == len(strides) == 1 and strides != {0} else None


def _adaptive(kind: type[Op]) -> Callable[..., Op | None]:
    def pool(slot: Slot, x: Op, output_size: Any, return_indices: bool = False) -> Op | None:
        windows = [_window(size, out) for size, out in zip(x.shape[1:], slot.shape[1:], strict=True)]
        if slot.shape == x.shape:
            return x
        if windows[0] is None or windows[1] is None:
            return None
        kernel, stride = zip(*windows, strict=True)
        return slot.put(kind, x, kernel=kernel, stride=stride)

    return pool


def mean(slot: Slot, x: Op, dim: Any, keepdim: bool = False) -> Op | None:
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    if len(x.shape) != 3 or {d % 4 for d in dims} != {2, 3}:
        return None
    size = x.shape[1:]
    if keepdim:
        return slot.put(AvgPool2d, x, kernel=size, stride=size)
    name = unused(f"{slot.name}.pool", slot.ops)
    return slot.put(Flatten, slot.put(AvgPool2d, x, kernel=size, stride=size, name=name, shape=(*slot.shape, 1, 1)))


def dropout(slot: Slot, x: Op, p: float = 0.5, training: bool = True, inplace: bool = False) -> Op | None:
    return None if training else x


def reorder(slot: Slot, x: Op, *_: Any, **__: Any) -> Op | None:
    """Whatever leaves the numbers of an example in their order."""
    if slot.shape == x.shape:
        return x
    return slot.put(Flatten, x) if len(slot.shape) == 1 else None


def add(slot: Slot, a: Any, b: Any, alpha: Any = 1) -> Op | None:
    if isinstance(b, Op) and isinstance(a, int) and a == 0 and alpha == 1:
        return b  # where `sum` starts
    if not isinstance(a, Op) or not isinstance(b, Op) or a.shape != b.shape or alpha != 1:
        return None
    return slot.put(Add, a, b)


def cat(slot: Slot, tensors: Any, dim: int = 0) -> Op | None:
    if not all(isinstance(t, Op) for t in tensors) or dim not in (1, -len(slot.shape)):
        return None
    return slot.put(Concat, *tensors)


HANDLERS: dict[Any, Callable[..., Op | None]] = {
    functional.linear: linear,
    functional.conv2d: conv2d,
    functional.batch_norm: batch_norm,
    **dict.fromkeys((functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_"), relu),
    functional.relu6: relu6,
    **dict.fromkeys((functional.hardtanh, functional.hardtanh_), hardtanh),
    **dict.fromkeys((torch.clamp, torch.clamp_, torch.clip, "clamp", "clamp_", "clip", "clip_"), clamp),
    **dict.fromkeys((functional.leaky_relu, functional.leaky_relu_), leaky_relu),
    **dict.fromkeys((torch.tanh, functional.tanh, "tanh"), _pointwise("tanh")),
    **dict.fromkeys((torch.sigmoid, functional.sigmoid, "sigmoid"), _pointwise("sigmoid")),
    functional.silu: _pointwise("silu"),
    functional.gelu: gelu,
    functional.elu: elu,
    functional.hardsigmoid: _pointwise("hardsigmoid"),
    functional.hardswish: _pointwise("hardswish"),
    **dict.fromkeys((torch.softmax, functional.softmax, "softmax"), _softmax(log=False)),
    **dict.fromkeys((torch.log_softmax, functional.log_softmax, "log_softmax"), _softmax(log=True)),
    **dict.fromkeys((functional.max_pool2d, torch.max_pool2d), max_pool2d),
    functional.avg_pool2d: avg_pool2d,
    functional.adaptive_avg_pool2d: _adaptive(AvgPool2d),
    functional.adaptive_max_pool2d: _adaptive(MaxPool2d),
    **dict.fromkeys((torch.mean, "mean"), mean),
    **dict.fromkeys((functional.dropout, functional.dropout2d, torch.dropout), dropout),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze), reorder),
    **dict.fromkeys(("flatten", "reshape", "view", "squeeze", "unsqueeze"), reorder),
    **dict.fromkeys(("contiguous", "to", "float", "cpu", "detach"), reorder),
    **dict.fromkeys((torch.add, operator.add, operator.iadd, "add", "add_"), add),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), cat),
}
