"""Metrics against numbers worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vdbench import metrics
from vdbench.conversion import to_variational_dropout
from vdbench.models import LeNet5, LeNet300100
from vdbench.variational import variational_layers

LENET5_MULTIPLY_ADDS = {
    "conv1": 20 * 1 * 5 * 5 * 24 * 24,
    "conv2": 50 * 20 * 5 * 5 * 8 * 8,
    "fc1": 500 * 800,
    "fc2": 10 * 500,
}
IMAGE = torch.zeros(1, 1, 28, 28)


@pytest.fixture(autouse=True)
def seed():
    """One net in forty has a weight that is 0 by chance."""
    torch.manual_seed(0)


def test_multiply_adds_of_the_dense_nets():
    assert metrics.multiply_adds(LeNet300100(), IMAGE).dense == 784 * 300 + 300 * 100 + 100 * 10
    counted = metrics.multiply_adds(LeNet5(), IMAGE)
    assert counted.dense == counted.left == sum(LENET5_MULTIPLY_ADDS.values()) == 2_293_000
    assert counted.theoretical_speedup == 1.0


@pytest.mark.parametrize("layer", LENET5_MULTIPLY_ADDS)
def test_multiply_adds_left_are_those_of_nonzero_weights(layer):
    """Half the weights of one layer are removed: half of that layer's multiply-adds are saved."""
    model = LeNet5()
    weight = model.get_submodule(layer).weight
    with torch.no_grad():
        weight.fill_(1.0)
        weight[: len(weight) // 2] = 0.0
    counted = metrics.multiply_adds(model, IMAGE)
    assert counted.dense - counted.left == LENET5_MULTIPLY_ADDS[layer] // 2
    assert counted.theoretical_speedup == counted.dense / counted.left


def test_multiply_adds_know_stride_padding_groups_and_sequences():
    strided = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2))
    assert metrics.multiply_adds(strided, torch.zeros(1, 4, 8, 8)).dense == (6 * 2 * 3 * 3) * 4 * 4
    assert metrics.multiply_adds(nn.Sequential(nn.Linear(5, 7)), torch.zeros(1, 11, 5)).dense == 5 * 7 * 11


def test_multiply_adds_count_a_layer_as_often_as_it_is_used():
    shared = nn.Linear(4, 4)
    assert metrics.multiply_adds(nn.Sequential(shared, shared), torch.zeros(1, 4)).dense == 32


def test_multiply_adds_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics.multiply_adds(model, torch.ones(1, 4))
    assert model.training
    assert not model[0]._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def some_removed(model: nn.Module) -> nn.Module:
    """A variational net whose weights are removed where their value is even, each weight its own number."""
    to_variational_dropout(model)
    with torch.no_grad():
        for _, layer in variational_layers(model):
            layer.weight.copy_(torch.arange(1.0, layer.weight.numel() + 1).view_as(layer.weight))
            layer.log_sigma2.copy_((layer.weight % 2 == 0) * 100.0 - 50)
    return model


def test_a_model_without_weights_has_no_sparsity():
    with pytest.raises(ValueError, match="ReLU has no linear, convolutional, embedding or recurrent layer"):
        metrics.sparsity(nn.ReLU())


def test_size_counts_weights_that_eval_mode_uses_and_nothing_else():
    counted = metrics.size(some_removed(LeNet5()))
    assert counted.weights == 430_500
    assert counted.nonzero_weights == 430_500 // 2
    assert (counted.sparsity, counted.compression_ratio) == (0.5, 2.0)
    assert counted.biases == 20 + 50 + 500 + 10


def test_layers_that_stay_dense_count_if_they_are_of_the_kinds_that_are_counted():
    """As the README says: `nn.GRU` and subclasses do, here attention's last layer; its other weights do not."""
    parts = {"linear": nn.Linear(4, 4), "gru": nn.GRU(4, 4), "attention": nn.MultiheadAttention(4, 2)}
    model = to_variational_dropout(nn.ModuleDict(parts | {"conv1d": nn.Conv1d(4, 4, 3)}))
    names = [layer.name for layer in metrics.layers(model)]
    assert names == ["linear", "gru.weight_ih_l0", "gru.weight_hh_l0", "attention.out_proj"]


