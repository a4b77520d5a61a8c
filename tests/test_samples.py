"""Samples of weights: their means and variances, and gradients as of the formulas, fused or not."""

import math

import pytest
import torch

from vdbench import posterior


@pytest.mark.parametrize("rows", [None, torch.tensor([7, 2, 30])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_the_means_and_variances_they_should(dtype, rows):
    torch.manual_seed(4)
    weight = torch.linspace(-2, 2, 40 * 3001, dtype=dtype).view(40, 3001)
    log_sigma2 = torch.linspace(-3, 1, 40, dtype=dtype)[:, None].expand(40, 3001).contiguous()
    drawn, _ = posterior.sample(weight, log_sigma2, math.inf, rows)
    chosen = slice(None) if rows is None else rows
    noise = (drawn - weight[chosen]) / (0.5 * log_sigma2[chosen]).exp()
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5
    assert (noise.var() - 1).abs() < 10 / noise.numel() ** 0.5
    rows_of_noise = noise - noise.mean(1, keepdim=True)
    correlation = torch.corrcoef(rows_of_noise) - torch.eye(len(noise), dtype=dtype)
    assert correlation.abs().max() < 6 / 3001**0.5


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 0])])
def test_gradients_of_a_sample_agree_with_finite_differences(rows):
    torch.manual_seed(1)
    weight = torch.randn(5, 4, dtype=torch.double, requires_grad=True)
    log_sigma2 = (4 * torch.rand(5, 4, dtype=torch.double) - 3).requires_grad_()

    def drawn(weight, log_sigma2):
        torch.manual_seed(6)
        return posterior.sample(weight, log_sigma2, math.exp(1.0), rows)

    assert torch.autograd.gradcheck(drawn, (weight, log_sigma2))


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 0, 19])])
def test_fused_samples_are_those_of_the_formulas(rows):
    """The fused float32 kernels against torch operations in float64, given the noise that the kernels drew."""
    torch.manual_seed(1)
    limit = math.exp(0.5)
    weight = torch.randn(20, 1000).requires_grad_()
    log_sigma2 = (6 * torch.rand(20, 1000) - 4).requires_grad_()
    drawn, kl = posterior.sample(weight, log_sigma2, limit, rows)
    grad = torch.randn(drawn.shape)
    ((drawn * grad).sum() + 0.7 * kl).backward()

    w, s = (t.detach().double().requires_grad_() for t in (weight, log_sigma2))
    mean, _, expected_kl = posterior.Posterior.apply(w, s, limit)
    chosen = slice(None) if rows is None else rows
    std = (0.5 * s[chosen]).exp()
    noise = ((drawn - mean[chosen]) / std).detach()
    assert noise.abs().max() < 6
    ((mean[chosen] + std * noise).mul(grad).sum() + 0.7 * expected_kl).backward()
    torch.testing.assert_close(
        kl.double(), expected_kl, rtol=1e-5, atol=0
    )  # summed in float32, in an order the CPU decides
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_sigma2.grad.double(), s.grad, rtol=1e-4, atol=1e-4)
