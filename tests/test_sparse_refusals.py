"""Models and examples that are not traced, and what is said of them."""

import threading

import numpy as np
import pytest
import torch
from sparse_net import Calls
from torch import Tensor, nn
from torch.nn import functional as F

from vdbench.sparse.checks import Refused, Untraceable
from vdbench.sparse.tracing import trace


def test_examples_that_are_none():
    net = nn.Linear(6, 3).eval()
    with pytest.raises(TypeError, match=r"the example is a ndarray: give a float32 tensor"):
        trace(net, np.zeros((1, 6), np.float32))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"of torch.int64: .*; models of numbered words go to to_cpu_sparse"):
        trace(nn.Embedding(5, 3), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"tensor of torch.float64: give a float32 tensor"):
        trace(net, torch.zeros(1, 6).double())
    with pytest.raises(ValueError, match=r"the example of shape \(6,\) has no batch axis: add one with \[None\]"):
        trace(net, torch.zeros(6))
    with pytest.raises(Refused, match=r"examples of shape \(0, 6\) have no numbers"):
        trace(net, torch.zeros(2, 0, 6))


def test_a_model_in_training_mode():
    net = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"Sequential is in training mode: call model.eval\(\)"):
        trace(net, torch.zeros(1, 6))
    net.eval()[1].train()
    with pytest.raises(ValueError, match=r"1 is in training mode: call model.eval\(\)"):
        trace(net, torch.zeros(1, 6))


@pytest.mark.parametrize("move", [{"dtype": torch.float64}, {"device": "meta"}])
def test_parameters_elsewhere(move):
    net = nn.Sequential(nn.Linear(6, 3)).eval().to(**move)
    with pytest.raises(
        ValueError, match=r"0.weight is torch.float\d\d on (cpu|meta): move the model with .cpu\(\).float"
    ):
        trace(net, torch.zeros(1, 6))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_no_numbers(number):
    net = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).eval()
    with torch.no_grad():
        net[1].running_mean[0] = number
    with pytest.raises(ValueError, match=r"layer 1 holds NaN or infinity"):
        trace(net, torch.zeros(1, 6))
    with torch.no_grad():
        net[1].running_mean[0], net[1].running_var[0] = 0, -1
    with pytest.raises(ValueError, match=r"layer 1 has a negative variance"):
        trace(net, torch.zeros(1, 6))
    with torch.no_grad():
        net[0].bias[1] = number
    with pytest.raises(ValueError, match=r"0.bias holds NaN or infinity"):
        trace(net, torch.zeros(1, 6))


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (TwoInputs(), "does not take 1 and 2 examples of shape \\(6,\\).*missing 1 required positional"),
        (nn.Linear(5, 3), "does not take 1 and 2 examples of shape \\(6,\\): mat1 and mat2"),
        (Calls(lambda x: (x, x)), "returns a tuple, not one float32 tensor"),
        (Calls(lambda x: x > 0), "returns a tensor of torch.bool, not one float32 tensor"),
        (Calls(lambda x: x.mean()), "is not one an example"),
        (Calls(lambda x: x[:, :1].squeeze()), "is not one an example"),
        (Calls(lambda x: x - x.mean(0)), "depends on the rest of the batch, or on chance"),
        (Calls(lambda x: F.softmax(x, dim=0)), "depends on the rest of the batch"),
        (Calls(lambda x: x / x.shape[0]), "depends on the rest of the batch"),
        (nn.BatchNorm1d(6, track_running_stats=False), "does not take 1 and 2|depends on the rest"),
        (Calls(lambda x: F.dropout(x)), "depends on the rest of the batch, or on chance"),
        (Calls(lambda x: x if x.sum() > 0 else -x), "torch.fx cannot follow Calls: symbolically traced variables"),
        (
            Calls(lambda x: (y := x * 2, y.view(-1, 2, 3).clamp_(-9, 9), y)[2]),
            "clamp_ overwrites mul, of which it has a",
        ),
        (Calls(lambda x: x * (2 if isinstance(x, Tensor) else 3)), "do not compute what the model computes"),
        (
            Calls(lambda x: x if isinstance(x, Tensor) else x.view(7, 5)),
            "the traced operations fail for 2 and 3 examples",
        ),
        (Calls(lambda x, w: x if isinstance(x, Tensor) else w, w=torch.ones(6)), "output does not depend on its input"),
        (Calls(lambda x: torch.ones(2, 3)[: x.shape[0]] * 1 if x.shape[1] == 6 else x), "torch.fx cannot follow"),
    ],
)
def test_models_that_are_no_operations_on_single_examples(model, reason):
    with pytest.raises(Untraceable, match=reason) as caught:
        trace(model.eval(), torch.zeros(2, 6))
    assert "\n" not in str(caught.value)


def test_results_too_large_for_float32():
    with pytest.raises(Untraceable, match="gives NaN or infinity for normally distributed examples"):
        trace(Calls(lambda x: x.exp() * 1e38).eval(), torch.zeros(2, 6))


def test_what_other_threads_call_meanwhile_is_not_the_models():
    other, given, made = nn.Linear(3, 4).eval(), torch.randn(1, 3), []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            caller = threading.Thread(target=lambda: made.append((other(given), self.layer(given))))
            caller.start()
            caller.join()
            return self.layer(x)

    model = Model().eval()
    graph = trace(model, torch.zeros(1, 3))
    assert [type(op).__name__ for op in graph.ops] == ["Input", "Linear"]
    assert len(made) > 3
    for results in made:
        assert torch.equal(results[0], other(given)) and torch.equal(results[1], model.layer(given))
