"""What the functions and methods of PyTorch are in the engine's terms.

Each handler has the signature of the torch function it stands for, after `slot`: values come as the `Op` that makes
them, constants as they are. It returns the operation that makes the result, or None where the engine has no such
operation. A module is translated as the function it calls.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vdbench.sparse import handlers_of_sequences as sequences
from vdbench.sparse.graph import AvgPool2d, Clip, Concat, Flatten, LeakyReLU, MaxPool2d, Op, Pointwise
from vdbench.sparse.handlers_of_arithmetic import add, divide, multiply, negative, subtract
from vdbench.sparse.handlers_of_layers import conv2d
from vdbench.sparse.handlers_of_pooling import adaptive, avg_pool2d, max_pool2d
from vdbench.sparse.opaque import Pad, Reshape, Softmax
from vdbench.sparse.slot import Slot


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


def zero_pad(slot: Slot, x: Op, pad: Any, mode: str = "constant", value: float | None = None) -> Op | None:
    left, right, top, bottom = (*pad, 0, 0, 0, 0)[:4]
    if len(x.shape) != 3 or len(pad) > 4 or mode != "constant" or value or min(pad, default=0) < 0:
        return None
    return slot.put(Pad, x, padding=(top, bottom, left, right))


def dropout(slot: Slot, x: Op, p: float = 0.5, training: bool = True, inplace: bool = False) -> Op | None:
    return None if training else x


def reorder(slot: Slot, x: Op, *_: Any, **__: Any) -> Op | None:
    """Whatever leaves the numbers of an example in their order."""
    if isinstance(x, Reshape):
        x = slot.source(x)
    if slot.shape == x.shape:
        return x
    return slot.put(Flatten if len(x.shape) == 3 and len(slot.shape) == 1 else Reshape, x)


def cat(slot: Slot, tensors: Any, dim: int = 0) -> Op | None:
    if not all(isinstance(t, Op) for t in tensors) or dim not in (1, -len(slot.shape)):
        return None
    return slot.put(Concat, *tensors)


# Of every number by itself, wherever it stands.
OF_NUMBERS: dict[Any, Callable[..., Op | None]] = {
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
    **dict.fromkeys((functional.dropout, functional.dropout1d, functional.dropout2d, torch.dropout), dropout),
    **dict.fromkeys((torch.add, operator.add, operator.iadd, "add", "add_"), add),
    **dict.fromkeys((torch.sub, torch.subtract, operator.sub, operator.isub, "sub", "sub_"), subtract),
    **dict.fromkeys((torch.mul, torch.multiply, operator.mul, operator.imul, "mul", "mul_"), multiply),
    **dict.fromkeys((torch.div, torch.divide, operator.truediv, operator.itruediv, "div", "div_"), divide),
    **dict.fromkeys((torch.neg, operator.neg, "neg", "neg_"), negative),
}

# Of values of any shape: they see for themselves what they can do.
OF_SHAPES: dict[Any, Callable[..., Op | None]] = {
    functional.linear: sequences.linear,
    functional.batch_norm: sequences.batch_norm,
    functional.conv1d: sequences.conv1d,
    **dict.fromkeys((functional.max_pool1d, torch.max_pool1d), sequences.max_pool1d),
    functional.avg_pool1d: sequences.avg_pool1d,
    functional.adaptive_avg_pool1d: sequences.adaptive_avg_pool1d,
    functional.adaptive_max_pool1d: sequences.adaptive_max_pool1d,
    **dict.fromkeys((torch.mean, "mean"), sequences.mean),
    **dict.fromkeys((torch.permute, "permute"), sequences.permute),
    **dict.fromkeys((torch.transpose, "transpose"), sequences.transpose),
    **dict.fromkeys((torch.flatten, torch.unflatten, torch.reshape, torch.squeeze, torch.unsqueeze), reorder),
    **dict.fromkeys(("flatten", "unflatten", "reshape", "view", "squeeze", "unsqueeze"), reorder),
    **dict.fromkeys(("contiguous", "to", "float", "cpu", "detach"), reorder),
}

# Of vectors and of maps.
OF_MAPS: dict[Any, Callable[..., Op | None]] = {
    functional.conv2d: conv2d,
    **dict.fromkeys((torch.softmax, functional.softmax, "softmax"), _softmax(log=False)),
    **dict.fromkeys((torch.log_softmax, functional.log_softmax, "log_softmax"), _softmax(log=True)),
    **dict.fromkeys((functional.max_pool2d, torch.max_pool2d), max_pool2d),
    functional.avg_pool2d: avg_pool2d,
    functional.adaptive_avg_pool2d: adaptive(AvgPool2d),
    functional.adaptive_max_pool2d: adaptive(MaxPool2d),
    functional.pad: zero_pad,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), cat),
}

HANDLERS = OF_NUMBERS | OF_SHAPES | OF_MAPS
