"""The variational layers: their KL divergence, noise, masks and gradients, against formulas and sampling."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from vdbench import posterior, variational
from vdbench.posterior import EPS, K1, K2, K3
from vdbench.variational import (
    VariationalDropout,
    VariationalDropoutConv2d,
    VariationalDropoutConvolution2D,
    VariationalDropoutLinear,
    kl_divergence,
)

PATHS = ["fused", "plain", "float64"]  # float32 through the kernels, float32 through torch, float64 through torch
# log alpha, exact KL, approximated KL
ORACLE = [
    (-8, 4.635014, 4.635899),
    (-5, 3.131778, 3.136684),
    (-3, 2.107978, 2.115590),
    (-1, 0.914531, 0.913872),
    (0, 0.426686, 0.431239),
    (1, 0.173194, 0.177970),
    (2, 0.066168, 0.068417),
    (3, 0.024688, 0.025420),
    (5, 0.003365, 0.003415),
    (8, 0.000168, 0.000168),
]


@pytest.fixture(params=PATHS)
def dtype(request, monkeypatch) -> torch.dtype:
    """The number type of a test that runs once on every path."""
    if request.param == "plain":
        monkeypatch.setattr(posterior, "is_fused", lambda *tensors: False)
    elif request.param == "fused":
        assert posterior.is_fused(torch.ones(3, 4), torch.ones(3, 4))
    return torch.float64 if request.param == "float64" else torch.float32


def exact_kl(log_alpha: float) -> float:
    rate = 0.5 * math.exp(-log_alpha)
    counts = np.arange(int(rate + 20 * math.sqrt(rate) + 50))
    expected = (stats.poisson.pmf(counts, rate) * special.digamma(counts + 0.5)).sum()
    return 0.5 * (expected - special.digamma(0.5))


def layer_at(log_alpha: float, dtype: torch.dtype, weight: float = -0.7) -> VariationalDropoutLinear:
    """A layer of one weight with the log alpha given."""
    log_sigma2 = log_alpha + math.log(weight**2 + EPS)
    layer = VariationalDropoutLinear(1, 1, dtype=dtype, initial_log_sigma2=log_sigma2)
    nn.init.constant_(layer.weight, weight)
    return layer


def randomise(layer: VariationalDropout, low: float = -3.0, high: float = 0.0) -> None:
    with torch.no_grad():
        layer.weight.normal_()
        layer.log_sigma2.uniform_(low, high)
        if layer.bias is not None:
            layer.bias.normal_()


# --- KL divergence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("log_alpha", "exact", "approximation"), ORACLE)
def test_kl_of_one_weight_is_the_table(log_alpha, exact, approximation, dtype):
    assert exact_kl(log_alpha) == pytest.approx(exact, abs=1e-6)
    # at the clip itself, rounding of the input would be all that is tested
    got = layer_at(min(max(log_alpha, -7.999999), 7.999999), dtype).kl_divergence().item()
    assert got == pytest.approx(approximation, abs=2e-6 if dtype == torch.float32 else 1e-6)


def test_kl_is_within_its_bound_of_the_exact_one(dtype):
    """0.0094 nat is what the approximation can do, so it is neither passed nor, by much, missed."""
    grid = np.linspace(-8, 8, 161)
    deviations = [abs(layer_at(a, dtype).kl_divergence().item() - exact_kl(a)) for a in grid]
    assert 0.0093 < max(deviations) < 0.0094
    assert abs(grid[int(np.argmax(deviations))] + 3.5) < 0.11


def test_kl_slopes_down_in_log_alpha_as_the_exact_one_does(dtype):
    """The gradient by log_sigma2 is the slope by log alpha. One system had its sign and size wrong; weights stalled."""
    for a in np.linspace(-7.5, 7.5, 31):
        layer = layer_at(a, dtype)
        layer.kl_divergence().backward()
        slope = layer.log_sigma2.grad.item()
        exact = (exact_kl(a + 1e-3) - exact_kl(a - 1e-3)) / 2e-3
        assert slope < 0
        assert slope == pytest.approx(exact, rel=0.07, abs=0.005)
        assert layer.weight.grad.item() == pytest.approx(-2 / -0.7 * slope, rel=1e-4)


def test_kl_gradient_is_that_of_plain_autograd(dtype):
    torch.manual_seed(0)
    layer = VariationalDropoutLinear(40, 30, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(30, 40) * 10 ** torch.empty(30, 40).uniform_(-4, 1))
        layer.log_sigma2.uniform_(-15, 3)
    layer.kl_divergence().mul(0.37).backward()
    weight, log_sigma2 = (p.detach().double().requires_grad_() for p in (layer.weight, layer.log_sigma2))
    loga = (log_sigma2 - torch.log(weight**2 + 1e-8)).clamp(-8, 8)
    minus_kl = K1 * torch.sigmoid(K2 + K3 * loga) - 0.5 * torch.log1p(torch.exp(-loga)) - K1
    (-0.37 * minus_kl.sum()).backward()
    tolerance = {"rtol": 5e-4, "atol": 0} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-12}
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, **tolerance)
    torch.testing.assert_close(layer.log_sigma2.grad.double(), log_sigma2.grad, **tolerance)


@pytest.mark.parametrize(("log_alpha", "weight"), [(-8.01, 0.7), (-30, 5.0), (8.01, -0.7), (20, 1e-3), (13, 0.0)])
def test_kl_has_no_gradient_outside_the_clip(log_alpha, weight, dtype):
    layer = layer_at(log_alpha, dtype, weight)
    kl = layer.kl_divergence()
    kl.backward()
    assert layer.weight.grad.item() == layer.log_sigma2.grad.item() == 0
    assert kl.item() == pytest.approx(4.635899 if log_alpha < 0 else 0.000168, abs=2e-6)


def test_kl_is_a_sum_over_weights_not_a_mean(dtype):
    """Wider is proportionally more; neither the cut into layers nor the other layers' sizes matter."""
    torch.manual_seed(0)
    wide = VariationalDropoutLinear(6, 8, dtype=dtype)
    randomise(wide, -8, 3)
    upper, lower = (VariationalDropoutLinear(6, 4, dtype=dtype) for _ in range(2))
    conv = VariationalDropoutConv2d(2, 8, (3, 1), dtype=dtype)
    with torch.no_grad():
        for part, rows in ((upper, slice(0, 4)), (lower, slice(4, 8))):
            part.weight.copy_(wide.weight[rows])
            part.log_sigma2.copy_(wide.log_sigma2[rows])
        conv.weight.copy_(wide.weight.view(8, 2, 3, 1))
        conv.log_sigma2.copy_(wide.log_sigma2.view(8, 2, 3, 1))
    whole = wide.kl_divergence()
    torch.testing.assert_close(kl_divergence(nn.Sequential(upper, nn.ReLU(), lower)), whole)
    torch.testing.assert_close(conv.kl_divergence(), whole)

    single = layer_at(-2.0, dtype).kl_divergence()
    for shape in ((1, 10), (10, 10), (30, 20)):
        layer = VariationalDropoutLinear(*shape, dtype=dtype, initial_log_sigma2=-2 + math.log(0.49 + EPS))
        nn.init.constant_(layer.weight, -0.7)
        torch.testing.assert_close(layer.kl_divergence(), single * layer.weight.numel(), rtol=1e-5, atol=0)


