"""What `kernels` does on a CPU, for a GPU, in Triton: one pass over the weights, and one over a layer's noisy output.

Noise is drawn where it is added and, for the gradient, drawn again from the same seed: it is never in memory. All
tensors of a call are without gaps and in one memory order, whatever that is. Formulas and constants are those of
`posterior`.
"""

# A Triton function is Python that is never run as such: parameters are pointers, and grids index it.
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdbench.posterior import EPS, K1, K2, K3, LOG_ALPHA_CLIP

_BLOCK = 1024
_EPS, _CLIP = tl.constexpr(EPS), tl.constexpr(LOG_ALPHA_CLIP)
_K1, _K2, _K3 = tl.constexpr(K1), tl.constexpr(K2), tl.constexpr(K3)


def _launch(kernel: "triton.JITFunction", *arguments: "Tensor | float", size: int) -> None:
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, whatever it is given
        kernel[(triton.cdiv(size, _BLOCK),)](*arguments, size, BLOCK=_BLOCK)


@triton.jit
def _places(size, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return places, places < size


@triton.jit
def _at_least(values, least):
    """What is no number stays so, for a diverged run to show."""
    return tl.maximum(values, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _divergence(weight, log_sigma2):
    """Of every weight: its square, its share of the KL divergence, and that share's gradient by log_sigma2."""
    square = weight * weight + _EPS
    unclipped = log_sigma2 - tl.log(square)
    loga = _at_least(-_at_least(-unclipped, -_CLIP), -_CLIP)
    gate = 1 / (1 + tl.exp(-(loga * _K3 + _K2)))
    kl = (1 - gate) * _K1 + 0.5 * tl.log(1 + tl.exp(-loga))
    slope = -0.5 / (1 + tl.exp(loga)) - gate * (1 - gate) * _K1 * _K3
    return square, kl, tl.where(unclipped == loga, slope, 0.0)


@triton.jit
def _posterior(weights, log_sigma2s, means, variances, sums, alpha_limit, size, BLOCK: tl.constexpr):
    places, inside = _places(size, BLOCK)
    weight = tl.load(weights + places, inside, 1.0)
    log_sigma2 = tl.load(log_sigma2s + places, inside, 0.0)
    square, kl, _ = _divergence(weight, log_sigma2)
    variance = tl.exp(log_sigma2)
    tl.store(means + places, tl.where(variance >= alpha_limit * square, 0.0, weight), inside)
    tl.store(variances + places, variance, inside)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, kl, 0.0), 0))


def posterior(weight: Tensor, log_sigma2: Tensor, alpha_limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of every weight, zero where alpha is at or above the limit, its variance, and the summed KL divergence."""
    size = weight.numel()
    mean, variance = torch.empty_like(weight), torch.empty_like(weight)
    sums = weight.new_empty(triton.cdiv(size, _BLOCK))
    _launch(_posterior, weight, log_sigma2, mean, variance, sums, alpha_limit, size=size)
    return mean, variance, sums.sum()


@triton.jit
def _posterior_gradients(
    weights, log_sigma2s, grads_mean, grads_variance, grad_kl, by_weight, by_log_sigma2, alpha_limit, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    places, inside = _places(size, BLOCK)
    weight = tl.load(weights + places, inside, 1.0)
    log_sigma2 = tl.load(log_sigma2s + places, inside, 0.0)
    square, _, slope = _divergence(weight, log_sigma2)
    variance = tl.exp(log_sigma2)
    by_kl = slope * tl.load(grad_kl)
    by_mean = tl.where(variance >= alpha_limit * square, 0.0, tl.load(grads_mean + places, inside, 0.0))
    tl.store(by_weight + places, by_mean - 2 * weight / square * by_kl, inside)
    by_variance = tl.load(grads_variance + places, inside, 0.0) * variance
    tl.store(by_log_sigma2 + places, by_kl + by_variance, inside)


def posterior_gradients(
    weight: Tensor, log_sigma2: Tensor, grad_mean: Tensor, grad_variance: Tensor, grad_kl: Tensor, alpha_limit: float
) -> tuple[Tensor, Tensor]:
    """Gradients by weight and by log_sigma2, from those by what `posterior` returned."""
    made = torch.empty_like(weight), torch.empty_like(weight)
    given = (weight, log_sigma2, grad_mean, grad_variance, grad_kl)
    _launch(_posterior_gradients, *given, *made, alpha_limit, size=weight.numel())
    return made


@triton.jit
def _add_noise(outputs, variances, seed, size, BLOCK: tl.constexpr):
    places, inside = _places(size, BLOCK)
    variance = _at_least(tl.load(variances + places, inside, 0.0).to(tl.float32), 0.0)
    mean = tl.load(outputs + places, inside, 0.0).to(tl.float32)
    noisy = mean + tl.sqrt(variance + _EPS) * tl.randn(tl.load(seed), places.to(tl.int32))
    tl.store(outputs + places, noisy.to(outputs.dtype.element_ty), inside)


def add_noise(output: Tensor, variance: Tensor, seed: Tensor) -> None:
    """Add sqrt(max(variance, 0) + 1e-8) * noise to the output, in place. The seed is a number on the same device."""
    _launch(_add_noise, output, variance, seed, size=output.numel())


@triton.jit
def _noise_gradient(grads, variances, by_variance, seed, size, BLOCK: tl.constexpr):
    places, inside = _places(size, BLOCK)
    variance = _at_least(tl.load(variances + places, inside, 0.0).to(tl.float32), 0.0)
    grad = tl.load(grads + places, inside, 0.0).to(tl.float32)
    found = 0.5 * grad * tl.randn(tl.load(seed), places.to(tl.int32)) / tl.sqrt(variance + _EPS)
    tl.store(by_variance + places, found.to(by_variance.dtype.element_ty), inside)


def noise_gradient(grad: Tensor, variance: Tensor, seed: Tensor) -> Tensor:
    """The gradient by the variance, from that by what `add_noise` made."""
    made = torch.empty_like(variance)
    _launch(_noise_gradient, grad, variance, made, seed, size=variance.numel())
    return made
