"""What the autograd functions here share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that is not differentiated itself. torch's `once_differentiable` alone refuses only some of what
    would do so: a second derivative that comes through saved tensors would lack a part, and nobody be told."""
    once = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the noise of variational layers and their KL divergence have no second derivatives: leave out "
                "create_graph=True, or penalise gradients in eval mode"
            )
        return once(ctx, *grads)

    return checked


def overwritable(ctx: Any, output: Tensor) -> Tensor:
    """A layer's output to be written to in place, for no gradient needs it as it was: memory for one less of them. A
    copy where autograd forbids that."""
    if output.is_leaf or output._is_view():
        return output.clone()
    ctx.mark_dirty(output)
    return output
