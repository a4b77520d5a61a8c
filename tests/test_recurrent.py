"""Variational recurrent layers and models: torch's own without noise, one weight sample a pass with it."""

import copy
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_net import WORDS
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from vdbench import metrics
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


# --- gradients and divergence ---


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


def test_recurrent_weights_that_are_computed_anew_are_refused():
    net = nn.Sequential(nn.LSTM(4, 5))
    prune.l1_unstructured(net[0], "weight_hh_l0", 0.5)
    with pytest.raises(ValueError, match=r"0: weight_hh_l0 is computed anew at every call.* name it in skip"):
        to_variational_dropout(net)


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
