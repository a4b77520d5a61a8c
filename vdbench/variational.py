"""Sparse variational dropout: the layers and the KL divergence.

Every weight has a Gaussian posterior N(weight, exp(log_sigma2)) under a log-uniform prior. A weight whose noise
outweighs it, alpha = sigma^2 / weight^2 large, carries no information and is removed. The source is Molchanov,
Ashukha, Vetrov, *Variational Dropout Sparsifies Deep Neural Networks*, ICML 2017, arXiv 1701.05369: "the paper".
"""

import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vdbench.posterior import (
    EPS,
    LOG_ALPHA_CLIP,
    add_noise,
    is_half,
    log_alpha,
    narrow,
    posterior,
    sample,
    square_computed_again,
    squared,
    wide,
)

P_THRESHOLD = 0.95
LOGA_THRESHOLD = 3.0
INITIAL_LOG_SIGMA2 = -10.0


def check_options(p_threshold: float, loga_threshold: float, initial_log_sigma2: float) -> None:
    if not 0.0 < p_threshold < 1.0:
        raise ValueError(f"p_threshold is a dropout rate between 0 and 1, not {p_threshold}")
    if not abs(loga_threshold) <= LOG_ALPHA_CLIP:
        raise ValueError(f"loga_threshold is a log alpha, between -8 and 8, not {loga_threshold}")
    if not math.isfinite(initial_log_sigma2):
        raise ValueError(f"initial_log_sigma2 must be a finite log variance, not {initial_log_sigma2}")


class Matrix(NamedTuple):
    """One weight tensor of a variational layer: its name there, the means and, shaped alike, log variances."""

    name: str
    weight: Tensor
    log_sigma2: Tensor

    def log_alpha(self) -> Tensor:
        return log_alpha(self.weight, self.log_sigma2)

    def mask(self, loga_threshold: float) -> Tensor:
        """True where a weight is kept, log alpha < `loga_threshold`."""
        return wide(self.log_sigma2).exp() < math.exp(loga_threshold) * (wide(self.weight).square() + EPS)

    def masked(self, loga_threshold: float) -> Tensor:
        return self.weight * self.mask(loga_threshold)


