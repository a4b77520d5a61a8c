"""The KL divergence of variational layers: next to the exact one, with its gradient, and summed over all weights."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from small_net import randomise
from torch import nn

from vdbench import variational
from vdbench.posterior import EPS, K1, K2, K3
from vdbench.variational import VariationalDropoutConv2d, VariationalDropoutLinear, kl_divergence

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
