"""The variational layers: their noise, masks and gradients, against formulas and sampling."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from small_net import randomise
from torch import Tensor, nn
from torch.func import functional_call

from vdbench import posterior, variational
from vdbench.posterior import EPS
from vdbench.variational import (
    VariationalDropout,
    VariationalDropoutConv2d,
    VariationalDropoutConvolution2D,
    VariationalDropoutLinear,
)

# --- the noise -------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "linear": (lambda new, **kw: new["linear"](6, 5, **kw), (2, 6)),
    "linear 3d, no bias": (lambda new, **kw: new["linear"](6, 5, bias=False, **kw), (2, 3, 6)),
    "strided": (lambda new, **kw: new["conv"](2, 3, 3, stride=2, padding=1, **kw), (1, 2, 6, 6)),
    "reflect": (lambda new, **kw: new["conv"](2, 3, 3, padding=2, padding_mode="reflect", **kw), (1, 2, 5, 5)),
    "circular": (
        lambda new, **kw: new["conv"](2, 3, (3, 2), stride=(1, 2), padding=(2, 1), padding_mode="circular", **kw),
        (1, 2, 5, 6),
    ),
    "dilated": (lambda new, **kw: new["conv"](2, 3, 3, dilation=2, padding="same", **kw), (1, 2, 6, 6)),
    "grouped": (lambda new, **kw: new["conv"](4, 6, 3, groups=2, **kw), (1, 4, 5, 5)),
    "no bias": (lambda new, **kw: new["conv"](2, 3, 3, bias=False, **kw), (1, 2, 5, 5)),
}
PLAIN = {"linear": nn.Linear, "conv": nn.Conv2d}
VARIATIONAL = {"linear": VariationalDropoutLinear, "conv": VariationalDropoutConv2d}


def with_twin(name: str, dtype: torch.dtype = torch.float32) -> tuple[VariationalDropout, nn.Module, Tensor]:
    """A random variational layer, the plain layer of the same arguments, and an input."""
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer = make(VARIATIONAL, dtype=dtype)
    randomise(layer)
    with torch.no_grad():
        layer.weight.flatten()[1::9] = 0.05
        layer.log_sigma2.flatten()[1::9] = -0.5
    assert 0 < layer.mask.sum() < layer.mask.numel()
    return layer, make(PLAIN, dtype=dtype), torch.randn(shape, dtype=dtype)


def through_plain(plain: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return functional_call(plain, {"weight": weight} | ({} if bias is None else {"bias": bias}), (x,))


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    ("name", "channels_last"),
    [(name, False) for name in LAYERS] + [(name, True) for name, (_, shape) in LAYERS.items() if len(shape) == 4],
)
def test_outputs_are_distributed_as_with_sampled_weights(name, channels_last, bfloat16, monkeypatch):
    """Mean and standard deviation of every output, against drawing whole weight tensors and using the plain layer."""
    monkeypatch.setattr(posterior, "_HAS_BFLOAT16", bfloat16)
    layer, plain, x = with_twin(name)
    repeated = x.repeat(4000, *[1] * (x.dim() - 1))
    if channels_last:
        layer, repeated = layer.to(memory_format=torch.channels_last), repeated.to(memory_format=torch.channels_last)
    with torch.no_grad():
        got = layer(repeated).unflatten(0, (4000, len(x)))
        center, std = layer.masked_weight(), (0.5 * layer.log_sigma2).exp()
        drawn = torch.stack(
            [through_plain(plain, center + std * torch.randn_like(std), layer.bias, x) for _ in range(1500)]
        )
    scale = drawn.std(0)
    assert ((got.mean(0) - drawn.mean(0)) / scale).abs().max() < 0.15  # 5 standard errors
    ratio = got.std(0) / scale
    assert (ratio - 1).abs().max() < 0.11  # likewise
    assert abs(ratio.mean() - 1) < 0.02


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_have_independent_noise(name):
    layer, _, x = with_twin(name)
    with torch.no_grad():
        draws = layer(x.repeat(3000, *[1] * (x.dim() - 1))).reshape(3000, -1)
    correlations = torch.corrcoef(draws.T[:40]).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / math.sqrt(3000)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_variance_moves_the_standard_deviation_by_less_than_a_percent(name, monkeypatch):
    layer, _, x = with_twin(name)
    nn.init.zeros_(layer.weight)  # the output is the bias and the noise
    bias = 0 if layer.bias is None else layer.bias.detach().view(-1, *[1] * (2 * (x.dim() == 4)))
    noises = []
    for bfloat16 in (False, True):
        monkeypatch.setattr(posterior, "_HAS_BFLOAT16", bfloat16)
        torch.manual_seed(2)
        noises.append(layer(x).detach() - bias)
    ratio = (noises[1] / noises[0])[noises[0].abs() > 0.05]
    assert 0 < (ratio - 1).abs().max() < 0.01
    assert abs(ratio.mean() - 1) < 0.003


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_formula_with_the_noise_drawn(name, dtype, monkeypatch):
    """By input, weight, log_sigma2 and bias."""
    monkeypatch.setattr(posterior, "_HAS_BFLOAT16", False)
    layer, plain, x = with_twin(name, dtype)
    x.requires_grad_()
    out = layer(x)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, [x, *layer.parameters()], grad)

    twin, plain, y = copy.deepcopy(layer).double(), plain.double(), x.detach().double().requires_grad_()
    kept = variational.log_alpha(twin.weight, twin.log_sigma2) < 3
    mean = through_plain(plain, twin.weight * kept, twin.bias, y)
    plain.bias = None
    std = (through_plain(plain, twin.log_sigma2.exp(), None, y**2) + 1e-8).sqrt()
    noise = ((out.double() - mean) / std).detach()
    expected = torch.autograd.grad(mean + std * noise, [y, *twin.parameters()], grad.double())
    tolerance = 2e-5 if dtype == torch.float32 else 1e-9
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name):
    layer, _, x = with_twin(name, torch.float64)
    names = [n for n, _ in layer.named_parameters()]

    def seeded(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(3)
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(seeded, [x.requires_grad_(), *layer.parameters()])


def test_gradcheck_of_mean_variance_and_kl():
    """Both sides of the threshold and of the clip, none near enough for a step to cross."""
    weight = torch.tensor([0.5, -0.3, 1.2, 0.01, 2.0, -0.02], dtype=torch.float64)
    log_alpha = torch.tensor([-3.0, 0.5, 2.5, 4.0, -10.0, 9.0], dtype=torch.float64)
    log_sigma2 = log_alpha + torch.log(weight**2 + EPS)
    inputs = (weight.requires_grad_(), log_sigma2.requires_grad_())
    assert torch.autograd.gradcheck(lambda *p: posterior.Posterior.apply(*p, math.exp(3)), inputs)
    mean, _, _ = posterior.Posterior.apply(*inputs, math.exp(3))
    assert mean.tolist() == [0.5, -0.3, 1.2, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_are_those_of_eval_mode_alone(name, dtype):
    """In training mode they would lack a part: refused, not wrong."""
    layer, _, x = with_twin(name, dtype)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(layer.kl_divergence(), layer.weight, create_graph=True)
    (slope,) = torch.autograd.grad(layer.eval()(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert layer.weight.grad.any()


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_finite_where_the_variance_is_zero(name, dtype):
    """sqrt has an infinite slope at 0: without a floor an all-zero input gives NaN."""
    for log_sigma2 in (-10.0, -200.0):
        layer, _, x = with_twin(name, dtype)
        nn.init.constant_(layer.log_sigma2, log_sigma2)
        x = torch.zeros_like(x).requires_grad_()
        layer(x).square().sum().backward()
        for tensor in (x, *layer.parameters()):
            assert tensor.grad.isfinite().all()


def test_a_variance_rounded_below_zero_counts_as_zero(dtype):
    mean = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    variance = torch.tensor([-1e-6, -1.0], dtype=dtype, requires_grad=True)
    out = posterior.AddNoise.apply(mean, variance)
    assert (out - mean).abs().max() < 1e-3
    out.sum().backward()
    assert variance.grad.isfinite().all()


@pytest.mark.parametrize("name", ["linear", "strided"])
def test_the_bias_has_no_variance(name, dtype):
    layer, _, x = with_twin(name, dtype)
    nn.init.constant_(layer.bias, 9.0)
    assert (layer(torch.zeros_like(x)) - 9).abs().max() < 1e-3
    nn.init.constant_(layer.bias, -9.0)  # a negative variance would be NaN
    assert (layer(torch.zeros_like(x)) + 9).abs().max() < 1e-3


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_eval_mode_is_the_plain_layer_with_masked_weights(name, dtype):
    layer, plain, x = with_twin(name, dtype)
    with torch.no_grad():
        removed = layer.log_alpha >= 3.0
        removed.flatten()[0] = True
        layer.weight.flatten()[0] = 1e3
        layer.log_sigma2.flatten()[0] = 20.0  # a removed weight that would be seen
    assert torch.equal(layer.mask, ~removed)
    layer.eval()
    expected = through_plain(plain, layer.weight.masked_fill(removed, 0.0), layer.bias, x)
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer(x), layer(x))


def test_a_weight_exactly_at_the_threshold_is_removed(dtype):
    """1 + 1e-8 is 1 in float32, so log alpha is log_sigma2 to the last bit."""
    layer = VariationalDropoutLinear(1, 3, bias=False, dtype=dtype, loga_threshold=0.0)
    nn.init.ones_(layer.weight)
    at = 0.0 if dtype == torch.float32 else math.log1p(EPS)
    with torch.no_grad():
        layer.log_sigma2[:, 0] = torch.tensor([at - 1e-6, at, at + 1e-6], dtype=torch.float64)
        assert layer.mask[:, 0].tolist() == [True, False, False]
        assert layer.eval()(torch.ones(1, 1, dtype=dtype))[0].tolist() == [1.0, 0.0, 0.0]
        draws = layer.train()(torch.ones(40_000, 1, dtype=dtype))
    torch.testing.assert_close(draws.mean(0), torch.tensor([1.0, 0, 0], dtype=dtype), rtol=0, atol=0.025)


def test_threshold_moves_the_mask():
    layer = VariationalDropoutLinear(20, 20, loga_threshold=-1.0)
    randomise(layer)
    for threshold in (-1.0, 0.0, 2.5):
        layer.loga_threshold = threshold
        assert torch.equal(layer.mask, layer.log_alpha < threshold)


def test_mask_in_training_can_be_switched_off(dtype):
    layer, plain, x = with_twin("linear", dtype)
    outputs = []
    for layer.mask_in_training in (True, False):
        torch.manual_seed(4)
        outputs.append(layer(x).detach())
    removed_part = through_plain(plain, layer.weight * ~layer.mask, torch.zeros_like(layer.bias), x)
    assert removed_part.abs().max() > 0.05
    torch.testing.assert_close(outputs[1] - outputs[0], removed_part.detach(), rtol=1e-4, atol=1e-5)


# --- construction ----------------------------------------------------------------------------------------------------


def test_every_argument_of_the_plain_layers_is_taken():
    for make, plain, arguments, shape in (
        (VariationalDropoutLinear, nn.Linear, (3, 2, False, "cpu", torch.float64), (5, 3)),
        (
            VariationalDropoutConv2d,
            nn.Conv2d,
            (4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, False, "reflect", "cpu", torch.float64),
            (2, 4, 7, 7),
        ),
    ):
        layer = make(*arguments, p_threshold=0.9, loga_threshold=8.0, initial_log_sigma2=-20.0)
        twin = plain(*arguments)
        twin.weight = layer.weight
        x = torch.randn(shape, dtype=torch.float64)
        assert torch.equal(layer.eval()(x), twin(x))
        assert layer.bias is None
        assert (layer.p_threshold, layer.loga_threshold) == (0.9, 8.0)
        assert layer.log_sigma2.dtype == torch.float64 and (layer.log_sigma2 == -20).all()
        assert "loga_threshold=8.0" in repr(layer)
    assert VariationalDropoutConvolution2D is VariationalDropoutConv2d


@pytest.mark.parametrize(
    "wrong",
    [{"p_threshold": p} for p in (0.0, 1.0, -0.1, 95, math.nan)]
    + [{"loga_threshold": a} for a in (8.1, -9, math.nan, math.inf)]
    + [{"initial_log_sigma2": s} for s in (math.inf, -math.inf, math.nan)],
)
def test_an_impossible_threshold_is_refused_by_name(wrong):
    (name, value), *_ = wrong.items()
    for make in (
        lambda **kw: VariationalDropoutLinear(2, 2, **kw),
        lambda **kw: VariationalDropoutConv2d(1, 1, 1, **kw),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            make(**wrong)
