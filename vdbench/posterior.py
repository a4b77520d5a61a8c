"""The Gaussian posterior of a weight and the noise of an output, as differentiable operations.

Each has three forms of the same formulas: fused kernels for float32 on a CPU (numba) and on a GPU (Triton, `on_gpu`),
torch operations for the rest. The equations are those of the paper, see `variational`.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from vdbench.autograd import first_derivative, overwritable
from vdbench.mistakes import first_line

log = logging.getLogger("vdbench")

LOG_ALPHA_CLIP = 8.0
COMPUTED_AGAIN = 2**20  # weights of a layer from which what the gradients need is not kept: memory counts for more
EPS = 1e-8  # under the logarithm of weight^2 and under the square root of the variance

# Constants of the approximation to the KL divergence (paper, equation 14).
K1, K2, K3 = 0.63576, 1.87320, 1.48695

_HAS_BFLOAT16 = bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False))


def wide(tensor: Tensor) -> Tensor:
    """At least float32: in float16 1e-8 is 0, and in bfloat16 a sum over many weights stops growing."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def log_alpha(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    """log alpha = log sigma^2 - log(weight^2 + 1e-8), elementwise, clipped to [-8, 8]."""
    return (wide(log_sigma2) - torch.log(wide(weight).square() + EPS)).clamp(-LOG_ALPHA_CLIP, LOG_ALPHA_CLIP)


def _are_alike(kind: str, *tensors: Tensor) -> bool:
    """Whether all are on one device, of such a kind, without gaps and in one memory order, and no compiler looks on."""
    device, order = tensors[0].device, torch.empty_like(tensors[0]).stride()
    if torch.compiler.is_compiling() or device.type != kind:
        return False
    return all(t.device == device and t.stride() == order for t in tensors)


def is_fused(*tensors: Tensor) -> bool:
    """Whether the numba kernels serve these tensors: float32 on a CPU, without gaps, in one memory order."""
    return _are_alike("cpu", *tensors) and all(t.dtype == torch.float32 for t in tensors)


def _is_fused_on_gpu(*tensors: Tensor) -> bool:
    """Whether the Triton kernels serve these tensors: on a GPU, without gaps, in one memory order."""
    if not _are_alike("cuda", *tensors) or any(t.dtype == torch.float64 for t in tensors):
        return False
    return _triton_works(tensors[0].device)


def _on_gpu() -> Any:
    from vdbench import on_gpu

    return on_gpu


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether kernels can be compiled and run there: that takes Triton, a C compiler, and a GPU that is not too old."""
    try:
        one = torch.ones(1, device=device)
        _on_gpu().gpu_kernels.add_noise(one, one.clone(), torch.zeros(1, dtype=torch.int64, device=device))
    except Exception as error:  # as many kinds as there are parts missing
        log.warning(
            "Triton does not work here (%s: %s): torch's operations, which are slower",
            type(error).__name__,
            first_line(error),
        )
        return False
    return True


def variance_dtype(device: str, matmul_precision: str | None = None) -> str:
    """The type in which training computes the variance of a float32 layer's output: on a GPU bfloat16 where nothing is
    asked for."""
    has_bfloat16 = matmul_precision is None if device == "cuda" else _HAS_BFLOAT16
    return "bfloat16" if has_bfloat16 else "float32"


