"""Sparse variational dropout: the layers, the KL divergence and the conversion of existing models.

Every weight has a Gaussian posterior N(weight, exp(log_sigma2)) under a log-uniform prior. A weight whose noise
outweighs it, alpha = sigma^2 / weight^2 large, carries no information and is removed. The source is Molchanov,
Ashukha, Vetrov, *Variational Dropout Sparsifies Deep Neural Networks*, ICML 2017, arXiv 1701.05369: "the paper".
"""

import math
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

P_THRESHOLD = 0.95
LOGA_THRESHOLD = 3.0
INITIAL_LOG_SIGMA2 = -10.0
LOG_ALPHA_CLIP = 8.0
EPS = 1e-8  # under the logarithm of weight^2 and under the square root of the variance

# Constants of the approximation to the KL divergence (paper, equation 14).
K1, K2, K3 = 0.63576, 1.87320, 1.48695

_HAS_BFLOAT16 = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def log_alpha(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    """log alpha = log sigma^2 - log(weight^2 + 1e-8), elementwise, clipped to [-8, 8]."""
    return (log_sigma2 - torch.log(weight.square() + EPS)).clamp(-LOG_ALPHA_CLIP, LOG_ALPHA_CLIP)


def _fused(*tensors: Tensor) -> bool:
    """Whether the numba kernels serve these tensors: float32 on a CPU, without gaps, in one memory order."""
    first = tensors[0]
    return not torch.compiler.is_compiling() and all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.stride() == torch.empty_like(first).stride()
        for t in tensors
    )