def test_kl_of_a_model_without_variational_layers_is_an_error():
    with pytest.raises(ValueError, match="to_variational_dropout"):
        kl_divergence(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="to_variational_dropout"):
        variational.forward_with_kl(nn.Linear(2, 2), torch.ones(1, 2))


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_layers_have_finite_gradients_and_the_same_kl(dtype):
    torch.manual_seed(0)
    layer = VariationalDropoutLinear(784, 300, dtype=dtype)
    with torch.no_grad():
        layer.weight[0] = 0.0
    twin = copy.deepcopy(layer).float()
    output = layer(torch.rand(4, 784, dtype=dtype))
    assert output.dtype == dtype
    kl = layer.kl_divergence()
    (output.float().square().mean() + kl / 60_000).backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
    assert kl.item() == pytest.approx(twin.kl_divergence().item(), rel=1e-5)
    assert torch.equal(layer.mask, twin.mask)


@pytest.mark.parametrize("layer", [VariationalDropoutLinear(6, 5), VariationalDropoutConv2d(6, 5, 1)])
def test_activation_checkpoints(layer):
    """Where a layer runs again in the backward pass, with the same noise, gradients are the same."""
    batch = torch.randn(3, 6, *[1] * (layer.weight.dim() - 2))
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(0)
        layer.zero_grad()
        run(batch).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
