"""Existing models made variational, and plain again."""

import copy
import math

import pytest
import torch
from small_net import IMAGES, network, plain_network
from torch import nn

from vdbench import metrics
from vdbench.conversion import to_plain, to_variational_dropout
from vdbench.metrics import sparsity
from vdbench.variational import (
    VariationalDropoutConv2d,
    VariationalDropoutLinear,
    kl_divergence,
    variational_layers,
    variational_matrices,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_without_noise_a_converted_model_computes_what_it_did(training, dtype):
    plain = plain_network(dtype).train(training)
    model = to_variational_dropout(copy.deepcopy(plain), initial_log_sigma2=-30.0)
    x = IMAGES.to(dtype).requires_grad_()
    outputs = [net(x) for net in (plain, model)]
    # in training mode the floor leaves a standard deviation of 1e-4 a layer, which normalisation may enlarge
    tolerance = {"rtol": 0, "atol": 3e-3 if training else 1e-6}
    torch.testing.assert_close(outputs[1], outputs[0], **tolerance)
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=0, atol=3e-2)


def test_conversion_keeps_objects_weights_dtype_and_modes():
    model = plain_network(torch.float64)
    model[3].eval()
    model[0].weight.requires_grad_(False)
    layers, parameters = [model[0], model[2][2], model[3]], dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in parameters.items()}
    assert to_variational_dropout(model, p_threshold=0.8, loga_threshold=1.5, initial_log_sigma2=-6.0) is model
    assert [model[0], model[2][2], model[3]] == layers
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter and torch.equal(parameter, values[name])
    assert [layer.training for layer in layers] == [True, True, False]
    assert not model[0].weight.requires_grad
    assert [type(layer) for layer in layers] == [
        VariationalDropoutConv2d,
        VariationalDropoutLinear,
        VariationalDropoutLinear,
    ]
    for layer in layers:
        assert layer.log_sigma2.dtype == torch.float64 and layer.log_sigma2.shape == layer.weight.shape
        assert (layer.log_sigma2 == -6.0).all() and layer.log_sigma2.requires_grad
        assert (layer.p_threshold, layer.loga_threshold) == (0.8, 1.5)
    assert set(model.state_dict()) - set(plain_network().state_dict()) == {
        "0.log_sigma2",
        "2.2.log_sigma2",
        "3.log_sigma2",
    }


def test_log_sigma2_is_on_the_device_of_its_weight():
    model = to_variational_dropout(nn.Sequential(nn.Linear(2, 3, device="meta")))
    assert model[0].log_sigma2.device.type == "meta"


def test_hooks_are_kept():
    model = plain_network()
    seen = []
    model[3].register_forward_hook(lambda layer, args, output: seen.append(type(layer)))
    model[0].register_forward_pre_hook(lambda layer, args: (2 * args[0],))
    before = model.eval()(IMAGES)
    to_variational_dropout(model, initial_log_sigma2=-30.0)
    torch.testing.assert_close(model(IMAGES), before)
    assert seen == [nn.Linear, VariationalDropoutLinear]


def test_a_shared_layer_is_converted_once_and_stays_shared():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU(), shared), "b": shared})
    to_variational_dropout(model)
    assert model["a"][0] is model["a"][2] is model["b"] is shared
    assert isinstance(shared, VariationalDropoutLinear)
    assert len(list(variational_layers(model))) == 1
    torch.testing.assert_close(kl_divergence(model), shared.kl_divergence())  # counted once


def test_layers_that_have_seen_no_batch_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="run one batch through it first"):
        to_variational_dropout(model)
    model(torch.zeros(2, 4))
    assert isinstance(to_variational_dropout(model)[1], VariationalDropoutLinear)


@pytest.mark.parametrize("model", [None, [nn.Linear(2, 2)]])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=r"give an nn\.Module"):
        to_variational_dropout(model)


def test_a_second_conversion_has_options_of_its_own():
    layer = to_variational_dropout(nn.Linear(3, 2), shared_noise=True)
    assert not to_variational_dropout(to_plain(layer), shared_noise=False).shared_noise


def test_a_model_may_itself_be_a_layer():
    layer = nn.Linear(3, 2)
    assert isinstance(to_variational_dropout(layer), VariationalDropoutLinear)
    assert [name for name, _ in variational_layers(layer)] == [""]


@pytest.mark.parametrize(
    ("skip", "converted"),
    [
        ([], ["0", "2.2", "3"]),
        (["0"], ["2.2", "3"]),
        (["2"], ["0", "3"]),
        ({"2.2", "3"}, ["0"]),
        (("1",), ["0", "2.2", "3"]),
    ],
)
def test_layers_are_skipped_by_name_alone_or_with_their_container(skip, converted):
    model = to_variational_dropout(plain_network(), skip=skip)
    assert [name for name, _ in variational_layers(model)] == converted
    assert type(model[0]) is (VariationalDropoutConv2d if "0" in converted else nn.Conv2d)


def test_a_shared_layer_is_skipped_by_any_of_its_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared, "other": nn.Linear(4, 4)})
    to_variational_dropout(model, skip=["second"])
    assert type(shared) is nn.Linear and isinstance(model["other"], VariationalDropoutLinear)


def test_an_unknown_name_to_skip_lists_those_there_are_and_changes_nothing():
    model = plain_network()
    with pytest.raises(ValueError, match=r"\['fc9'\].*'0', '1', '2', '2.0'.*'3'"):
        to_variational_dropout(model, skip=["3", "fc9"])
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("model", "skip"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv1d(1, 1, 1)), []),
        (nn.Sequential(nn.Linear(1, 1)), ["0"]),
        (nn.Sequential(VariationalDropoutLinear(1, 1)), []),
    ],
)
def test_nothing_to_convert_is_an_error(model, skip):
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear, nn\.Conv2d"):
        to_variational_dropout(model, skip=skip)


