"""A step: its loss, rates, precision and what it leads to."""

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

from vdbench import history, schedules, tasks, training
from vdbench.config import VariationalRecipe
from vdbench.conversion import to_variational_dropout
from vdbench.models import LeNet300100
from vdbench.steps import build_optimizer
from vdbench.variational import kl_divergence, variational_layers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_step_is_adam_on_cross_entropy_plus_kl_over_the_training_set(beta, tmp_path):
    data = tiny.dataset(train=250)  # the incomplete third batch is dropped, and still counts in num_examples
    spec = tiny.spec("vd_warmup", epochs=1, kl_warmup_epochs=0, final_kl_weight=beta, initial_log_sigma2=-8)
    tiny.train(spec, tmp_path, data)

    model = training.build_model(spec, 10, None).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.randperm(250, generator=torch.Generator().manual_seed(schedules.derived_seed(0, "order", 0)))
    with torch.random.fork_rng():
        torch.manual_seed(schedules.derived_seed(0, "noise", 0))
        for batch in order[:200].split(100):
            class_loss = functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            (class_loss + beta * kl_divergence(model) / 250).backward()
            optimizer.step()
    for name, value in tiny.weights(tmp_path).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("asked", "expected"), [(None, "highest"), ("medium", "medium")])
def test_matrices_are_multiplied_as_the_recipe_says_in_training_alone(asked, expected, data, tmp_path, monkeypatch):
    found = {"step": set(), "evaluation": set()}
    for owner, name, key in [(torch.optim.Adam, "step", "step"), (tasks.Classification, "evaluate", "evaluation")]:
        original = getattr(owner, name)

        def spied(*args, original=original, key=key, **kwargs):
            found[key].add(torch.get_float32_matmul_precision())
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spied)
    tiny.train(tiny.spec("dense", epochs=1, matmul_precision=asked), tmp_path, data)
    assert found == {"step": {expected}, "evaluation": {"highest"}}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_gradients_are_clipped_to_the_norm_that_the_recipe_allows(clip, tmp_path, monkeypatch):
    """That of all parameters together, log_sigma2 among them."""
    norms = {}
    for limit in (None, clip):
        found = norms.setdefault(limit, [])

        def step(self, found=found):
            found.append(float(torch.nn.utils.get_total_norm(p.grad for g in self.param_groups for p in g["params"])))

        monkeypatch.setattr(torch.optim.Adam, "step", step)
        spec = tiny.spec("vd_warmup", epochs=1, kl_warmup_epochs=0, gradient_clip=limit)
        tiny.train(spec, tmp_path / str(limit), tiny.dataset(train=200))
    assert len(norms[clip]) == 2 and min(norms[None]) > 0.02
    assert norms[clip] == pytest.approx([0.01] * 2 if clip == 0.01 else norms[None], rel=1e-4)


def test_weight_decay_never_touches_log_sigma2():
    model = to_variational_dropout(LeNet300100())
    optimizer = build_optimizer(model, VariationalRecipe(epochs=1, weight_decay=0.1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.endswith("log_sigma2"), name


def test_every_parameter_is_optimised_once():
    model = to_variational_dropout(LeNet300100())
    optimizer = build_optimizer(model, VariationalRecipe(epochs=1))
    optimised = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(optimised) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize(("own", "expected"), [(None, 1e-3), (5e-2, 5e-2)])
def test_log_sigma2_has_a_rate_of_its_own(own, expected, tmp_path):
    """Adam's first step moves a parameter by the learning rate, whatever its gradient."""
    spec = tiny.spec("vd_warmup", epochs=1, kl_warmup_epochs=0, log_sigma2_learning_rate=own)
    tiny.train(spec, tmp_path, tiny.dataset(train=100))
    before, after = training.build_model(spec, 10, None).state_dict(), tiny.weights(tmp_path)
    moved = {name: float((after[name] - before[name]).abs().median()) for name in after}
    for name, distance in moved.items():
        assert distance == pytest.approx(expected if name.endswith("log_sigma2") else 1e-3, rel=0.05), name


def test_rate_of_log_sigma2_follows_the_schedule(tmp_path, monkeypatch):
    rates = []
    real_step = torch.optim.Adam.step

    def step(self):
        rates.append([group["lr"] for group in self.param_groups])
        return real_step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    spec = tiny.spec("vd_warmup", epochs=4, constant_epochs=2, log_sigma2_learning_rate=1e-2)
    tiny.train(spec, tmp_path, tiny.dataset(train=100))
    np.testing.assert_allclose(rates, [[1e-3, 1e-2], [1e-3, 1e-2], [1e-3, 1e-2], [5e-4, 5e-3]])


def test_recipe_reaches_the_layers():
    spec = tiny.spec("vd_warmup", threshold=1.5, initial_log_sigma2=-4.0, mask_in_training=False)
    for _, layer in variational_layers(training.build_model(spec, 10, None)):
        assert (layer.loga_threshold, layer.mask_in_training) == (1.5, False)
        assert bool((layer.log_sigma2 == -4.0).all())


@pytest.mark.parametrize("model", ["lenet300100", "lenet5"])
def test_training_learns(model, data, tmp_path):
    spec = tiny.spec("dense", model, epochs=5, learning_rate=2e-3)
    assert tiny.train(spec, tmp_path, data).metrics["error"] < 5  # 90 by chance


def test_variational_dropout_makes_the_net_sparse_and_keeps_it_right(tmp_path):
    spec = tiny.spec("vd_warmup", epochs=6, learning_rate=3e-3, kl_zero_epochs=1, kl_warmup_epochs=4)
    record = tiny.train(spec, tmp_path, tiny.dataset(train=2000))
    assert history.read(tmp_path / "history.csv")["sparsity"].iloc[-1] > 0.8
    assert record.metrics["error"] < 5