def _narrow(square: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of the output's variance, in bfloat16 on a CPU with instructions for it: two to three times as
    fast as float32, and its rounding moves the noise's standard deviation by 0.2 % where the noise itself is random."""
    if variance.device.type == "cpu" and variance.dtype == square.dtype == torch.float32 and _HAS_BFLOAT16:
        return square.bfloat16(), variance.bfloat16()
    return square, variance


def _flat(tensor: Tensor) -> Any:
    """The memory of a tensor without gaps as a flat NumPy array."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy()


class _Posterior(torch.autograd.Function):
    """(weight, log_sigma2) -> the mean of every weight, zero where alpha is at or above the limit; its variance; and
    the KL divergence summed over all weights. One function, because one pass over the weights serves all three."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_sigma2: Tensor, alpha_limit: float) -> tuple[Tensor, Tensor, Tensor]:
        ctx.fused, ctx.alpha_limit = _fused(weight, log_sigma2), alpha_limit
        if ctx.fused:
            from vdbench import kernels

            mean, variance, by_weight, by_log_sigma2 = (torch.empty_like(weight) for _ in range(4))
            arrays = [_flat(t) for t in (weight, log_sigma2, mean, variance, by_weight, by_log_sigma2)]
            kl = weight.new_tensor(kernels.posterior(*arrays, alpha_limit))
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
            mean = weight * (variance < alpha_limit * square)
        ctx.save_for_backward(weight, variance, by_weight, by_log_sigma2)
        return mean, variance, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        weight, variance, by_weight, by_log_sigma2 = ctx.saved_tensors
        if ctx.fused and _fused(weight, grad_mean, grad_variance):
            from vdbench import kernels

            gradients = torch.empty_like(weight), torch.empty_like(weight)
            arrays = [_flat(t) for t in (weight, variance, by_weight, by_log_sigma2, *gradients)]
            kernels.posterior_gradients(
                _flat(grad_mean), _flat(grad_variance), grad_kl.item(), *arrays, ctx.alpha_limit
            )
            return *gradients, None
        kept = variance < ctx.alpha_limit * (weight.square() + EPS)
        return by_weight * grad_kl + grad_mean * kept, by_log_sigma2 * grad_kl + grad_variance * variance, None


class _AddNoise(torch.autograd.Function):
    """mean + sqrt(max(variance, 0) + 1e-8) * noise. The floor keeps the gradient finite where the variance is 0."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor) -> Tensor:
        if _fused(mean, variance):
            from vdbench import kernels

            out, size = torch.empty_like(mean), mean.numel()
            noise = torch.empty(-(-size // 4) * 4)
            kernels.fill_normal(noise.numpy(), torch.randint(2**63 - 1, ()).item())
            noise = noise[:size].as_strided(out.shape, out.stride())
            kernels.add_noise(*(_flat(t) for t in (mean, variance, noise, out)))
            ctx.save_for_backward(noise)
            return out
        std = (variance.to(torch.promote_types(variance.dtype, torch.float32)).clamp_min(0.0) + EPS).sqrt()
        noise = torch.randn_like(std)
        ctx.save_for_backward(0.5 * noise / std)
        return (mean + std * noise).to(mean.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (by_variance,) = ctx.saved_tensors
        return grad, (grad * by_variance).to(grad.dtype)


class VariationalDropout(nn.Module):
    """What every variational layer has: `log_sigma2` beside `weight`, thresholds, a mask and a KL divergence."""

    weight: Tensor
    log_sigma2: nn.Parameter
    mask_in_training: bool

    def _init_variational(self, p_threshold: float, loga_threshold: float, initial_log_sigma2: float) -> None:
        if not 0.0 < p_threshold < 1.0:
            raise ValueError(f"p_threshold is a dropout rate between 0 and 1, not {p_threshold}")
        if not abs(loga_threshold) <= LOG_ALPHA_CLIP:
            raise ValueError(f"loga_threshold is a log alpha, between -8 and 8, not {loga_threshold}")
        if not math.isfinite(initial_log_sigma2):
            raise ValueError(f"initial_log_sigma2 must be a finite log variance, not {initial_log_sigma2}")
        self.p_threshold = p_threshold
        self.loga_threshold = loga_threshold
        self.initial_log_sigma2 = initial_log_sigma2
        self.mask_in_training = True
        self.log_sigma2 = nn.Parameter(torch.full_like(self.weight, initial_log_sigma2))

    @property
    def log_alpha(self) -> Tensor:
        """log alpha of every weight, shaped as `weight`, in [-8, 8]."""
        return log_alpha(self.weight, self.log_sigma2)

    @property
    def mask(self) -> Tensor:
        """True where a weight is kept, log alpha < `loga_threshold`; shaped as `weight`."""
        return self.log_sigma2.exp() < math.exp(self.loga_threshold) * (self.weight.square() + EPS)

    def masked_weight(self) -> Tensor:
        """The mean weights, the removed ones zero: all that eval mode computes with."""
        return self.weight * self.mask

    def kl_divergence(self) -> Tensor:
        """KL(posterior || prior) in nats, a scalar summed over the weights (paper, equation 14; within 0.0094 nat a
        weight of the exact value)."""
        return cast(Tensor, _Posterior.apply(self.weight, self.log_sigma2, math.inf)[2])

    def _training_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the weights as training mode uses them."""
        alpha_limit = math.exp(self.loga_threshold) if self.mask_in_training else math.inf
        mean, variance, kl = _Posterior.apply(self.weight, self.log_sigma2, alpha_limit)
        if not torch.compiler.is_compiling() and (collected := _collected.get()) is not None:
            collected[self] = kl
        return mean, variance

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, loga_threshold={self.loga_threshold}"


class VariationalDropoutLinear(VariationalDropout, nn.Linear):
    """`torch.nn.Linear` with sparse variational dropout.

    In training mode the output is drawn from N(theta x + b, sigma^2 x^2), the local reparametrisation (paper, section
    3.2); the bias has no variance. In eval mode the layer is deterministic, its weights masked at `loga_threshold`.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        p_threshold: dropout rate above which training statistics count a weight as dropped.
        loga_threshold: weights with log alpha at or above it are removed; 3 is a dropout rate of 0.95.
        initial_log_sigma2: log variance every weight starts with.

    Attributes:
        mask_in_training: whether removed weights have mean zero in training mode too (their noise stays).

    Shape: input (*, in_features), output (*, out_features).

    Raises:
        ValueError: a threshold out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        p_threshold: float = P_THRESHOLD,
        loga_threshold: float = LOGA_THRESHOLD,
        initial_log_sigma2: float = INITIAL_LOG_SIGMA2,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_variational(p_threshold, loga_threshold, initial_log_sigma2)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return functional.linear(input, self.masked_weight(), self.bias)
        mean, variance = self._training_moments()
        square, narrow_variance = _narrow(input.square(), variance)
        output_variance = functional.linear(square, narrow_variance).to(variance.dtype)
        return cast(Tensor, _AddNoise.apply(functional.linear(input, mean, self.bias), output_variance))


class VariationalDropoutConv2d(VariationalDropout, nn.Conv2d):
    """`torch.nn.Conv2d` with sparse variational dropout. The local reparametrisation draws every output location
    independently, as the paper does (section 4.3).

    Args:
        in_channels, ..., padding_mode, device, dtype: as `torch.nn.Conv2d`.
        p_threshold, loga_threshold, initial_log_sigma2: as `VariationalDropoutLinear`, and so `mask_in_training`.

    Shape: as `torch.nn.Conv2d`.

    Raises:
        ValueError: a threshold out of range.
    """

    def __init__(
        self,
        *args: Any,
        p_threshold: float = P_THRESHOLD,
        loga_threshold: float = LOGA_THRESHOLD,
        initial_log_sigma2: float = INITIAL_LOG_SIGMA2,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_variational(p_threshold, loga_threshold, initial_log_sigma2)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self._conv_forward(input, self.masked_weight(), self.bias)
        mean, variance = self._training_moments()
        square, narrow_variance = _narrow(input.square(), variance)
        output_variance = self._conv_forward(square, narrow_variance, None).to(variance.dtype)
        return cast(Tensor, _AddNoise.apply(self._conv_forward(input, mean, self.bias), output_variance))


VariationalDropoutConvolution2D = VariationalDropoutConv2d  # its name in the system we succeed

_VARIATIONAL: dict[type[nn.Module], type[VariationalDropout]] = {
    nn.Linear: VariationalDropoutLinear,
    nn.Conv2d: VariationalDropoutConv2d,
}


def to_variational_dropout(
    model: nn.Module,
    *,
    skip: Collection[str] = (),
    p_threshold: float = P_THRESHOLD,
    loga_threshold: float = LOGA_THRESHOLD,
    initial_log_sigma2: float = INITIAL_LOG_SIGMA2,
) -> nn.Module:
    """Make every `nn.Linear` and `nn.Conv2d` of a model variational, in place, and return the model.

    The layers stay the same objects: weights, device, dtype, training mode, hooks and sharing are kept. Subclasses of
    the two are left alone, since they compute something else. An optimizer must be made afterwards, so that it knows
    `log_sigma2`.

    Args:
        model: any module; it may itself be a layer.
        skip: names, as in `model.named_modules()`, of layers (or modules and all within them) to leave as they are.

    Raises:
        ValueError: a name in `skip` that the model does not have, or no layer to convert.
    """
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown := set(skip) - names:
        raise ValueError(f"skip names {sorted(unknown)}, which this model does not have; it has {sorted(names - {''})}")
    spared = {id(inner) for name in skip for inner in model.get_submodule(name).modules()}
    layers = [m for m in model.modules() if type(m) in _VARIATIONAL and id(m) not in spared]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear or nn.Conv2d layer to make variational")
    for layer in layers:
        layer.__class__ = _VARIATIONAL[type(layer)]
        cast(VariationalDropout, layer)._init_variational(p_threshold, loga_threshold, initial_log_sigma2)
    return model


def variational_layers(model: nn.Module) -> Iterator[tuple[str, VariationalDropout]]:
    """(name, layer) of every variational layer, a shared one once."""
    for name, module in model.named_modules():
        if isinstance(module, VariationalDropout):
            yield name, module


def kl_divergence(model: nn.Module) -> Tensor:
    """The KL divergence of a model in nats: a scalar, summed over all weights of all variational layers.

    The loss of a minibatch is mean cross-entropy + kl_weight * kl_divergence(model) / num_examples, with num_examples
    the size of the training set.

    Raises:
        ValueError: the model has no variational layer.
    """
    return _summed(model, {})


def forward_with_kl(model: nn.Module, *inputs: Any) -> tuple[Any, Tensor]:
    """`model(*inputs)` and `kl_divergence(model)`, the latter from the same pass over the weights as the former.

    Raises:
        ValueError: the model has no variational layer.
    """
    collected: dict[VariationalDropout, Tensor] = {}
    token = _collected.set(collected)
    try:
        output = model(*inputs)
    finally:
        _collected.reset(token)
    return output, _summed(model, collected)


_collected: ContextVar[dict[VariationalDropout, Tensor] | None] = ContextVar("collected", default=None)


def _summed(model: nn.Module, known: dict[VariationalDropout, Tensor]) -> Tensor:
    terms = [known[layer] if layer in known else layer.kl_divergence() for _, layer in variational_layers(model)]
    if not terms:
        raise ValueError("the model has no variational layer; convert it with to_variational_dropout(model)")
    return torch.stack(terms).sum()
