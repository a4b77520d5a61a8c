"""The mixin: its loss, its annealing, its statistics, and that it learns a sparse net."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vdbench import VariationalDropoutChain, kl_divergence
from vdbench.sparse import SparseModule
from vdbench.variational import VariationalDropoutLinear


class Classifier(nn.Module):
    """A user's own class, with arguments of its own."""

    def __init__(self, inputs: int, hidden: int = 8, *, classes: int = 3) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x).relu())


class VariationalClassifier(VariationalDropoutChain, Classifier):
    pass


X, T = torch.linspace(-1, 1, 20).view(5, 4), torch.tensor([0, 1, 2, 1, 0])


def chain(**options: object) -> VariationalClassifier:
    torch.manual_seed(0)
    return VariationalClassifier(4, classes=3, **({"num_examples": 50} | options))


def test_the_users_class_gets_its_arguments_and_keeps_its_parameters():
    model = VariationalClassifier(4, 7, classes=2, num_examples=10, warm_up=0.5)
    assert (model.hidden.out_features, model.out.out_features) == (7, 2)
    assert (model.num_examples, model.warm_up) == (10, 0.5)
    assert set(model.state_dict()) == set(Classifier(4).state_dict())
    assert isinstance(model, Classifier)


def test_before_conversion_the_loss_is_cross_entropy():
    model = chain(num_examples=None)
    assert torch.equal(model.calc_loss(X, T), functional.cross_entropy(model(X), T))
    assert model.kl_weight == 0


def test_conversion_takes_options_and_returns_the_model():
    model = chain()
    assert model.to_variational_dropout(skip=["out"], loga_threshold=1.0) is model
    assert isinstance(model.hidden, VariationalDropoutLinear) and model.hidden.loga_threshold == 1.0
    assert type(model.out) is nn.Linear


@pytest.mark.parametrize("num_examples", [1, 50])
def test_the_loss_is_mean_cross_entropy_and_the_weighted_kl_an_example(num_examples):
    model = chain(num_examples=num_examples, warm_up=0.25).to_variational_dropout(initial_log_sigma2=-3.0)
    for step in (1, 2):
        torch.manual_seed(step)
        loss = model.calc_loss(X, T)
        torch.manual_seed(step)
        class_loss, kl = functional.cross_entropy(model(X), T), kl_divergence(model)
        torch.testing.assert_close(loss, class_loss + 0.25 * step * kl / num_examples)
        statistics = model.training_statistics()
        assert statistics["class_loss"] == pytest.approx(class_loss.item())
        assert statistics["kl"] == pytest.approx(kl.item())
        assert statistics["kl_weight"] == 0.25 * step
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    (class_loss + 0.5 * kl / num_examples).backward()
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def weights_over_steps(model: VariationalClassifier, steps: int) -> list[float]:
    weights = []
    for _ in range(steps):
        model.calc_loss(X, T)
        weights.append(model.kl_weight)
    return weights


def test_kl_weight_rises_to_1_over_training_steps_alone():
    model = chain(warm_up=0.3).to_variational_dropout()
    assert weights_over_steps(model, 2) == pytest.approx([0.3, 0.6])
    model.eval()
    assert weights_over_steps(model, 2) == pytest.approx([0.6, 0.6])
    model.train()
    assert weights_over_steps(model, 3) == pytest.approx([0.9, 1.0, 1.0])
    assert model.kl_weight == 1.0


def test_without_warm_up_the_weight_is_1_at_once():
    assert weights_over_steps(chain(warm_up=0).to_variational_dropout(), 2) == [1.0, 1.0]


def test_dense_steps_do_not_use_up_the_warm_up():
    model = chain(warm_up=0.3)
    weights_over_steps(model, 4)
    assert weights_over_steps(model.to_variational_dropout(), 1) == [0.3]


@pytest.mark.parametrize("warm_up", [-1, math.nan])
def test_a_warm_up_that_is_no_rise_is_refused(warm_up):
    with pytest.raises(ValueError, match=rf"warm_up.*{warm_up}"):
        chain(warm_up=warm_up)


