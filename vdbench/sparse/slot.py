"""Where a translated call puts its operation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vdbench.sparse.graph import Op, Pair, Shape


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

    def part(self, name: str, shape: Shape) -> Self:
        """For an operation that the call is made of besides the one that has its name."""
        return replace(self, name=unused(f"{self.name}.{name}", self.ops), shape=shape)

    def source(self, view: Op) -> Op:
        """What an operation of one input reads."""
        return next(op for op in self.ops if op.name == view.inputs[0])

    def array(self, tensor: Tensor) -> np.ndarray:
        """A contiguous copy, its negative zeros made positive."""
        if not torch.isfinite(tensor).all():
            raise ValueError(f"layer {self.name} holds NaN or infinity: there is nothing exact to make of it")
        return np.add(tensor.detach().numpy(), np.float32(0), order="C")


def unused(name: str, ops: Sequence[Op]) -> str:
    """This name, with a number behind it if one of these operations has it."""
    taken = {op.name for op in ops}
    return next(n for n in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 1))) if n not in taken)


def pair(numbers: Any) -> Pair:
    numbers = tuple(numbers) if isinstance(numbers, tuple | list) else (numbers,)
    first, second = numbers * 2 if len(numbers) == 1 else numbers
    return int(first), int(second)
