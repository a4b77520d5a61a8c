"""The fused cross-entropy of language models, against torch's in float64."""

import math

import pytest
import torch
from torch.nn import functional

from vdbench.cross_entropy import cross_entropy


def made(rows: int, columns: int, spread: float = 5.0):
    torch.manual_seed(rows)
    return (spread * torch.randn(rows, columns)).requires_grad_(), torch.randint(columns, (rows,))


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (5, 64), (2, 129), (40, 1000), (9, 10_000)])
@pytest.mark.parametrize("spread", [0.0, 5.0, 300.0])
def test_loss_and_gradient_are_torchs(rows, columns, spread):
    leaf, targets = made(rows, columns, spread)
    expected = functional.cross_entropy(leaf.double(), targets)
    (of_expected,) = torch.autograd.grad(expected, leaf)
    loss = cross_entropy(leaf * 1, targets)
    (gradient,) = torch.autograd.grad(0.7 * loss, leaf)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, 0.7 * of_expected, rtol=1e-5, atol=1e-7 / rows)


def test_it_passes_gradients_on():
    """Through the layer that made the logits, as in a language model, sequences times words by classes."""
    torch.manual_seed(0)
    hidden, layer, targets = torch.randn(5, 4, 8), torch.nn.Linear(8, 30), torch.randint(30, (20,))
    gradients = [
        torch.autograd.grad(function(layer(hidden).flatten(0, 1), targets), list(layer.parameters()))
        for function in (cross_entropy, functional.cross_entropy)
    ]
    for ours, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 64, 129])
def test_what_is_no_number_shows(bad, place):
    leaf, targets = made(4, 130)
    leaf.data[1, place] = bad
    assert not cross_entropy(leaf * 1, targets).isfinite()


def test_who_still_needs_the_logits_is_told():
    leaf, targets = made(3, 7)
    logits = leaf * 1
    other = logits.square().sum()
    cross_entropy(logits, targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_a_second_time_through_the_same_graph_is_refused():
    leaf, targets = made(4, 6)
    loss = cross_entropy(leaf * 1, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_where_nothing_is_differentiated_the_logits_stay():
    leaf, targets = made(3, 7)
    logits = leaf.detach().clone()
    assert torch.equal(cross_entropy(logits, targets), functional.cross_entropy(leaf.detach(), targets))
    assert torch.equal(logits, leaf)


def test_other_types_are_torchs():
    leaf, targets = made(3, 7)
    assert torch.equal(cross_entropy(leaf.double(), targets), functional.cross_entropy(leaf.double(), targets))


@pytest.mark.parametrize("wrong, error", [([0, 7, 1], IndexError), ([0, -100, 1], IndexError), ([0, 1], ValueError)])
def test_targets_that_are_no_classes_are_refused(wrong, error):
    leaf, _ = made(3, 7)
    with pytest.raises(error, match="targets"):
        cross_entropy(leaf * 1, torch.tensor(wrong))


def test_logits_in_another_memory_order_are_torchs():
    leaf, targets = made(3, 7)
    turned = leaf.detach().t().contiguous().t().requires_grad_()
    assert torch.equal(cross_entropy(turned * 1, targets), functional.cross_entropy(turned, targets))
