"""What PyTorch's ways to pool maps are in the engine's terms: see `handlers`."""

import itertools
from collections.abc import Callable
from typing import Any

from vdbench.sparse.graph import AvgPool2d, Flatten, MaxPool2d, Op
from vdbench.sparse.slot import Slot, pair


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
        kernel=pair(kernel_size),
        stride=pair(stride or kernel_size),
        padding=pair(padding),
        dilation=pair(dilation),
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
        kernel=pair(kernel_size),
        stride=pair(stride or kernel_size),
        padding=pair(padding),
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


def adaptive(kind: type[Op]) -> Callable[..., Op | None]:
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
    return slot.put(Flatten, slot.part("pool", (*slot.shape, 1, 1)).put(AvgPool2d, x, kernel=size, stride=size))