@pytest.mark.parametrize("num_examples", [None, 0, -5])
def test_the_number_of_examples_is_asked_for_once_it_is_needed(num_examples):
    model = chain(num_examples=num_examples).to_variational_dropout()
    with pytest.raises(ValueError, match="num_examples"):
        model.calc_loss(X, T)
    model.num_examples = 5
    assert model.calc_loss(X, T).isfinite()


def test_statistics_of_a_layer_made_by_hand():
    """log alpha 2.97 is a rate over 0.95 but no log alpha over 3; the two thresholds are two."""
    model = VariationalDropoutChain(num_examples=1)
    model.layer = nn.Linear(4, 1)
    model.to_variational_dropout()
    with torch.no_grad():
        model.layer.weight.fill_(1.0)
        model.layer.log_sigma2.copy_(torch.tensor([[-20.0, 0.0, 2.97, 5.0]]))
    statistics = model.training_statistics()
    assert set(statistics) == {"class_loss", "kl", "kl_weight", "mean_p", "sparsity", "compression_ratio"}
    rates = [1 / (1 + math.exp(-a)) for a in (-8.0, 0.0, 2.97, 5.0)]  # log alpha is clipped at -8
    assert statistics["mean_p"] == pytest.approx(sum(rates) / 4, rel=1e-6)
    assert statistics["sparsity"] == 2 / 4
    assert statistics["compression_ratio"] == 4 / 3
    model.layer.p_threshold, model.layer.loga_threshold = 0.99, -1.0
    statistics = model.training_statistics()
    assert (statistics["sparsity"], statistics["compression_ratio"]) == (1 / 4, 4 / 1)


def test_statistics_weigh_layers_by_their_weights():
    model = chain().to_variational_dropout()
    for layer, log_sigma2 in ((model.hidden, 6.0), (model.out, -20.0)):
        nn.init.ones_(layer.weight)
        nn.init.constant_(layer.log_sigma2, log_sigma2)
    statistics = model.training_statistics()
    assert statistics["sparsity"] == pytest.approx(32 / (32 + 24))
    assert statistics["compression_ratio"] == pytest.approx((32 + 24) / 24)


def test_statistics_need_variational_layers():
    with pytest.raises(ValueError, match=r"to_variational_dropout\(\)"):
        chain().training_statistics()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_in_the_middle_of_training(clone):
    model = chain(warm_up=0.3).to_variational_dropout()
    model.calc_loss(X, T)
    other = clone(model)
    assert other.training_statistics() == model.training_statistics()
    losses = []
    for each in (model, other):
        torch.manual_seed(1)
        losses.append(each.calc_loss(X, T))
    assert torch.equal(*losses)


def test_training_lowers_the_loss_and_finds_the_inputs_that_matter():
    """Two of twenty inputs decide the class; the weights of the others go."""
    torch.manual_seed(0)
    x = torch.randn(400, 20)
    t = (x[:, 3] + x[:, 11] > 0).long()
    model = VariationalClassifier(20, 10, classes=2, num_examples=400, warm_up=1 / 200)
    model.to_variational_dropout(initial_log_sigma2=-6.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with torch.no_grad():
        first = model.calc_loss(x, t).item()
    for _ in range(450):
        optimizer.zero_grad()
        model.calc_loss(x, t).backward()
        optimizer.step()
    statistics = model.training_statistics()
    assert first > 0.6 and statistics["class_loss"] < 0.3
    assert statistics["kl_weight"] == 1.0
    assert statistics["sparsity"] > 0.7 and statistics["compression_ratio"] > 4
    kept = model.hidden.mask.sum(0)
    assert kept[3] > 0 and kept[11] > 0
    assert kept.sum() - kept[3] - kept[11] < 0.05 * 180
    fresh = torch.randn(400, 20)
    right = model.eval()(fresh).argmax(1) == (fresh[:, 3] + fresh[:, 11] > 0)
    assert right.float().mean() > 0.95


def test_to_cpu_sparse_computes_what_eval_mode_does():
    model = chain().to_variational_dropout(initial_log_sigma2=-1.0)
    sparse = model.to_cpu_sparse()
    assert isinstance(sparse, SparseModule) and isinstance(model.hidden, VariationalDropoutLinear)
    torch.testing.assert_close(sparse(X), model.eval()(X).detach(), rtol=0, atol=1e-6)