def test_layers_are_counted_one_by_one():
    model = some_removed(LeNet5())
    with torch.no_grad():
        model.conv1.log_sigma2.fill_(50.0)
    assert [(layer.name, layer.shape, layer.nonzero, layer.sparsity) for layer in metrics.layers(model)] == [
        ("conv1", [20, 1, 5, 5], 0, 1.0),
        ("conv2", [50, 20, 5, 5], 12_500, 0.5),
        ("fc1", [500, 800], 200_000, 0.5),
        ("fc2", [10, 500], 2_500, 0.5),
    ]
    assert metrics.sparsity(model) == pytest.approx(1 - 215_000 / 430_500)


def test_plain_net_is_as_sparse_as_its_zeros():
    layer = nn.Linear(4, 5)
    with torch.no_grad():
        layer.weight.fill_(1.0)[0] = 0.0
        layer.bias.zero_()  # biases are never weights
    assert metrics.sparsity(layer) == pytest.approx(0.2)
    assert metrics.size(layer).biases == 5


def test_weights_that_layers_share_count_once():
    model = nn.ModuleDict({"words": nn.Embedding(20, 8), "hidden": nn.Linear(8, 8), "output": nn.Linear(8, 20)})
    model["output"].weight = model["words"].weight
    size = metrics.size(model)
    assert (size.weights, size.biases) == (20 * 8 + 8 * 8, 8 + 20)
    assert [layer.name for layer in metrics.layers(model)] == ["words", "hidden"]


def test_net_without_weights_left_has_a_finite_compression():
    layer = nn.Linear(4, 5)
    nn.init.zeros_(layer.weight)
    assert metrics.size(layer).compression_ratio == 20
    assert metrics.multiply_adds(layer, torch.zeros(1, 4)).theoretical_speedup == 20


@given(st.integers(1, 10**9), st.data())
def test_compression_and_sparsity_say_the_same(total, draw):
    nonzero = draw.draw(st.integers(1, total))
    assert metrics.compression_ratio(total, nonzero) == pytest.approx(1 / (nonzero / total))


class Table(nn.Module):
    """A classifier whose logits are its inputs, at most `limit` images a call."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, input):
        self.batches.append(len(input))
        assert not self.training
        return input.flatten(1)


def ranked(*places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose label is the n-th most likely of ten classes, and the labels."""
    labels = torch.arange(len(places)) % 10
    logits = torch.stack([(torch.arange(10.0) - label).remainder(10).neg() for label in labels])  # its label on top
    for row, label, place in zip(logits, labels, places, strict=True):
        row[label] -= place - 0.5
    return logits.view(len(places), 1, 1, 10), labels


def test_error_counts_wrong_first_guesses_and_top5_labels_out_of_five():
    images, labels = ranked(1, 1, 1, 1, 2, 3, 5, 6, 8, 10)
    evaluated = metrics.evaluate(Table(), images, labels)
    assert evaluated["error"] == 60.0
    assert evaluated["top5_error"] == 30.0
    log_softmax = images.flatten(1).double().log_softmax(1)
    assert evaluated["cross_entropy"] == pytest.approx(-float(log_softmax[torch.arange(10), labels].mean()), rel=1e-6)


def test_evaluation_in_batches_is_that_of_the_whole(monkeypatch):
    images, labels = ranked(1, 2, 6, 1, 9, 5, 1)
    whole = metrics.evaluate(Table(), images, labels)
    monkeypatch.setattr(metrics, "EVALUATION_BATCH", 3)
    model = Table()
    assert metrics.evaluate(model, images, labels) == pytest.approx(whole)
    assert model.batches == [3, 3, 1]


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_training_mode_and_needs_no_gradients(training):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(10, 10)).train(training)
    images, labels = ranked(1, 2, 3)
    results = [metrics.evaluate(model, images, labels) for _ in range(2)]
    assert results[0] == results[1]  # dropout was off
    assert [module.training for module in model.modules()] == [training] * 4
    assert all(parameter.grad is None for parameter in model.parameters())
