"""Training on a GPU: its kernels and its captured steps. Without one, the kernels run in Triton's interpreter."""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional

from vdbench import training
from vdbench.config import DenseRecipe, VariationalRecipe
from vdbench.conversion import to_variational_dropout
from vdbench.language import RNNLM, OneHotRNNLM
from vdbench.models import VGGLike, set_dropout
from vdbench.posterior import Posterior
from vdbench.steps import Step, build_optimizer, set_learning_rates
from vdbench.tasks import LanguageModelling
from vdbench.text import Text

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("runs in the process of test_kernels_in_the_interpreter")
    from vdbench import gpu_kernels

    return gpu_kernels


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels' own tests run in this process")
def test_kernels_in_the_interpreter():
    """In a process of its own: Triton asks for the interpreter when it is first imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "10 passed" in done.stdout, done.stdout


def weights(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, log_sigma2 = (torch.randn(count, generator=generator) for _ in range(2))
    if count > 1:
        weight[0], weight[1] = 0.0, 1e-6
    return weight.to(DEVICE), (4 * log_sigma2 - 3).to(DEVICE)


@pytest.mark.parametrize("count", [1, 1024, 3000])
@pytest.mark.parametrize("alpha_limit", [20.0, float("inf")])
def test_posterior_and_its_gradients_are_those_of_torch_in_float64(kernels, count, alpha_limit):
    weight, log_sigma2 = weights(count)
    exact = [t.double().requires_grad_() for t in (weight, log_sigma2)]
    expected = Posterior.apply(*exact, alpha_limit)
    found = kernels.posterior(weight, log_sigma2, alpha_limit)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.detach(), rtol=1e-5, atol=1e-6)
    incoming = [torch.randn_like(weight), torch.randn_like(weight), torch.tensor(0.3, device=DEVICE)]
    gradients = torch.autograd.grad(expected, exact, [t.double() for t in incoming])
    for one, other in zip(
        kernels.posterior_gradients(weight, log_sigma2, *incoming, alpha_limit), gradients, strict=True
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_normal_and_drawn_again_for_its_gradient(kernels, dtype):
    count, seed = 100_000, torch.tensor([2**40 + 7], device=DEVICE)
    variance = torch.full((count,), 4.0, device=DEVICE, dtype=dtype)
    noisy = torch.zeros(count, device=DEVICE)
    kernels.add_noise(noisy, variance, seed)
    noise = noisy / 2
    for power, moment in [(1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)]:
        assert float(noise.pow(power).mean()) == pytest.approx(moment, abs=0.1)
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.02
    other = torch.zeros(count, device=DEVICE)
    kernels.add_noise(other, variance, seed + 1)
    assert abs(float((noise * other).mean())) < 0.02
    gradient = kernels.noise_gradient(torch.full_like(variance, 3.0), variance, seed)
    assert gradient.dtype == dtype
    torch.testing.assert_close(
        gradient.float(), 3.0 * noise / 4, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


def test_negative_variance_counts_as_none(kernels):
    noisy, seed = torch.ones(5, device=DEVICE), torch.tensor([1], device=DEVICE)
    kernels.add_noise(noisy, torch.full((5,), -1.0, device=DEVICE), seed)
    torch.testing.assert_close(noisy, torch.ones(5, device=DEVICE), rtol=0, atol=1e-3)


def test_what_is_no_number_shows(kernels):
    weight, log_sigma2 = weights(3)
    log_sigma2[1] = float("nan")
    _, variance, kl = kernels.posterior(weight, log_sigma2, 20.0)
    assert kl.isnan() and variance[1].isnan()
    incoming = torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE), torch.ones((), device=DEVICE)
    assert kernels.posterior_gradients(weight, log_sigma2, *incoming, 20.0)[1][1].isnan()
    noisy, seed = torch.ones(3, device=DEVICE), torch.tensor([1], device=DEVICE)
    kernels.add_noise(noisy, variance, seed)
    assert noisy.isnan().tolist() == [False, True, False]


@needs_gpu
def test_layers_use_the_kernels_in_either_memory_order(monkeypatch, kernels):
    spies = {}
    for name in ("posterior", "posterior_gradients", "add_noise", "noise_gradient"):
        spies[name] = Mock(wraps=getattr(kernels, name))
        monkeypatch.setattr(kernels, name, spies[name])
    layer = to_variational_dropout(nn.Sequential(nn.Conv2d(4, 8, 3)), initial_log_sigma2=-2.0).cuda()[0]
    images = torch.randn(50, 4, 12, 12, device="cuda", requires_grad=True)
    for order in (torch.contiguous_format, torch.channels_last):
        for spy in spies.values():
            spy.reset_mock()
        layer.zero_grad()
        given = images.detach().contiguous(memory_format=order).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            out = layer(given)
        (out.float().square().sum() + layer.kl_divergence()).backward()
        assert all(spy.called for spy in spies.values())
        mean = functional.conv2d(given, layer.masked_weight(), layer.bias)
        variance = functional.conv2d(given.square(), layer.log_sigma2.exp())
        standard = ((out - mean) / variance.sqrt()).detach()
        assert float(standard.std()) == pytest.approx(1.0, abs=0.03)
        assert abs(float(standard.mean())) < 0.03
        for gradient in (layer.weight.grad, layer.log_sigma2.grad, given.grad):
            assert gradient.isfinite().all() and gradient.any()


def small_step(variational: bool, **recipe) -> Step:
    torch.manual_seed(0)
    net = VGGLike(width=1 / 16)
    set_dropout(net, 0.0)
    recipe = (VariationalRecipe if variational else DenseRecipe)(epochs=1, **recipe)
    if variational:
        to_variational_dropout(net, initial_log_sigma2=-30.0)  # noise too small to matter
    net = net.to("cuda", memory_format=torch.channels_last).train()
    step = Step(net, build_optimizer(net, recipe), recipe, functional.cross_entropy, variational)
    step.kl_scale.fill_(1e-6)
    return step


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(100, 3, 32, 32, generator=generator), torch.randint(10, (100,), generator=generator)
    return images.cuda(), labels.cuda()


def movement(captured: bool, variational: bool, **recipe) -> dict[str, torch.Tensor]:
    """How far every parameter goes from the fourth step, the first that is replayed, to the eighth, and the losses."""
    step, (images, labels) = small_step(variational, **recipe), batch()
    losses = []
    for number in range(8):
        set_learning_rates(step.optimizer, [1e-3] * len(step.optimizer.param_groups))
        if number == 3:
            before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
        step.totals.zero_()
        step((images,), labels) if captured else step.take((images,), labels)
        losses.append(step.totals.clone())
    moved = {name: p.detach() - before[name] for name, p in step.model.named_parameters()}
    return moved | {"losses": torch.stack(losses)[:, 0], "divergences": torch.stack(losses)[:, 1]}


@needs_gpu
@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_captured_steps_are_those_taken_one_by_one(variational, clip):
    found, expected = (movement(captured, variational, gradient_clip=clip) for captured in (True, False))
    assert float(found["losses"][7]) < 0.9 * float(found["losses"][3])  # a step that changes nothing would not
    for name in ("conv1_1.weight", "conv5_3.weight", "fc2.weight", "bn3_1.weight", "losses"):
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert expected[name].norm() > 0 and error < 0.1, name
    if variational:
        if clip is None:  # clipped, its steps are smaller than float32 resolves at -30
            assert found["fc2.log_sigma2"].norm() > 0
        torch.testing.assert_close(found["divergences"], expected["divergences"], rtol=1e-3, atol=0)


@needs_gpu
def test_captured_step_takes_the_rates_set_after_its_capture_and_other_shapes_go_without():
    step, (images, labels) = small_step(False), batch()
    for _ in range(5):
        step((images,), labels)
    before = step.model.fc2.weight.detach().clone()
    step((images,), labels)
    assert not torch.equal(step.model.fc2.weight, before)
    set_learning_rates(step.optimizer, [0.0])
    before = step.model.fc2.weight.detach().clone()
    step((images,), labels)
    assert torch.equal(step.model.fc2.weight, before)
    set_learning_rates(step.optimizer, [1e-3])
    step((images[:50],), labels[:50])
    assert not torch.equal(step.model.fc2.weight, before)
    before = step.model.fc2.weight.detach().clone()
    step((images,), labels)
    assert not torch.equal(step.model.fc2.weight, before)


LANGUAGE_MODELS = {
    "lstm": lambda dropout=0.0: RNNLM(50, nn.LSTM, units=16, dropout=dropout),
    "tanh": lambda: RNNLM(50, nn.RNN, units=16, dropout=0.0),
    "onehot": lambda: OneHotRNNLM(50, units=16),
}


def read_text(captured: bool, model: str, variational: bool) -> tuple[nn.Module, list[float], int]:
    """A small language model after two epochs of a text whose last piece is short, its losses, and how many steps were
    replayed."""
    words = torch.randint(50, (10 * 73 + 1,), generator=torch.Generator().manual_seed(1)).cuda()
    torch.manual_seed(0)
    net = LANGUAGE_MODELS[model]()
    recipe = (VariationalRecipe if variational else DenseRecipe)(
        epochs=2, batch_size=10, sequence_length=10, learning_rate=1e-2, gradient_clip=1.0, matmul_precision="highest"
    )
    if variational:
        to_variational_dropout(net, initial_log_sigma2=-30.0)
    net = net.cuda().train()
    work = LanguageModelling(Text("t", words, words, [str(n) for n in range(50)]), recipe)
    step = Step(net, build_optimizer(net, recipe), recipe, work.loss, variational)
    step.kl_scale.fill_(1e-6)
    losses, replayed = [], 0
    for epoch in range(2):
        for inputs, targets in work.batches(epoch):
            step.totals.zero_()
            replayed += step.replays(inputs, targets)
            step(inputs, targets) if captured else step.take(inputs, targets)
            losses.append(float(step.totals[0]))
    return net, losses, replayed


@needs_gpu
@pytest.mark.parametrize("model", LANGUAGE_MODELS)
@pytest.mark.parametrize("variational", [False, True])
def test_captured_steps_carry_the_state_of_a_text(model, variational):
    (found, losses, replayed), (expected, others, _) = (read_text(c, model, variational) for c in (True, False))
    assert replayed == 3 + 7  # not the four before the capture's end, nor the short piece of either epoch
    assert losses == pytest.approx(others, rel=1e-3)
    assert losses[-1] < losses[0]
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-3)


@needs_gpu
def test_noise_of_captured_steps_is_fresh_in_each():
    net = to_variational_dropout(nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), initial_log_sigma2=0.0).cuda()
    recipe = VariationalRecipe(epochs=1)
    step = Step(net, build_optimizer(net, recipe), recipe, functional.cross_entropy, True)
    set_learning_rates(step.optimizer, [0.0, 0.0])
    images, labels = torch.randn(100, 12, device="cuda"), torch.randint(10, (100,), device="cuda")
    losses = []
    for _ in range(8):
        before = step.totals.clone()
        step((images,), labels)
        losses.append(float((step.totals - before)[0]))
    assert len(set(losses)) == 8


@needs_gpu
def test_dropout_of_captured_steps_is_fresh_in_each():
    """Between recurrent layers it is cuDNN's own."""
    net, recipe = LANGUAGE_MODELS["lstm"](dropout=0.5).cuda().train(), DenseRecipe(epochs=1)
    step = Step(
        net, build_optimizer(net, recipe), recipe, lambda out, y: functional.cross_entropy(out[0][:, 0], y), False
    )
    set_learning_rates(step.optimizer, [0.0])
    words, losses = torch.randint(50, (11, 1), device="cuda"), []
    state = tuple(torch.zeros(2, 1, 16, device="cuda") for _ in range(2))
    for _ in range(8):
        step.totals.zero_()
        step((words[:-1], state), words[1:, 0])
        losses.append(float(step.totals[0]))
    assert step.replays((words[:-1], state), words[1:, 0]) and len(set(losses)) == 8


class Stop(Exception):
    pass


@needs_gpu
@pytest.mark.parametrize("method", ["dense", "vd_warmup", "magnitude"])
def test_training_resumes_on_a_gpu(method, tmp_path, monkeypatch):
    data = tiny.dataset()
    inputs = {}
    if method == "magnitude":
        tiny.train(tiny.spec("dense"), tmp_path / "dense", data)
        inputs = {"pretrained": tmp_path / "dense/weights.pt", "matched": tiny.matched(tmp_path / "prune.json")}
    spec = tiny.spec(method, epochs=4)
    whole = training.train(spec, suite="tiny", output=tmp_path / "whole", data=data, **inputs)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)

    def stop(progress):
        if progress["epoch"] == 3:
            raise Stop

    with pytest.raises(Stop):
        training.train(spec, suite="tiny", output=tmp_path / "cut", data=data, report=stop, **inputs)
    cut = training.train(spec, suite="tiny", output=tmp_path / "cut", data=data, **inputs)
    assert cut.status == whole.status == "ok"
    assert cut.provenance.device == torch.cuda.get_device_name()
    assert cut.metrics["class_loss"] == pytest.approx(whole.metrics["class_loss"], rel=0.1)
