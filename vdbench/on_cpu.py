"""`posterior`'s operations on a CPU in float32, with the numba kernels. Imported where they serve."""

from typing import Any

import torch
from torch import Tensor

from vdbench import kernels, posterior
from vdbench.autograd import first_derivative, overwritable
from vdbench.posterior import flat, ordered_as


class Posterior(torch.autograd.Function):
    """As `posterior.Posterior`. Nothing is kept for the gradients: all of it is computed again from the weights, which
    takes no longer than to write it down and to read it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_sigma2: Tensor, alpha_limit: float) -> tuple[Tensor, Tensor, Tensor]:
        ctx.alpha_limit = alpha_limit
        ctx.save_for_backward(weight, log_sigma2)
        mean, variance = torch.empty_like(weight), torch.empty_like(weight)
        arrays = [flat(t) for t in (weight, log_sigma2, mean, variance)]
        return mean, variance, weight.new_tensor(kernels.posterior(*arrays, alpha_limit=alpha_limit))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        weight, log_sigma2 = ctx.saved_tensors
        grads = ordered_as(weight, grad_mean), ordered_as(weight, grad_variance)
        gradients = torch.empty_like(weight), torch.empty_like(weight)
        arrays = [flat(t) for t in (weight, log_sigma2, *grads, *gradients)]
        kernels.posterior_gradients(*arrays, grad_kl=grad_kl.item(), alpha_limit=ctx.alpha_limit)
        return *gradients, None


class AddNoise(posterior.AddNoise):
    """As `posterior.AddNoise`, in one pass and into the mean's place."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor) -> Tensor:
        ctx.dtype, variance = variance.dtype, variance.float()
        out, size = overwritable(ctx, mean), mean.numel()
        noise = torch.empty(-(-size // 4) * 4)
        kernels.fill_normal(noise.numpy(), torch.randint(2**63 - 1, ()).item())
        noise = noise[:size].as_strided(out.shape, out.stride())
        kernels.add_noise(*(flat(t) for t in (out, variance, noise)))
        ctx.save_for_backward(noise)
        return out


class Sample(torch.autograd.Function):
    """As `posterior.sample`. Nothing is kept for the gradients but a seed: all else is computed again, so that a sample
    needs no more memory than itself."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_sigma2: Tensor, alpha_limit: float, rows: Any) -> tuple[Tensor, Tensor]:
        ctx.alpha_limit, ctx.seed, ctx.rows = alpha_limit, torch.randint(2**62, ()).item(), rows
        ctx.save_for_backward(weight, log_sigma2)
        chosen = [t if rows is None else t.detach()[rows] for t in (weight, log_sigma2)]
        out = torch.empty_like(chosen[0])
        kl = kernels.sample(*(flat(t) for t in (*chosen, out)), seed=ctx.seed, alpha_limit=alpha_limit)
        return out, weight.new_tensor(kl if rows is None else kernels.divergence(flat(weight), flat(log_sigma2)))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        weight, log_sigma2 = ctx.saved_tensors
        if ctx.rows is None:
            return *_sample_gradients(ctx, weight, log_sigma2, grad, grad_kl.item()), None, None
        gradients = torch.empty_like(weight), torch.empty_like(weight)
        arrays = [flat(t) for t in (weight, log_sigma2, *gradients)]
        kernels.divergence_gradients(*arrays, grad_kl=grad_kl.item())
        of_rows = _sample_gradients(ctx, weight[ctx.rows], log_sigma2[ctx.rows], grad, 0.0)
        for gradient, part in zip(gradients, of_rows, strict=True):
            gradient.index_add_(0, ctx.rows, part)
        return *gradients, None, None


def _sample_gradients(
    ctx: Any, weight: Tensor, log_sigma2: Tensor, grad: Tensor, grad_kl: float
) -> tuple[Tensor, Tensor]:
    """By weight and by log_sigma2, of their sample and of their divergence."""
    made = torch.empty_like(weight), torch.empty_like(weight)
    arrays = [flat(t) for t in (weight, log_sigma2, ordered_as(weight, grad), *made)]
    kernels.sample_gradients(*arrays, grad_kl=grad_kl, seed=ctx.seed, alpha_limit=ctx.alpha_limit)
    return made