def narrow(square: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of the output's variance, in bfloat16 on a CPU with instructions for it: two to three times as
    fast as float32. Its rounding moves the noise's standard deviation, where the noise itself is random, and the
    gradient by log_sigma2, by a few parts in a thousand."""
    if variance.device.type == "cpu" and variance.dtype == square.dtype == torch.float32 and _HAS_BFLOAT16:
        return square.bfloat16(), variance.bfloat16()
    return square, variance


def ordered_as(other: Tensor, tensor: Tensor) -> Tensor:
    """A tensor in the memory order of another one of its shape."""
    return tensor if tensor.stride() == other.stride() else torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def squared(input: Tensor) -> Tensor:
    """The squares in the input's own type, where autocast would widen them."""
    device = input.device.type
    if not _autocasts(device):
        return input.square()
    with torch.autocast(device, enabled=False):
        return input.square()


def square_computed_again(square: Tensor, input: Tensor) -> AbstractContextManager[Any]:
    """Within the block, operations do not keep `square` for their gradients: it is computed again from the input, which
    is cheaper than the memory. Not where autocast converts the input: then the layer's product keeps a copy, and so
    nobody would notice that the input was changed in place meanwhile."""
    device = input.device.type
    if torch.compiler.is_compiling() or (_autocasts(device) and input.dtype != torch.get_autocast_dtype(device)):
        return nullcontext()
    place, shape, dtype = square.data_ptr(), square.shape, square.dtype

    def pack(kept: Tensor) -> Tensor | None:
        return None if kept.data_ptr() == place and kept.shape == shape else kept

    def unpack(kept: Tensor | None) -> Tensor:
        return squared(input.detach()).to(dtype) if kept is None else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def flat(tensor: Tensor) -> Any:
    """The memory of a tensor without gaps as a flat NumPy array."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy()


def is_half(input: Tensor) -> bool:
    """Whether products with this input are float16, whose range is too small for their variance."""
    device = input.device.type
    return torch.float16 in (input.dtype, torch.get_autocast_dtype(device) if _autocasts(device) else None)


class Posterior(torch.autograd.Function):
    """(weight, log_sigma2) -> the mean of every weight, zero where alpha is at or above the limit; its variance; and
    the KL divergence summed over all weights. One function, because one pass over the weights serves all three."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_sigma2: Tensor, alpha_limit: float) -> tuple[Tensor, Tensor, Tensor]:
        ctx.fused, ctx.alpha_limit = is_fused(weight, log_sigma2), alpha_limit
        if ctx.fused:
            kl, mean, variance, by_weight, by_log_sigma2 = _fused_posterior(weight, log_sigma2, alpha_limit)
            if weight.numel() >= COMPUTED_AGAIN:
                ctx.save_for_backward(weight, log_sigma2)
                return mean, variance, kl
        else:
            square = weight.square() + EPS
            unclipped = log_sigma2 - torch.log(square)
            loga = unclipped.clamp(-LOG_ALPHA_CLIP, LOG_ALPHA_CLIP)
            gate = torch.sigmoid(K2 + K3 * loga)
            kl = (K1 * (1 - gate) + 0.5 * functional.softplus(-loga)).sum()
            slope = -0.5 * torch.sigmoid(-loga) - K1 * K3 * gate * (1 - gate)
            by_log_sigma2 = slope * (unclipped == loga)  # the clip passes no gradient outside [-8, 8]
            by_weight = -2 * weight / square * by_log_sigma2
            variance = log_sigma2.exp()
            mean = weight.masked_fill(variance >= alpha_limit * square, 0.0)
        ctx.save_for_backward(weight, variance, by_weight, by_log_sigma2)
        return mean, variance, kl

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        saved = ctx.saved_tensors  # which may be unpacked once, where activations are checkpointed
        if len(saved) == 2:
            weight, log_sigma2 = saved
            _, _, variance, by_weight, by_log_sigma2 = _fused_posterior(weight, log_sigma2, ctx.alpha_limit)
        else:
            weight, variance, by_weight, by_log_sigma2 = saved
        if ctx.fused and is_fused(weight, grad_mean, grad_variance):
            from vdbench import kernels

            gradients = torch.empty_like(weight), torch.empty_like(weight)
            arrays = [flat(t) for t in (weight, variance, by_weight, by_log_sigma2, *gradients)]
            grads = flat(grad_mean), flat(grad_variance), grad_kl.item()
            kernels.posterior_gradients(*grads, *arrays, alpha_limit=ctx.alpha_limit)
            return *gradients, None
        removed = variance >= ctx.alpha_limit * (weight.square() + EPS)
        by_mean = grad_mean.masked_fill(removed, 0.0)
        return by_weight * grad_kl + by_mean, by_log_sigma2 * grad_kl + grad_variance * variance, None


def _fused_posterior(weight: Tensor, log_sigma2: Tensor, alpha_limit: float) -> tuple[Tensor, ...]:
    """KL divergence, mean, variance, and the gradients of the divergence by weight and by log_sigma2."""
    from vdbench import kernels

    made = tuple(torch.empty_like(weight) for _ in range(4))
    arrays = [flat(t) for t in (weight, log_sigma2, *made)]
    return weight.new_tensor(kernels.posterior(*arrays, alpha_limit=alpha_limit)), *made


class AddNoise(torch.autograd.Function):
    """mean + sqrt(max(variance, 0) + 1e-8) * noise. The floor keeps the gradient finite where the variance is 0.

    The mean may be overwritten.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor) -> Tensor:
        ctx.dtype, variance = variance.dtype, wide(variance)
        if is_fused(mean, variance):
            from vdbench import kernels

            out, size = overwritable(ctx, mean), mean.numel()
            noise = torch.empty(-(-size // 4) * 4)
            kernels.fill_normal(noise.numpy(), torch.randint(2**63 - 1, ()).item())
            noise = noise[:size].as_strided(out.shape, out.stride())
            kernels.add_noise(*(flat(t) for t in (out, variance, noise)))
            ctx.save_for_backward(noise)
            return out
        std = (variance.clamp_min(0.0) + EPS).sqrt()
        noise = torch.randn_like(std)
        ctx.save_for_backward(0.5 * noise / std)
        return (mean + std * noise).to(mean.dtype)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (by_variance,) = ctx.saved_tensors
        return grad, (grad * by_variance).to(ctx.dtype)


def posterior(weight: Tensor, log_sigma2: Tensor, alpha_limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of every weight, zero where alpha is at or above the limit, its variance, and the KL divergence summed over
    all weights. Shape: as `weight`, twice, and a scalar."""
    function: Any = _on_gpu().Posterior if _is_fused_on_gpu(weight, log_sigma2) else Posterior
    return cast(tuple[Tensor, Tensor, Tensor], function.apply(weight, log_sigma2, alpha_limit))


def add_noise(mean: Tensor, variance: Tensor) -> Tensor:
    """mean + sqrt(max(variance, 0) + 1e-8) * noise; the mean may be overwritten."""
    function: Any = _on_gpu().AddNoise if _is_fused_on_gpu(mean, variance) else AddNoise
    return cast(Tensor, function.apply(mean, variance))


def sample(weight: Tensor, log_sigma2: Tensor, alpha_limit: float, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One sample of the weights, or of some rows of them: mean, zero where alpha is at or above the limit, plus
    standard deviation times noise. With it the KL divergence summed over all weights, whichever rows are sampled.

    Args:
        rows: (R,) int64, distinct; None for all.
    """
    if is_fused(weight, log_sigma2):
        return cast(tuple[Tensor, Tensor], _FusedSample.apply(weight, log_sigma2, alpha_limit, rows))
    mean, _, kl = posterior(weight, log_sigma2, alpha_limit)
    if rows is not None:
        mean, log_sigma2 = mean[rows], log_sigma2[rows]
    return mean + (0.5 * log_sigma2).exp() * torch.randn_like(mean), kl


class _FusedSample(torch.autograd.Function):
    """`sample` for what the numba kernels serve. Nothing is kept for the gradients but a seed: all else is computed
    again, so that a sample needs no more memory than itself."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_sigma2: Tensor, alpha_limit: float, rows: Any) -> tuple[Tensor, Tensor]:
        from vdbench import kernels

        ctx.alpha_limit, ctx.seed, ctx.rows = alpha_limit, torch.randint(2**62, ()).item(), rows
        ctx.save_for_backward(weight, log_sigma2)
        chosen = [t if rows is None else t.detach()[rows] for t in (weight, log_sigma2)]
        out = torch.empty_like(chosen[0])
        kl = kernels.sample(*(flat(t) for t in (*chosen, out)), seed=ctx.seed, alpha_limit=alpha_limit)
        return out, weight.new_tensor(kl if rows is None else kernels.divergence(flat(weight), flat(log_sigma2)))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        from vdbench import kernels

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
    from vdbench import kernels

    made = torch.empty_like(weight), torch.empty_like(weight)
    arrays = [flat(t) for t in (weight, log_sigma2, ordered_as(weight, grad), *made)]
    kernels.sample_gradients(*arrays, grad_kl=grad_kl, seed=ctx.seed, alpha_limit=ctx.alpha_limit)
    return made
