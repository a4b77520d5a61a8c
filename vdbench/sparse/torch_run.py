"""A stretch of operations in PyTorch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdbench.sparse.graph import Conv2d, Flatten, Op


class TorchRun:
    """Operations in PyTorch, from batches of values to batches of values.

    Which values every operation reads, and which nothing reads after it, is worked out once: around a small layer there
    is no time for it.

    Args:
        views: the flattened forms of values, by name, which any operation may read.
        behind: values whose arrays have their channels behind.
        channels_last: compute in the memory format in which the channels of a pixel are adjacent.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        views: Mapping[str, Flatten],
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        behind: Collection[str] = (),
        channels_last: bool = False,
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._behind = [[name in behind for name in names] for names in (inputs, outputs)]
        self._channels_last = channels_last
        self._steps: list[tuple[Op, tuple[int, ...]]] = []
        places = {name: k for k, name in enumerate(inputs)}

        def add(op: Op) -> None:
            self._steps.append((_channels_last(op) if channels_last else op, tuple(map(place, op.inputs))))
            places[op.name] = len(inputs) + len(self._steps) - 1

        def place(name: str) -> int:
            if name not in places:
                add(views[name])
            return places[name]

        for op in ops:
            add(op)
        self._made = tuple(map(place, outputs))
        last = {k: step for step, (_, given) in enumerate(self._steps) for k in given}
        ends: list[list[int]] = [[] for _ in self._steps]
        for k, step in last.items():
            if k not in self._made:
                ends[step].append(k)
        self._ends = [tuple(places) for places in ends]

    def __call__(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Inputs (N, ...) float32; outputs alike, in any memory order."""
        with torch.inference_mode():
            behind = zip(arrays, self._behind[0], strict=True)
            values: list[Any] = [_from_array(array, is_so) for array, is_so in behind]
            if self._channels_last:
                values = [_last(value) for value in values]
            for (op, given), ends in zip(self._steps, self._ends, strict=True):
                values.append(op(*[values[k] for k in given]))
                for k in ends:
                    values[k] = None  # nothing reads it any more
            behind = zip(self._made, self._behind[1], strict=True)
            return [(values[k].permute(0, 2, 3, 1) if is_so else values[k]).numpy() for k, is_so in behind]


def _from_array(array: np.ndarray, behind: bool) -> Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2) if behind else torch.from_numpy(array)


def _last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def _channels_last(op: Op) -> Op:
    """A convolution with its weights in PyTorch's other memory format."""
    if not isinstance(op, Conv2d):
        return op
    return replace(op, weight=np.ascontiguousarray(op.weight.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2))
