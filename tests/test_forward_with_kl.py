"""The KL divergence from the forward pass: that of the model, with its gradient, and no longer than the pass."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vdbench import variational
from vdbench.conversion import to_variational_dropout
from vdbench.variational import forward_with_kl, kl_divergence


class Branches(nn.Module):
    """Uses one layer twice, one once and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.unused = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.head(self.shared(self.shared(x).relu())) * scale


def gradients_of_both_ways(model: nn.Module, *inputs: object) -> None:
    model.zero_grad()
    torch.manual_seed(0)
    output, kl = forward_with_kl(model, *inputs)
    (output.square().mean() + 0.1 * kl).backward()
    got = {name: p.grad for name, p in model.named_parameters()}

    model.zero_grad()  # to None, so that the gradients in hand stay
    torch.manual_seed(0)
    expected_output, expected = model(*inputs), kl_divergence(model)
    (expected_output.square().mean() + 0.1 * expected).backward()
    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close(kl, expected)
    for name, p in model.named_parameters():
        assert (got[name] is None) == (p.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_of_the_forward_pass_is_that_of_the_model(dtype):
    model = to_variational_dropout(Branches()).to(dtype)
    x = torch.randn(6, 4, dtype=dtype)
    gradients_of_both_ways(model, x, 2.0)
    model.head.eval()  # deterministic layers count too
    gradients_of_both_ways(model, x)


def test_the_forward_pass_takes_names():
    lstm = to_variational_dropout(nn.LSTM(3, 4))
    state = (torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    torch.manual_seed(0)
    expected = lstm(torch.ones(5, 2, 3), state)[0]
    torch.manual_seed(0)
    (output, _), kl = variational.forward_with_kl(lstm, torch.ones(5, 2, 3), hx=state)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(kl, lstm.kl_divergence())


def test_kl_of_the_forward_pass_is_not_remembered():
    model = to_variational_dropout(nn.Sequential(nn.Linear(4, 2)))
    x = torch.ones(1, 4)
    first = forward_with_kl(model, x)[1]
    nn.init.constant_(model[0].log_sigma2, -2.0)
    model(x)
    second = forward_with_kl(model, x)[1]
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, kl_divergence(model))


def test_kl_of_the_forward_pass_ends_with_a_failed_one():
    model = to_variational_dropout(nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(RuntimeError, match="shape"):
        forward_with_kl(model, torch.ones(1, 5))
    assert variational._collected.get() is None  # later passes add to no sum, and no graph is kept alive
    torch.testing.assert_close(forward_with_kl(model, torch.ones(1, 4))[1], kl_divergence(model))


class WithoutGradient(nn.Module):
    """A frozen part of a model, as many write it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.inner(x)


class Checkpointed(WithoutGradient):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=True)


@pytest.mark.parametrize("wrapper", [WithoutGradient, Checkpointed])
def test_kl_has_its_gradient_where_the_forward_pass_had_none(wrapper):
    model = to_variational_dropout(nn.Sequential(wrapper(nn.Linear(4, 4)), nn.Linear(4, 2)))
    gradients_of_both_ways(model, torch.randn(6, 4, requires_grad=True))
