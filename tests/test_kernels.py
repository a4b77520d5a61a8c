"""The fused float32 kernels against float64 formulas, a reference Philox and the statistics of a normal."""

import contextlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from vdbench import kernels, posterior, variational
from vdbench.posterior import EPS, K1, K2, K3, log_alpha
from vdbench.variational import VariationalDropoutLinear, forward_with_kl

WORD = 2**32 - 1


def philox_reference(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in whole numbers, as Salmon et al. print it."""
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (
            (product1 >> 32) ^ counter[1] ^ key[0],
            product1 & WORD,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & WORD,
        )
        key = ((key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD)
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_reference_gives_the_known_answers_of_the_authors(counter, key, words):
    counter, key, words = (tuple(int(word, 16) for word in text.split()) for text in (counter, key, words))
    assert philox_reference(counter, key) == words


@pytest.mark.parametrize(
    ("counter", "key0", "key1"),
    [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (WORD, WORD, WORD), (12_345_678, 0xA4093822, 0x299F31D0)],
)
def test_philox_is_the_reference(counter, key0, key1):
    words = kernels.philox(np.uint64(counter), np.uint64(key0), np.uint64(key1))
    assert tuple(int(word) for word in words) == philox_reference((counter, 0, 0, 0), (key0, key1))


def drawn(size: int, seed: int) -> np.ndarray:
    out = np.full(size, np.nan, np.float32)
    kernels.fill_normal(out, seed)
    return out


@pytest.mark.parametrize("seed", [0, 3, 2**63 - 2])
def test_normals_are_box_muller_of_the_reference_words(seed):
    """So a seed means the same noise on every machine, and all 63 bits of the seed count."""
    words = np.array([philox_reference((i, 0, 0, 0), (seed & WORD, seed >> 32)) for i in range(500)])
    expected = []
    for a, b in ((words[:, 0], words[:, 1]), (words[:, 2], words[:, 3])):
        radius = np.sqrt(-2 * np.log(((a >> 8) + 1) * 2.0**-24))
        angle = ((b >> 8) - 2**23) * np.pi / 2**23
        expected += [radius * np.sin(angle), radius * np.cos(angle)]
    np.testing.assert_allclose(drawn(2000, seed), np.concatenate(expected), rtol=0, atol=3e-6)


def test_normals_have_the_moments_and_the_distribution_of_a_normal():
    noise = drawn(2**20, 7).astype(np.float64)
    standard_error = 1 / math.sqrt(noise.size)
    assert abs(noise.mean()) < 4 * standard_error
    assert abs((noise**2).mean() - 1) < 4 * math.sqrt(2) * standard_error
    assert abs((noise**3).mean()) < 4 * math.sqrt(15) * standard_error
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96) * standard_error
    assert stats.kstest(noise[::4], "norm").pvalue > 0.01
    assert 4.5 < np.abs(noise).max() < 6  # the tails are there, and finite


def test_normals_are_uncorrelated_within_a_draw_and_between_seeds():
    noise, other = drawn(2**18, 7), drawn(2**18, 8)
    quarters = noise.reshape(4, -1)
    limit = 4 / math.sqrt(quarters.shape[1])
    for values in (quarters, quarters**2):  # the two of a Box-Muller pair share a radius: squares would show it
        correlations = np.corrcoef(values)[np.triu_indices(4, 1)]
        assert np.abs(correlations).max() < limit
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < limit
    assert abs(np.corrcoef(noise, other)[0, 1]) < limit


def test_layer_noise_follows_torch_manual_seed_and_is_fresh_every_time():
    layer = VariationalDropoutLinear(1, 4999, bias=False, initial_log_sigma2=0.0)
    torch.nn.init.zeros_(layer.weight)  # so that the output is the noise
    ones = torch.ones(1, 1)
    torch.manual_seed(5)
    first, second = layer(ones).detach(), layer(ones).detach()
    torch.manual_seed(5)
    assert torch.equal(layer(ones), first)
    assert torch.equal(layer(ones), second)
    assert abs(float(torch.corrcoef(torch.cat([first, second]))[0, 1])) < 4 / math.sqrt(4999)
    torch.manual_seed(6)
    assert not torch.equal(layer(ones), first)


def test_every_output_has_noise_where_their_number_is_no_multiple_of_4():
    torch.manual_seed(0)
    layer = VariationalDropoutLinear(1, 7, bias=False, initial_log_sigma2=0.0)
    torch.nn.init.zeros_(layer.weight)
    draws = torch.stack([layer(torch.ones(1, 1)).detach()[0] for _ in range(1000)])
    torch.testing.assert_close(draws.std(0), torch.ones(7), rtol=0, atol=0.09)


def formula(weight: torch.Tensor, log_sigma2: torch.Tensor) -> torch.Tensor:
    """KL of every weight, in plain autograd operations."""
    loga = log_alpha(weight, log_sigma2)
    return K1 - K1 * torch.sigmoid(K2 + K3 * loga) + 0.5 * torch.log1p(torch.exp(-loga))


def wide_range_of_weights() -> tuple[np.ndarray, np.ndarray]:
    """More than two blocks of weights, and an odd number; log alpha on both sides of the clip and of 3."""
    rng = np.random.default_rng(0)
    weight = (10 ** rng.uniform(-7, 1.5, 20_001) * rng.choice([-1, 1], 20_001)).astype(np.float32)
    weight[::100] = 0
    return weight, rng.uniform(-45, 15, weight.size).astype(np.float32)


def test_posterior_is_the_formula_in_float64():
    weight, log_sigma2 = wide_range_of_weights()
    mean, variance, by_weight, by_log_sigma2 = (np.empty_like(weight) for _ in range(4))
    kl = kernels.posterior(weight, log_sigma2, mean, variance, math.exp(3))
    kernels.divergence_gradients(weight, log_sigma2, by_weight, by_log_sigma2, 1.0)

    w, ls2 = (torch.from_numpy(a).double().requires_grad_() for a in (weight, log_sigma2))
    expected = formula(w, ls2).sum()
    expected.backward()
    unclipped = (ls2 - torch.log(w**2 + EPS)).detach().numpy()
    away = np.abs(np.abs(unclipped) - 8) > 1e-4  # rounding may put the rest on the other side of the clip
    assert (np.abs(unclipped) > 8).sum() > 1000 and (np.abs(unclipped) < 8).sum() > 1000

    assert kl == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(variance, np.exp(log_sigma2.astype(float)), rtol=3e-6)
    assert w.grad is not None and ls2.grad is not None
    np.testing.assert_allclose(by_weight[away], w.grad.numpy()[away], rtol=5e-4)
    np.testing.assert_allclose(by_log_sigma2[away], ls2.grad.numpy()[away], rtol=5e-4)
    kept = np.abs(unclipped - 3) > 1e-4
    np.testing.assert_array_equal(mean[kept], (weight * (unclipped < 3))[kept])


def test_posterior_gradients_are_the_chain_rule():
    weight, log_sigma2 = wide_range_of_weights()
    mean, variance, by_weight, by_log_sigma2, grad_weight, grad_log_sigma2 = (np.empty_like(weight) for _ in range(6))
    kernels.posterior(weight, log_sigma2, mean, variance, math.exp(3))
    kernels.divergence_gradients(weight, log_sigma2, by_weight, by_log_sigma2, 1.0)
    rng = np.random.default_rng(1)
    grad_mean, grad_variance = rng.normal(size=(2, weight.size)).astype(np.float32)
    arrays = (weight, log_sigma2, grad_mean, grad_variance, grad_weight, grad_log_sigma2)
    kernels.posterior_gradients(*arrays, 0.3, math.exp(3))
    kept = (mean != 0) | ((weight == 0) & (variance < math.exp(3) * EPS))
    np.testing.assert_allclose(grad_weight, 0.3 * by_weight + grad_mean * kept, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad_log_sigma2, 0.3 * by_log_sigma2 + grad_variance * variance, rtol=1e-5, atol=1e-6)


def test_the_sum_keeps_its_precision_over_a_million_weights():
    layer = VariationalDropoutLinear(1000, 1000, bias=False)
    torch.nn.init.constant_(layer.weight, 0.0371)
    one = formula(torch.tensor(0.0371, dtype=torch.float32).double(), torch.tensor(-10.0, dtype=torch.float64))
    assert layer.kl_divergence().item() == pytest.approx(1e6 * float(one), rel=1e-5)  # in float32 throughout: 1e-3


def test_noise_is_added_with_the_floored_standard_deviation():
    mean = np.array([1.0, -2.0, 3.0, 4.0], np.float32)
    variance = np.array([4.0, 0.0, -1e-3, 0.25], np.float32)  # a convolution may round a variance below 0
    noise = np.array([0.5, 2.0, -1.0, -1.5], np.float32)
    out, draws = mean.copy(), noise.copy()
    kernels.add_noise(out, variance, draws)
    std = np.array([2.0, 1e-4, 1e-4, 0.5])
    np.testing.assert_allclose(out, mean + std * noise, rtol=1e-6)
    np.testing.assert_allclose(draws, 0.5 * noise / std, rtol=1e-5)  # d out / d variance


@pytest.mark.parametrize("parameter", ["weight", "log_sigma2"])
def test_a_nan_parameter_is_not_hidden(parameter):
    layer = VariationalDropoutLinear(20, 10)
    with torch.no_grad():
        getattr(layer, parameter)[3, 4] = math.nan
    assert layer.kl_divergence().isnan()


@pytest.mark.parametrize(
    "parameter",
    [
        "weight",
        "log_sigma2",
    ],
)
def test_a_nan_parameter_shows_in_its_outputs_and_no_others(parameter):
    layer = VariationalDropoutLinear(20, 10)
    with torch.no_grad():
        getattr(layer, parameter)[3, 4] = math.nan
    output = layer(torch.ones(5, 20))
    assert output[:, 3].isnan().all()
    assert output[:, [0, 1, 2, 4, 9]].isfinite().all()


@pytest.mark.parametrize("where", ["mean", "variance"])
def test_add_noise_keeps_nan(where):
    arrays = {"mean": np.ones(8, np.float32), "variance": np.ones(8, np.float32)}
    arrays[where][2] = np.nan
    kernels.add_noise(arrays["mean"], arrays["variance"], np.ones(8, np.float32))
    assert np.flatnonzero(np.isnan(arrays["mean"])).tolist() == [2]


def test_constants_are_those_of_the_torch_path():
    here = (kernels._EPS, kernels._CLIP, kernels._K1, kernels._K2, kernels._K3)
    there = (posterior.EPS, posterior.LOG_ALPHA_CLIP, posterior.K1, posterior.K2, posterior.K3)
    assert here == tuple(np.float32(value) for value in there)


@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 20)])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_what_is_computed_again_to_save_memory_is_what_was_there(shape, bfloat16, monkeypatch):
    """The gradients are the same to the last bit, whether intermediate results are kept or not."""
    monkeypatch.setattr(posterior, "_HAS_BFLOAT16", bfloat16)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = VariationalDropoutLinear(20, 10, initial_log_sigma2=-4.0)
        inputs = torch.randn(shape, requires_grad=True)
        outputs, kl = forward_with_kl(layer, inputs)
        (outputs.square().sum() + kl).backward()
        return [t.grad for t in (inputs, *layer.parameters()) if t.grad is not None]

    again = gradients()
    monkeypatch.setattr(variational, "square_computed_again", lambda *_: contextlib.nullcontext())
    assert len(again) == 4
    assert all(torch.equal(a, b) for a, b in zip(again, gradients(), strict=True))


def test_a_layer_keeps_neither_its_squared_input_nor_a_second_output():
    layer, inputs = VariationalDropoutLinear(50, 30), torch.randn(40, 50, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(inputs)
    shapes = list({t.untyped_storage().data_ptr(): tuple(t.shape) for t in saved}.values())
    assert shapes.count((40, 50)) == 1  # the input, and no square of it
    assert shapes.count((40, 30)) == 1  # the noise


COMPILED = """
import hashlib
import numpy as np
from vdbench import kernels

draw = np.random.default_rng(0)
weight, mean, noise, grad = (draw.normal(size=20_000).astype(np.float32) for _ in range(4))
log_sigma2, variance = draw.normal(-6, 3, 20_000).astype(np.float32), abs(draw.normal(size=20_000)).astype(np.float32)
made = [np.zeros_like(weight) for _ in range(9)]
kl = [kernels.posterior(weight, log_sigma2, *made[:2], 20.0), kernels.divergence(weight, log_sigma2)]
kernels.posterior_gradients(weight, log_sigma2, grad, noise, *made[2:4], 1.0, 20.0)
kernels.divergence_gradients(weight, log_sigma2, *made[4:6], 1.0)
kl.append(kernels.sample(weight, log_sigma2, made[6], 7, 20.0))
kernels.sample_gradients(weight, log_sigma2, grad, *made[7:9], 1.0, 7, 20.0)
kernels.add_noise(mean, variance, noise)
print([hashlib.sha256(array.tobytes()).hexdigest() for array in (*made, mean, noise, np.array(kl))])
"""


@pytest.mark.slow
def test_kernels_compiled_now_and_loaded_from_the_cache_give_the_same_numbers(tmp_path):
    """A run that is cut off goes on in another process, which does not compile any more."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILED]
    compiled, loaded = (subprocess.check_output(command, env=environment, text=True) for _ in range(2))
    assert any(tmp_path.rglob("*.nbc"))
    assert compiled == loaded
