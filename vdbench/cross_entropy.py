"""Cross-entropy over many classes, as the words of a language model are, where torch's is most of what a step costs.

Loss and gradient come of one pass over the logits, row by row while a row is in cache, and the gradient takes their
place: nothing as large as the logits, 45 MB for 32 sequences of 35 words out of 10,000, is made besides them.
"""

from typing import Any, cast

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vdbench.kernels import JIT, exp, f32, log
from vdbench.posterior import flat, is_fused

_LANES = 64  # a maximum each, for a single one could not be found by vector instructions
_LOWEST = f32(-87.0)  # exp of less is no normal float32


@njit(**JIT)
def _rows(logits, targets, share):
    """The cross-entropy summed over the rows; every row becomes its gradient times `share`."""
    total, columns = 0.0, logits.shape[1]
    whole = columns - columns % _LANES
    largest = np.empty(_LANES, np.float32)
    for i in range(logits.shape[0]):
        row, of_target = logits[i], logits[i, targets[i]]
        largest[:] = row[0]
        for start in range(0, whole, _LANES):
            lanes = row[start : start + _LANES]
            for j in range(_LANES):
                largest[j] = lanes[j] if lanes[j] > largest[j] else largest[j]
        for j in range(whole, columns):
            largest[0] = row[j] if row[j] > largest[0] else largest[0]
        peak, summed = largest.max(), f32(0.0)
        for j in range(columns):
            row[j] = exp(max(row[j] - peak, _LOWEST))
            summed += row[j]
        scale = f32(share) / summed
        for j in range(columns):
            row[j] *= scale
        row[targets[i]] -= f32(share)
        total += peak - of_target + log(summed)
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        rows = flat(logits).reshape(logits.shape)
        total = _rows(rows, targets.numpy(), 1.0 / len(targets))
        torch.autograd.graph.increment_version(logits)  # whoever needs them for a gradient is told they are gone
        ctx.gradient = logits.detach()
        return logits.new_tensor(total / len(targets))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient, ctx.gradient = ctx.gradient, None  # whoever gets it may write to it
        if gradient is None:
            raise RuntimeError("vdbench.cross_entropy is differentiated once at most: torch's own can be again")
        return gradient.mul_(grad) if grad.item() != 1.0 else gradient, None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean of -log softmax(logits)[target], as torch's cross-entropy; to be differentiated once at most, and the
    logits are lost.

    Shape: logits (N, C), targets (N) int64 in 0 ... C - 1; returns the mean in nats, a scalar.

    Raises:
        IndexError: a target is no class. ValueError: more or fewer targets than rows. From torch where its own serves,
        as it names them. RuntimeError, from `backward`: a second one through the same graph.
    """
    served = logits.requires_grad and torch.is_grad_enabled() and logits.is_contiguous() and is_fused(logits)
    if not served or logits.dim() != 2 or not len(logits):
        return functional.cross_entropy(logits, targets)
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"{tuple(targets.shape)} targets for logits {tuple(logits.shape)}")
    lowest, highest = (int(bound) for bound in targets.aminmax())
    if lowest < 0 or highest >= logits.shape[1]:
        raise IndexError(f"targets from {lowest} to {highest} where the classes are 0 to {logits.shape[1] - 1}")
    return cast(Tensor, _CrossEntropy.apply(logits, targets))