class VariationalDropout(nn.Module):
    """What every variational layer has: weight matrices with log variances, thresholds and a KL divergence."""

    mask_in_training: bool

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

    def matrices(self) -> list[Matrix]:
        """Every weight tensor with its log variances; biases have none."""
        raise NotImplementedError

    def _init_variational(self, p_threshold: float, loga_threshold: float, initial_log_sigma2: float) -> None:
        check_options(p_threshold, loga_threshold, initial_log_sigma2)
        self.p_threshold = p_threshold
        self.loga_threshold = loga_threshold
        self.initial_log_sigma2 = initial_log_sigma2
        self.mask_in_training = True

    def reset_parameters(self) -> None:
        """Begin anew: weights as those of the plain layer, log variances at `initial_log_sigma2`."""
        super().reset_parameters()  # type: ignore[misc]
        if hasattr(self, "initial_log_sigma2"):  # the plain layer's constructor comes here before there are any
            for matrix in self.matrices():
                nn.init.constant_(matrix.log_sigma2, self.initial_log_sigma2)

    @classmethod
    def refuses(cls, layer: nn.Module) -> str | None:
        """What a plain layer is set to that its variational counterpart cannot be, if anything."""
        return "its weights are complex numbers" if any(p.is_complex() for p in layer.parameters()) else None

    def kl_divergence(self) -> Tensor:
        """KL(posterior || prior) in nats, a scalar of at least float32, summed over the weights (paper, equation 14;
        within 0.0094 nat a weight of the exact value)."""
        return torch.stack([self._posterior(matrix, math.inf)[2] for matrix in self.matrices()]).sum()

    def _posterior(self, matrix: Matrix, alpha_limit: float) -> tuple[Tensor, Tensor, Tensor]:
        return posterior(wide(matrix.weight), wide(matrix.log_sigma2), alpha_limit)

    def _alpha_limit(self) -> float:
        """The alpha at which training mode, too, takes a weight's mean for zero."""
        return math.exp(self.loga_threshold) if self.mask_in_training else math.inf

    def _collect(self, kl: Tensor) -> None:
        """Hand the KL divergence that a forward pass has computed to `forward_with_kl`."""
        # within no_grad, as in a checkpointed part, the value is there but not its gradient: it is computed again later
        if not torch.compiler.is_compiling() and kl.requires_grad and (collected := _collected.get()) is not None:
            collected[self] = kl

    def _samples(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """One sample of every weight tensor, or of some of its rows, by name; to be used by the whole minibatch."""
        limit, samples, divergences = self._alpha_limit(), {}, []
        for name, weight, log_sigma2 in self.matrices():
            drawn, kl = sample(wide(weight), wide(log_sigma2), limit, rows)
            samples[name] = drawn.to(weight.dtype)
            divergences.append(kl)
        self._collect(torch.stack(divergences).sum())
        return samples

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, loga_threshold={self.loga_threshold}"


class SingleWeight(VariationalDropout):
    """A variational layer with one weight tensor, `weight`, and `log_sigma2` beside it."""

    weight: Tensor
    bias: Tensor | None
    log_sigma2: nn.Parameter
    shared_noise = False

    def _init_variational(self, p_threshold: float, loga_threshold: float, initial_log_sigma2: float) -> None:
        super()._init_variational(p_threshold, loga_threshold, initial_log_sigma2)
        self.log_sigma2 = nn.Parameter(torch.full_like(self.weight, initial_log_sigma2))

    @classmethod
    def refuses(cls, layer: nn.Module) -> str | None:
        computed = "weight" not in layer._parameters
        return "its weight is computed from other parameters, as by weight_norm" if computed else super().refuses(layer)

    def matrices(self) -> list[Matrix]:
        return [Matrix("weight", self.weight, self.log_sigma2)]

    @property
    def log_alpha(self) -> Tensor:
        """log alpha of every weight, shaped as `weight`, in [-8, 8]."""
        return self.matrices()[0].log_alpha()

    @property
    def mask(self) -> Tensor:
        """True where a weight is kept, log alpha < `loga_threshold`; shaped as `weight`."""
        return self.matrices()[0].mask(self.loga_threshold)

    def masked_weight(self) -> Tensor:
        """The mean weights, the removed ones zero: all that eval mode computes with."""
        return self.weight * self.mask

    def _training_moments(self) -> tuple[Tensor, Tensor]:
        """Mean of the weights as training mode uses them, and their variance, of at least float32."""
        mean, variance, kl = self._posterior(self.matrices()[0], self._alpha_limit())
        self._collect(kl)
        return mean.to(self.weight.dtype), variance

    def _output(self, input: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """What the layer makes of an input, `product` being what a plain one makes of input, weight and bias."""
        if not self.training:
            return product(input, self.masked_weight(), self.bias)
        if self.shared_noise:
            return product(input, self._samples()["weight"], self.bias)
        mean, variance = self._training_moments()
        if is_half(input):
            with torch.autocast(input.device.type, enabled=False):
                output_variance = product(wide(input).square(), variance, None)
        else:
            square, variance = narrow(squared(input), variance.to(self.weight.dtype))
            with square_computed_again(square, input):
                output_variance = product(square, variance, None)
        return add_noise(product(input, mean, self.bias), output_variance)


class VariationalDropoutLinear(SingleWeight, nn.Linear):
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
        shared_noise: instead of the local reparametrisation, draw one sample of the weights a forward pass and use it
            for every input. Needed wherever what is computed later depends on several outputs of this layer, as in
            front of a recurrent layer; cheaper wherever a pass has more outputs than the layer has weights.

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
        super().__init__(
            *(in_features, out_features, bias, device, dtype),
            p_threshold=p_threshold,
            loga_threshold=loga_threshold,
            initial_log_sigma2=initial_log_sigma2,
        )

    def forward(self, input: Tensor) -> Tensor:
        return self._output(input, functional.linear)


class VariationalDropoutConv2d(SingleWeight, nn.Conv2d):
    """`torch.nn.Conv2d` with sparse variational dropout. The local reparametrisation draws every output location
    independently, as the paper does (section 4.3).

    Args:
        in_channels, ..., padding_mode, device, dtype: as `torch.nn.Conv2d`.
        p_threshold, loga_threshold, initial_log_sigma2: as `VariationalDropoutLinear`, and so `mask_in_training`.

    Shape: as `torch.nn.Conv2d`.

    Raises:
        ValueError: a threshold out of range.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._output(input, self._conv_forward)


VariationalDropoutConvolution2D = VariationalDropoutConv2d  # its name in the Chainer implementation


def variational_layers(model: nn.Module) -> Iterator[tuple[str, VariationalDropout]]:
    """(name, layer) of every variational layer, a shared one once."""
    for name, module in model.named_modules():
        if isinstance(module, VariationalDropout):
            yield name, module


def weight_name(layer: str, matrix: str) -> str:
    """What a weight tensor is called: as its layer, which adds the name of the tensor where it has several."""
    return layer if matrix == "weight" else f"{layer}.{matrix}".lstrip(".")


def variational_matrices(model: nn.Module) -> Iterator[tuple[str, Matrix]]:
    """(name, matrix) of every weight tensor of every variational layer."""
    for name, layer in variational_layers(model):
        for matrix in layer.matrices():
            yield weight_name(name, matrix.name), matrix


def kl_divergence(model: nn.Module) -> Tensor:
    """The KL divergence of a model in nats: a scalar, summed over all weights of all variational layers.

    The loss of a minibatch is mean cross-entropy + kl_weight * kl_divergence(model) / num_examples, with num_examples
    the size of the training set.

    Raises:
        ValueError: the model has no variational layer.
    """
    return _summed(model, {})


def forward_with_kl(model: nn.Module, *inputs: Any, **named: Any) -> tuple[Any, Tensor]:
    """`model(*inputs, **named)` and `kl_divergence(model)`, the latter from the same pass over the weights as the
    former: both are part of one graph, to be differentiated as one loss. A compiled model goes in here; this function
    itself is not for `torch.compile`.

    Raises:
        ValueError: the model has no variational layer.
    """
    collected: dict[VariationalDropout, Tensor] = {}
    token = _collected.set(collected)
    try:
        output = model(*inputs, **named)
    finally:
        _collected.reset(token)
    return output, _summed(model, collected)


_collected: ContextVar[dict[VariationalDropout, Tensor] | None] = ContextVar("collected", default=None)


def _summed(model: nn.Module, known: dict[VariationalDropout, Tensor]) -> Tensor:
    terms = [known[layer] if layer in known else layer.kl_divergence() for _, layer in variational_layers(model)]
    if not terms:
        raise ValueError("the model has no variational layer; convert it with to_variational_dropout(model)")
    return torch.stack(terms).sum()
