"""`posterior`'s operations on a GPU, with the Triton kernels. Imported where they serve: Triton is not everywhere."""

from typing import Any

import torch
from torch import Tensor

from vdbench import gpu_kernels
from vdbench.autograd import first_derivative, overwritable
from vdbench.posterior import ordered_as


class Posterior(torch.autograd.Function):
    """As `posterior.Posterior`. Nothing is kept for the gradients: all of it is computed again from the weights."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_sigma2: Tensor, alpha_limit: float) -> tuple[Tensor, Tensor, Tensor]:
        ctx.alpha_limit = alpha_limit
        ctx.save_for_backward(weight, log_sigma2)
        return gpu_kernels.posterior(weight, log_sigma2, alpha_limit)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        weight, log_sigma2 = ctx.saved_tensors
        grads = ordered_as(weight, grad_mean), ordered_as(weight, grad_variance), grad_kl
        return *gpu_kernels.posterior_gradients(weight, log_sigma2, *grads, alpha_limit=ctx.alpha_limit), None


class AddNoise(torch.autograd.Function):
    """As `posterior.AddNoise`. Of the noise a seed is kept, from which it is drawn again."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor) -> Tensor:
        out = overwritable(ctx, mean)
        seed = torch.randint(2**62, (1,), device=mean.device)
        gpu_kernels.add_noise(out, variance, seed)
        ctx.save_for_backward(variance, seed)
        return out

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        variance, seed = ctx.saved_tensors
        return grad, gpu_kernels.noise_gradient(ordered_as(variance, grad), variance, seed)