@pytest.mark.parametrize("skip", [(), ("output",)])
def test_tied_weights_are_refused(skip):
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "output": nn.Linear(4, 9), "other": nn.Linear(4, 4)})
    model["output"].weight = model["embedding"].weight
    with pytest.raises(ValueError, match=r"embedding\.weight and output\.weight are one parameter"):
        to_variational_dropout(model, skip=skip)
    assert not list(variational_layers(model))
    to_variational_dropout(model, skip=["embedding", "output"])
    assert [name for name, _ in variational_layers(model)] == ["other"]


def test_weights_tied_within_a_layer_are_refused():
    model = nn.Sequential(nn.LSTM(4, 4, num_layers=2), nn.Linear(4, 4))
    model[0].weight_hh_l1 = model[0].weight_hh_l0
    with pytest.raises(ValueError, match=r"0\.weight_hh_l0 and 0\.weight_hh_l1 are one parameter.*layers in skip"):
        to_variational_dropout(model)
    assert [name for name, _ in variational_layers(to_variational_dropout(model, skip="0"))] == ["1"]


def test_back_to_plain_layers_with_the_weights_of_eval_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8), nn.LSTM(8, 6, 2), nn.RNN(8, 6), nn.Linear(6, 5), nn.Conv1d(2, 2, 1))
    plain = [type(layer) for layer in model]
    to_variational_dropout(model, initial_log_sigma2=-2.0)
    model.eval()
    words, values = torch.randint(30, (7, 3)), torch.randn(7, 3, 8)

    def outputs():
        return [model[0](words), model[1](values)[0], model[2](values)[0], model[3](values[..., :6])]

    with torch.no_grad():
        variational = outputs()
        assert to_plain(model) is model
        assert [type(layer) for layer in model] == plain
        assert not any("log_sigma2" in name for name, _ in model.named_parameters())
        for before, after in zip(variational, outputs(), strict=True):
            torch.testing.assert_close(after, before)
    assert 0 < (model[3].weight == 0).float().mean() < 1
    to_variational_dropout(model)


def test_a_wrong_option_leaves_the_model_as_it_was():
    model = plain_network()
    with pytest.raises(ValueError, match="p_threshold"):
        to_variational_dropout(model, p_threshold=95)
    assert type(model[0]) is nn.Conv2d


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_subclasses_of_the_layers_are_left_alone():
    """They compute something else; multi-head attention, for one, never calls its output projection."""
    model = Attention()
    x = torch.randn(2, 3, 4)
    before, projection = model.eval()(x), type(model.attention.out_proj)
    to_variational_dropout(model, initial_log_sigma2=-30.0)
    assert [name for name, _ in variational_layers(model)] == ["head"]
    assert type(model.attention.out_proj) is projection
    torch.testing.assert_close(model(x), before)


def test_transformers_do_not_read_past_the_masks():
    """Without gradients PyTorch would multiply with the weights as they are, in one kernel of its own."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 1)
    to_variational_dropout(model, initial_log_sigma2=-2.0).eval()
    assert 0.05 < sparsity(model) < 0.95
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), to_plain(copy.deepcopy(model)).requires_grad_(True)(x))
        expected = model(x)
    torch.testing.assert_close(model(x), expected)
    dense = copy.deepcopy(model)
    for layer in variational_layers(dense):
        layer[1].loga_threshold = math.inf
    assert not torch.allclose(dense(x), expected, atol=1e-3)


def test_subclasses_of_variational_layers_become_plain_too():
    class Mine(VariationalDropoutLinear):
        pass

    layer = Mine(4, 3, initial_log_sigma2=-1.0).eval()
    x = torch.randn(2, 4)
    expected = layer(x)
    assert type(to_plain(layer)) is nn.Linear
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_weights_that_are_computed_are_refused_or_left_alone(normed):
    with pytest.raises(ValueError):
        to_variational_dropout(nn.Sequential(normed(nn.Linear(4, 3))))


def test_layers_whose_weights_are_computed_by_now_do_not_become_plain():
    model = to_variational_dropout(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    nn.utils.parametrizations.spectral_norm(model[1])
    with pytest.raises(ValueError, match="1: weight is computed from other parameters"):
        to_plain(model)
    assert len(list(variational_layers(model))) == 2
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert to_plain(model)(torch.ones(2, 4)).shape == (2, 3)


def test_complex_weights_are_refused():
    with pytest.raises(ValueError, match="0: its weights are complex numbers"):
        to_variational_dropout(nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)))


@pytest.mark.parametrize(
    "plain", [nn.Linear(4, 5), nn.Conv2d(2, 3, 3), nn.Embedding(5, 3, padding_idx=1), nn.LSTM(4, 5, 2), nn.RNN(4, 5)]
)
def test_layers_begin_anew(plain):
    torch.manual_seed(0)
    layer = to_variational_dropout(copy.deepcopy(plain), initial_log_sigma2=-7.0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(2.0)
    torch.manual_seed(1)
    layer.reset_parameters()
    for _, matrix in variational_matrices(layer):
        assert bool((matrix.log_sigma2 == -7).all()) and matrix.weight.abs().max() != 2
    assert metrics.sparsity(layer) < 0.2  # a padding row is no weight to keep


def test_a_model_that_is_variational_already_is_refused_saying_so():
    with pytest.raises(
        ValueError, match=r"Sequential has no .* to make variational; it is variational already: 0, 2\.2, 3"
    ):
        to_variational_dropout(network())
    with pytest.raises(ValueError, match="to make variational; it is variational already: itself"):
        to_variational_dropout(VariationalDropoutLinear(2, 2))
