"""Statistics of batch normalisation are those of the net that is evaluated."""

import copy

import pytest
import tiny
import torch
from test_vgg import toy
from torch import nn

from vdbench import batchnorm, metrics, pruning
from vdbench.batchnorm import reestimate
from vdbench.conversion import to_variational_dropout
from vdbench.models import LeNet5
from vdbench.tasks import Classification


def net() -> nn.Sequential:
    """Batch normalisation behind dropout and behind a variational layer, with statistics as training leaves them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 20), nn.BatchNorm1d(20))
    model.append(nn.Linear(20, 10))
    to_variational_dropout(model, initial_log_sigma2=-9.0)
    with torch.no_grad():
        model(torch.randn(50, 3, 32, 32))
    return model


def test_statistics_are_those_of_what_evaluation_computes() -> None:
    model, data = net(), toy(150, 50)
    reestimate(model, data)
    images, _ = data.train_batch(torch.arange(150))
    model.eval()
    for layer, inputs in ((model[1], images), (model[4], model[:4](images))):
        variance, mean = torch.var_mean(inputs, [d for d in range(inputs.ndim) if d != 1])
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_var, variance, rtol=1e-3, atol=1e-5)


def test_they_do_not_depend_on_what_was_there_and_nothing_else_changes() -> None:
    model, data = net(), toy(150, 50)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[4].running_mean += 5
    model[3].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    parameters = {name: value.clone() for name, value in model.named_parameters()}
    state = torch.get_rng_state()
    for each in (model, other):
        reestimate(each, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, parameters[name]) for name, value in model.named_parameters())
    assert model[4].momentum == 0.1
    for name, value in model.named_buffers():
        assert torch.equal(value, other.get_buffer(name)), name


def test_a_mixture_of_at_most_so_many_images_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = net(), toy(150, 50)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    monkeypatch.setattr(batchnorm, "EXAMPLES", 90)
    monkeypatch.setattr(batchnorm, "EVALUATION_BATCH", 40)
    reestimate(model, data)
    assert seen == [30, 30, 30]


def test_every_image_counts_alike_in_the_last_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 10)), toy(102, 10)
    monkeypatch.setattr(batchnorm, "EVALUATION_BATCH", 100)
    data.train_images[torch.randperm(102, generator=torch.Generator().manual_seed(batchnorm._SEED))[100:]] += 1000
    reestimate(model, data)
    mean = data.train_batch(torch.arange(102))[0].mean((0, 2, 3))
    torch.testing.assert_close(model[0].running_mean, mean, rtol=1e-4, atol=1e-4)


def test_a_failure_leaves_training_as_it_was() -> None:
    model = net()
    momenta = [layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d)]
    handle = model.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reestimate(model, toy(20, 10))
    handle.remove()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert [layer.momentum for layer in layers] == momenta and all(layer.training for layer in layers)


def test_a_net_without_them_is_not_even_run() -> None:
    model = LeNet5()
    model.register_forward_pre_hook(lambda module, args: pytest.fail("was run"))
    reestimate(model, toy(20, 10))


def test_what_the_error_is_with_the_running_averages_is_told_too() -> None:
    model, data = net(), toy(150, 50)
    with torch.no_grad():
        model[4].running_mean += 5
    before = metrics.evaluate(model, data.eval_images, data.eval_labels)["error"]
    evaluated = Classification(data, tiny.spec("dense")).evaluate(model)
    assert evaluated["error_running_averages"] == before != evaluated["error"]
    assert evaluated["error"] == metrics.evaluate(model, data.eval_images, data.eval_labels)["error"]
    plain = Classification(data, tiny.spec("dense")).evaluate(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    assert "error_running_averages" not in plain


def test_the_trade_off_has_its_own_at_each_threshold_and_leaves_those_that_were_there() -> None:
    model, data = net(), toy(150, 50)
    reestimate(model, data)
    before = {name: value.clone() for name, value in model.named_buffers()}
    points = {point.threshold: point.error for point in pruning.trade_off(model, data)}
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    model[3].loga_threshold = model[5].loga_threshold = -1.0
    reestimate(model, data)
    assert metrics.evaluate(model, data.eval_images, data.eval_labels)["error"] == points[-1.0]
