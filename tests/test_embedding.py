"""Variational embeddings: one sample of a word, settings that are refused, and padding that has no noise."""

import pytest
import torch
from small_net import WORDS
from torch import nn

from vdbench.conversion import to_variational_dropout
from vdbench.recurrent import VariationalDropoutEmbedding
from vdbench.variational import VariationalDropoutLinear, forward_with_kl, kl_divergence


def test_a_word_has_one_sample_wherever_it_occurs():
    layer = VariationalDropoutEmbedding(5, 3, initial_log_sigma2=-1.0)
    output = layer(WORDS)
    assert torch.equal(output[0, 1], output[1, 0]) and torch.equal(output[0, 1], output[2, 1])
    assert not torch.allclose(output[0, 1], layer.weight[3], atol=1e-3)
    assert not torch.equal(output, layer(WORDS))


def test_rows_of_words_that_do_not_occur_have_the_gradients_of_the_divergence_alone():
    layer = VariationalDropoutEmbedding(6, 3, initial_log_sigma2=-1.0)
    layer.mask_in_training = False  # a removed weight would have no other gradient where its word occurs either
    output, kl = forward_with_kl(layer, WORDS)
    (output.square().sum() + kl).backward()
    found = layer.weight.grad.clone(), layer.log_sigma2.grad.clone()
    layer.zero_grad()
    kl_divergence(layer).backward()
    absent, present = [2, 5], [0, 1, 3, 4]
    for ours, divergence in zip(found, (layer.weight.grad, layer.log_sigma2.grad), strict=True):
        torch.testing.assert_close(ours[absent], divergence[absent])
        assert ((ours - divergence)[present].abs() > 1e-6).all()


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Embedding(5, 3, max_norm=1.0), "max_norm"),
        (nn.Embedding(5, 3, sparse=True), "sparse"),
        (nn.Embedding(5, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
    ],
)
def test_settings_that_make_no_sense_are_refused_and_nothing_is_changed(layer, said):
    net = nn.Sequential(nn.Linear(2, 2), layer)
    with pytest.raises(ValueError, match=f"1: a variational embedding has no {said}; change it or name it in skip"):
        to_variational_dropout(net)
    assert [type(m) for m in net] == [nn.Linear, nn.Embedding]
    to_variational_dropout(net, skip="1")
    assert type(net[0]) is VariationalDropoutLinear


def test_an_embedding_from_pretrained_weights():
    weights = torch.randn(5, 3)
    weights[1] = 0
    layer = VariationalDropoutEmbedding.from_pretrained(weights, padding_idx=-4, initial_log_sigma2=-7.0)
    plain = nn.Embedding.from_pretrained(weights, padding_idx=-4)
    assert torch.equal(layer.weight, weights) and layer.padding_idx == plain.padding_idx == 1
    assert bool((layer.log_sigma2 == -7).all()) and layer.log_sigma2.requires_grad
    assert layer.weight.requires_grad is plain.weight.requires_grad is False
    assert VariationalDropoutEmbedding.from_pretrained(weights, freeze=False).weight.requires_grad
    weights[1] = 1
    assert not layer.weight[1].any()
    with pytest.raises(ValueError, match="the padding row of a variational embedding is zero"):
        VariationalDropoutEmbedding.from_pretrained(weights, padding_idx=1)


def test_a_padding_row_that_is_not_zero_is_refused():
    embedding = nn.Embedding.from_pretrained(torch.ones(5, 3), freeze=False, padding_idx=2)
    with pytest.raises(ValueError, match="the padding row of a variational embedding is zero"):
        to_variational_dropout(embedding)


def test_shapes_can_be_found_without_numbers():
    with torch.device("meta"):
        layer = VariationalDropoutEmbedding(5, 3)
        assert layer(torch.zeros(2, 4, dtype=torch.int64)).shape == (2, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", [-1, 5])
def test_indices_out_of_range_are_refused(index, dtype):
    layer = VariationalDropoutEmbedding(5, 3, dtype=dtype)
    with pytest.raises(IndexError, match="indices are 0 to 4, not"):
        layer(torch.tensor([[2, index]]))


def test_padding_has_no_noise_and_no_gradient():
    layer = VariationalDropoutEmbedding(5, 3, padding_idx=3, initial_log_sigma2=0.0)
    output = layer(WORDS)
    assert not output[WORDS == 3].any()
    output.square().sum().backward()
    assert not layer.weight.grad[3].any() and not layer.log_sigma2.grad[3].any()
