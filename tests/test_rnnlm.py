"""Language models before they are trained: where weights start and what is dropped."""

import pytest
import torch
from torch import nn

from vdbench.language import RNNLM, OneHotRNNLM


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def biases(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in net.named_parameters() if "bias" in name}


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.RNN])
def test_weights_start_small(recurrent):
    for name, parameter in RNNLM(40, recurrent, units=20).state_dict().items():
        if "bias" not in name:
            assert 0.09 < float(parameter.abs().max()) <= 0.1 and abs(float(parameter.mean())) < 0.01, name


def test_every_gate_of_the_one_hot_model_starts_orthogonal():
    net = OneHotRNNLM(40, units=20)
    for gate in (*net.rnn.weight_ih_l0.chunk(4), *net.rnn.weight_hh_l0.chunk(4), net.output.weight.t()):
        torch.testing.assert_close(gate @ gate.t(), torch.eye(20), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: RNNLM(40, units=20), lambda: OneHotRNNLM(40, units=20)])
def test_biases_start_at_zero_but_for_open_forget_gates(make):
    for name, bias in biases(make()).items():
        expected = torch.zeros_like(bias)
        if "bias_ih" in name:
            expected[20:40] = 1  # torch's order: input, forget, cell, output
        assert torch.equal(bias, expected), name


def test_a_tanh_model_has_no_gates():
    assert not any(bias.any() for bias in biases(RNNLM(40, nn.RNN, units=20)).values())


def test_what_recurrence_does_not_connect_is_dropped():
    """The output of the embedding and of every recurrent layer."""
    net, seen = RNNLM(40, units=20, layers=2, dropout=0.3), []
    net.dropout.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    words = torch.randint(40, (5, 3))
    net.eval()(words)
    assert torch.equal(seen[0], net.embedding(words)) and torch.equal(seen[1], net.rnn(seen[0])[0])
    assert (net.dropout.p, net.rnn.dropout) == (0.3, 0.3) and len(seen) == 2
    assert RNNLM(40, units=20, layers=1).rnn.dropout == 0.0  # of a last layer torch drops nothing, and warns
