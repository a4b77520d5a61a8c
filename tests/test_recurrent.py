"""Variational recurrent layers and embeddings: torch's own without noise, one weight sample a pass with it."""

import copy
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from vdbench import metrics, posterior
from vdbench.conversion import to_variational_dropout
from vdbench.language import RNNLM, OneHotRNNLM
from vdbench.recurrent import VariationalDropoutEmbedding, VariationalDropoutLSTM, VariationalDropoutTanhRNN
from vdbench.variational import (
    VariationalDropoutLinear,
    forward_with_kl,
    kl_divergence,
    variational_layers,
    variational_matrices,
)

KINDS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "batch_first": True}),
    (nn.LSTM, {"bidirectional": True}),
    pytest.param(nn.LSTM, {"proj_size": 3}, marks=pytest.mark.filterwarnings("ignore:LSTM with projections")),
    (nn.RNN, {"num_layers": 2}),
    (nn.RNN, {"bias": False, "nonlinearity": "relu"}),
]
WORDS = torch.tensor([[0, 3], [3, 1], [4, 3]])


def plain(kind: type[nn.RNNBase], dtype: torch.dtype = torch.float32, **options) -> nn.RNNBase:
    torch.manual_seed(3)
    return kind(4, 5, **options).to(dtype)


def model(log_sigma2: float = -4.0) -> nn.Module:
    torch.manual_seed(8)
    net = RNNLM(7, units=6, dropout=0.0)
    return to_variational_dropout(net, initial_log_sigma2=log_sigma2)


