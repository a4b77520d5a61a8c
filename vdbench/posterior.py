"""The Gaussian posterior of a weight and the noise of an output, as differentiable operations.

Each has three forms of the same formulas: fused kernels for float32 on a CPU (numba, `on_cpu`) and on a GPU (Triton,
`on_gpu`), torch operations for the rest. The equations are those of the paper, see `variational`.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from vdbench.autograd import first_derivative
from vdbench.mistakes import first_line

log = logging.getLogger("vdbench")

LOG_ALPHA_CLIP = 8.0
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


def _on_cpu() -> Any:
    from vdbench import on_cpu

    return on_cpu


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
        square = weight.square() + EPS
        unclipped = log_sigma2 - torch.log(square)
        loga = unclipped.clamp(-LOG_ALPHA_CLIP, LOG_ALPHA_CLIP)
        gate = torch.sigmoid(K2 + K3 * loga)
        kl = (K1 * (1 - gate) + 0.5 * functional.softplus(-loga)).sum()
        slope = -0.5 * torch.sigmoid(-loga) - K1 * K3 * gate * (1 - gate)
        by_log_sigma2 = slope * (unclipped == loga)  # the clip passes no gradient outside [-8, 8]
        by_weight = -2 * weight / square * by_log_sigma2
        variance = log_sigma2.exp()
        removed = variance >= alpha_limit * square
        ctx.save_for_backward(removed, variance, by_weight, by_log_sigma2)
        return weight.masked_fill(removed, 0.0), variance, kl

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        removed, variance, by_weight, by_log_sigma2 = ctx.saved_tensors
        by_mean = grad_mean.masked_fill(removed, 0.0)
        return by_weight * grad_kl + by_mean, by_log_sigma2 * grad_kl + grad_variance * variance, None


class AddNoise(torch.autograd.Function):
    """mean + sqrt(max(variance, 0) + 1e-8) * noise. The floor keeps the gradient finite where the variance is 0."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor) -> Tensor:
        ctx.dtype, variance = variance.dtype, wide(variance)
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
    function: Any = Posterior
    if is_fused(weight, log_sigma2):
        function = _on_cpu().Posterior
    elif _is_fused_on_gpu(weight, log_sigma2):
        function = _on_gpu().Posterior
    return cast(tuple[Tensor, Tensor, Tensor], function.apply(weight, log_sigma2, alpha_limit))


def add_noise(mean: Tensor, variance: Tensor) -> Tensor:
    """mean + sqrt(max(variance, 0) + 1e-8) * noise; the mean may be overwritten."""
    function: Any = AddNoise
    if is_fused(mean) and _are_alike("cpu", mean, variance) and variance.dtype != torch.float64:
        function = _on_cpu().AddNoise
    elif _is_fused_on_gpu(mean, variance):
        function = _on_gpu().AddNoise
    return cast(Tensor, function.apply(mean, variance))


def sample(weight: Tensor, log_sigma2: Tensor, alpha_limit: float, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One sample of the weights, or of some rows of them: mean, zero where alpha is at or above the limit, plus
    standard deviation times noise. With it the KL divergence summed over all weights, whichever rows are sampled.

    Args:
        rows: (R,) int64, distinct; None for all.
    """
    if is_fused(weight, log_sigma2):
        return cast(tuple[Tensor, Tensor], _on_cpu().Sample.apply(weight, log_sigma2, alpha_limit, rows))
    mean, _, kl = posterior(weight, log_sigma2, alpha_limit)
    if rows is not None:
        mean, log_sigma2 = mean[rows], log_sigma2[rows]
    return mean + (0.5 * log_sigma2).exp() * torch.randn_like(mean), kl