def randomise(net: nn.Module) -> None:
    """Weights and variances of order 1, some of them over the threshold."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, matrix in variational_matrices(net):
            matrix.weight.copy_(torch.randn(matrix.weight.shape, generator=generator))
            matrix.log_sigma2.copy_(6 * torch.rand(matrix.weight.shape, generator=generator) - 3)


# --- what is torch's ---


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_without_noise_a_converted_layer_computes_what_it_did(kind, options, dtype, training):
    layer = plain(kind, dtype, **options).train(training)
    variational = to_variational_dropout(copy.deepcopy(layer), initial_log_sigma2=-60.0)
    assert isinstance(variational, VariationalDropoutLSTM if kind is nn.LSTM else VariationalDropoutTanhRNN)
    inputs = [torch.linspace(-1, 1, 24, dtype=dtype).view(3, 2, 4).requires_grad_() for _ in range(2)]
    results = [net(x) for net, x in zip((layer, variational), inputs, strict=True)]
    torch.testing.assert_close(results[1], results[0])
    for output, _ in results:
        (output * torch.linspace(0, 1, output.numel(), dtype=dtype).view_as(output)).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(variational.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNN])
def test_initial_states_and_packed_sequences_are_torchs(kind):
    layer = plain(kind, num_layers=2)
    variational = to_variational_dropout(copy.deepcopy(layer), initial_log_sigma2=-60.0)
    state = torch.randn(2, 2, 5)
    state = (state, state.flip(0)) if kind is nn.LSTM else state
    packed = pack_padded_sequence(torch.randn(3, 2, 4), torch.tensor([3, 1]))
    ours, theirs = (net(packed, state) for net in (variational, layer))
    torch.testing.assert_close(pad_packed_sequence(ours[0]), pad_packed_sequence(theirs[0]))
    torch.testing.assert_close(ours[1], theirs[1])


def test_dropout_between_layers_is_torchs():
    layer = VariationalDropoutLSTM(4, 50, num_layers=2, dropout=0.9, initial_log_sigma2=-60.0)
    x = torch.randn(1, 1, 4)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_eval_mode_computes_with_masked_weights(kind, options):
    layer = to_variational_dropout(plain(kind, **options), loga_threshold=1.0)
    randomise(layer)
    masked = plain(kind, **options)
    state = {name: value for name, value in layer.state_dict().items() if not name.endswith("log_sigma2")}
    for name, weight in metrics.weights(layer).items():
        assert 0 < (weight == 0).sum() < weight.numel()
        state[name] = weight
    masked.load_state_dict(state)
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(layer.eval()(x), masked(x))


def test_parameters_put_in_by_others_are_the_ones_that_are_used():
    layer = VariationalDropoutLSTM(4, 5, initial_log_sigma2=-60.0)
    zeros = {name: torch.zeros_like(value) for name, value in layer.named_parameters() if "log_sigma2" not in name}
    x = torch.randn(3, 2, 4)
    output = torch.func.functional_call(layer, zeros, (x,))[0]
    torch.testing.assert_close(output, torch.zeros(3, 2, 5), rtol=0, atol=1e-6)
    noisy = {name: torch.full_like(value, 3.0) for name, value in layer.named_parameters() if "log_sigma2" in name}
    assert torch.func.functional_call(layer, zeros | noisy, (x,))[0].abs().max() > 0.05
    layer.weight_hh_l0 = nn.Parameter(torch.ones(20, 5))
    assert not torch.equal(layer(x)[0], torch.zeros(3, 2, 5))


def test_threads_may_share_a_layer(monkeypatch):
    """The second of two calls is still to begin its product when the first one ends."""
    layer = to_variational_dropout(plain(nn.LSTM), loga_threshold=1.0).eval()
    randomise(layer)
    x = torch.randn(3, 2, 4)
    expected, _ = layer(x)
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    turns = iter([(first_is_in, second_is_in), (second_is_in, first_is_out)])

    def wait(self, *args):
        mine, others = next(turns)
        mine.set()
        assert others.wait(30)

    monkeypatch.setattr(nn.LSTM, "check_forward_args", wait)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(layer, x)
        assert first_is_in.wait(30)
        second = pool.submit(layer, x)
        assert torch.equal(first.result()[0], expected)
        first_is_out.set()
        assert torch.equal(second.result()[0], expected)


# --- noise ---


@pytest.mark.parametrize("kind", [VariationalDropoutLSTM, VariationalDropoutTanhRNN])
def test_one_sample_serves_all_sequences_and_another_pass_draws_another(kind):
    layer = kind(4, 5, num_layers=2, initial_log_sigma2=-2.0)
    x = torch.randn(6, 1, 4).expand(6, 3, 4)
    first, second = layer(x)[0], layer(x)[0]
    torch.testing.assert_close(first, first[:, :1].expand_as(first))
    assert not torch.allclose(first, second, atol=1e-3)


def test_one_sample_serves_all_timesteps():
    layer = VariationalDropoutTanhRNN(4, 5, initial_log_sigma2=-2.0)
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
        layer.weight_hh_l0_log_sigma2.fill_(-60.0)
    output, _ = layer(torch.ones(6, 1, 4))
    torch.testing.assert_close(output, output[:1].expand_as(output))
    assert not torch.allclose(output, layer(torch.ones(6, 1, 4))[0], atol=1e-3)


def test_a_word_has_one_sample_wherever_it_occurs():
    layer = VariationalDropoutEmbedding(5, 3, initial_log_sigma2=-1.0)
    output = layer(WORDS)
    assert torch.equal(output[0, 1], output[1, 0]) and torch.equal(output[0, 1], output[2, 1])
    assert not torch.allclose(output[0, 1], layer.weight[3], atol=1e-3)
    assert not torch.equal(output, layer(WORDS))


def test_linear_layers_of_a_recurrent_model_share_their_noise_and_of_others_do_not():
    def spread(layer):
        """How far the outputs for four equal inputs lie apart."""
        output = layer(torch.ones(4, 6)).detach()
        return float((output.amax(0) - output.amin(0)).max())

    assert spread(model().output) < 1e-5
    linear = to_variational_dropout(nn.Sequential(nn.Linear(6, 3)), initial_log_sigma2=-4.0)
    assert spread(linear) > 0.01
    linear[0].shared_noise = True
    assert spread(linear) < 1e-5
    chosen = to_variational_dropout(RNNLM(7, units=6, dropout=0.0), shared_noise=False, initial_log_sigma2=-4.0)
    assert spread(chosen.output) > 0.01


@pytest.mark.parametrize("rows", [None, torch.tensor([7, 2, 30])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_the_means_and_variances_they_should(dtype, rows):
    torch.manual_seed(4)
    weight = torch.linspace(-2, 2, 40 * 3001, dtype=dtype).view(40, 3001)
    log_sigma2 = torch.linspace(-3, 1, 40, dtype=dtype)[:, None].expand(40, 3001).contiguous()
    drawn, _ = posterior.sample(weight, log_sigma2, math.inf, rows)
    chosen = slice(None) if rows is None else rows
    noise = (drawn - weight[chosen]) / (0.5 * log_sigma2[chosen]).exp()
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5
    assert (noise.var() - 1).abs() < 10 / noise.numel() ** 0.5
    rows_of_noise = noise - noise.mean(1, keepdim=True)
    correlation = torch.corrcoef(rows_of_noise) - torch.eye(len(noise), dtype=dtype)
    assert correlation.abs().max() < 6 / 3001**0.5


# --- gradients ---


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 0])])
def test_gradients_of_a_sample_agree_with_finite_differences(rows):
    torch.manual_seed(1)
    weight = torch.randn(5, 4, dtype=torch.double, requires_grad=True)
    log_sigma2 = (4 * torch.rand(5, 4, dtype=torch.double) - 3).requires_grad_()

    def drawn(weight, log_sigma2):
        torch.manual_seed(6)
        return posterior.sample(weight, log_sigma2, math.exp(1.0), rows)

    assert torch.autograd.gradcheck(drawn, (weight, log_sigma2))


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 0, 19])])
def test_fused_samples_are_those_of_the_formulas(rows):
    """The fused float32 kernels against torch operations in float64, given the noise that the kernels drew."""
    torch.manual_seed(1)
    limit = math.exp(0.5)
    weight = torch.randn(20, 1000).requires_grad_()
    log_sigma2 = (6 * torch.rand(20, 1000) - 4).requires_grad_()
    drawn, kl = posterior.sample(weight, log_sigma2, limit, rows)
    grad = torch.randn(drawn.shape)
    ((drawn * grad).sum() + 0.7 * kl).backward()

    w, s = (t.detach().double().requires_grad_() for t in (weight, log_sigma2))
    mean, _, expected_kl = posterior.Posterior.apply(w, s, limit)
    chosen = slice(None) if rows is None else rows
    std = (0.5 * s[chosen]).exp()
    noise = ((drawn - mean[chosen]) / std).detach()
    assert noise.abs().max() < 6
    ((mean[chosen] + std * noise).mul(grad).sum() + 0.7 * expected_kl).backward()
    torch.testing.assert_close(
        kl.double(), expected_kl, rtol=1e-5, atol=0
    )  # summed in float32, in an order the CPU decides
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_sigma2.grad.double(), s.grad, rtol=1e-4, atol=1e-4)


def test_no_gradient_of_the_data_reaches_the_mean_of_a_masked_weight():
    net = model()
    randomise(net)
    net.train()
    net(WORDS)[0].square().mean().backward()
    removed = 0
    for name, matrix in variational_matrices(net):
        gone = ~matrix.mask(3.0)
        removed += int(gone.sum())
        assert not matrix.weight.grad[gone].any(), name
        assert matrix.weight.grad[matrix.mask(3.0)].any(), name
    assert removed > 10
    for _, layer in variational_layers(net):
        layer.mask_in_training = False
    net(WORDS)[0].square().mean().backward()
    assert any(matrix.weight.grad[~matrix.mask(3.0)].any() for _, matrix in variational_matrices(net))


def test_rows_of_words_that_do_not_occur_have_the_gradients_of_the_divergence_alone():
    layer = VariationalDropoutEmbedding(6, 3, initial_log_sigma2=-1.0)
    output, kl = forward_with_kl(layer, WORDS)
    (output.square().sum() + kl).backward()
    found = layer.weight.grad.clone(), layer.log_sigma2.grad.clone()
    layer.zero_grad()
    kl_divergence(layer).backward()
    absent, present = [2, 5], [0, 1, 3, 4]
    for ours, divergence in zip(found, (layer.weight.grad, layer.log_sigma2.grad), strict=True):
        torch.testing.assert_close(ours[absent], divergence[absent])
        assert ((ours - divergence)[present].abs() > 1e-6).all()


# --- divergence ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_is_summed_over_every_weight_of_every_matrix(dtype):
    net = model().to(dtype)
    randomise(net)
    expected = 0.0
    for _, matrix in variational_matrices(net):
        la = matrix.log_alpha()
        expected += (0.63576 * (1 - torch.sigmoid(1.87320 + 1.48695 * la)) + 0.5 * torch.log1p(torch.exp(-la))).sum()
    assert len(list(variational_matrices(net))) == 6
    torch.testing.assert_close(kl_divergence(net), expected)
    net.train()
    torch.testing.assert_close(forward_with_kl(net, WORDS)[1], expected)


# --- conversion, state and statistics ---


def test_conversion_keeps_layers_weights_and_names():
    net = RNNLM(7, units=6)
    layers, before = [net.embedding, net.rnn, net.output], {n: p for n, p in net.named_parameters()}
    to_variational_dropout(net, initial_log_sigma2=-6.0)
    assert [net.embedding, net.rnn, net.output] == layers
    assert [type(layer) for layer in layers] == [
        VariationalDropoutEmbedding,
        VariationalDropoutLSTM,
        VariationalDropoutLinear,
    ]
    after = dict(net.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    matrices = ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.weight_ih_l1", "rnn.weight_hh_l1"]
    assert set(after) - set(before) == {
        "embedding.log_sigma2",
        "output.log_sigma2",
        *(f"{name}_log_sigma2" for name in matrices),
    }
    assert [layer.name for layer in metrics.layers(net)] == ["embedding", *matrices, "output"]
    assert metrics.size(net).weights == 2 * 7 * 6 + 4 * 4 * 6 * 6
    assert metrics.size(net).biases == 2 * 2 * 4 * 6 + 7


def test_state_dict_round_trip_and_copies():
    net = model().eval()
    randomise(net)
    other = to_variational_dropout(RNNLM(7, units=6, dropout=0.0)).eval()
    other.load_state_dict(net.state_dict())
    expected = net(WORDS)[0]
    assert torch.equal(other(WORDS)[0], expected)
    assert torch.equal(copy.deepcopy(net)(WORDS)[0], expected)
    torch.testing.assert_close(net.double()(WORDS)[0].float(), expected)


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


def test_recurrent_weights_that_are_computed_anew_are_refused():
    net = nn.Sequential(nn.LSTM(4, 5))
    prune.l1_unstructured(net[0], "weight_hh_l0", 0.5)
    with pytest.raises(ValueError, match=r"0: weight_hh_l0 is computed anew at every call.* name it in skip"):
        to_variational_dropout(net)


def test_padding_has_no_noise_and_no_gradient():
    layer = VariationalDropoutEmbedding(5, 3, padding_idx=3, initial_log_sigma2=0.0)
    output = layer(WORDS)
    assert not output[WORDS == 3].any()
    output.square().sum().backward()
    assert not layer.weight.grad[3].any() and not layer.log_sigma2.grad[3].any()


def test_forward_passes_of_the_published_one_hot_model():
    net = to_variational_dropout(OneHotRNNLM(7, units=5), initial_log_sigma2=-6.0)
    logits, (hidden, cell) = net(WORDS)
    assert logits.shape == (3, 2, 7) and hidden.shape == cell.shape == (1, 2, 5)
    assert metrics.size(net).weights == 4 * 5 * (7 + 5) + 5 * 7


def test_a_state_carried_from_piece_to_piece_is_that_of_the_whole():
    net = model().eval()
    logits, state = net(WORDS)
    first, carried = net(WORDS[:2])
    second, carried = net(WORDS[2:], carried)
    torch.testing.assert_close(torch.cat((first, second)), logits)
    torch.testing.assert_close(carried, state)


def test_the_documentation_runs():
    text = (Path(__file__).parent.parent / "docs" / "recurrent.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    batch = torch.randint(10_000, (2, 5)), torch.randint(17, (2, 5))
    names = {"batches": [batch, batch], "num_tags": 20}
    exec(code[1], names)
    assert isinstance(names["model"].lstm, VariationalDropoutLSTM)
