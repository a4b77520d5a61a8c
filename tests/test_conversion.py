"""Existing models made variational, and what PyTorch does with any module: copies, state dicts, compile, autocast."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vdbench import variational
from vdbench.conversion import to_plain, to_variational_dropout
from vdbench.metrics import sparsity
from vdbench.models import LeNet5
from vdbench.variational import (
    VariationalDropout,
    VariationalDropoutConv2d,
    VariationalDropoutLinear,
    forward_with_kl,
    kl_divergence,
    variational_layers,
)

IMAGES = torch.linspace(-1, 1, 3 * 2 * 16).view(3, 2, 4, 4)


def plain_network(dtype: torch.dtype | None = None) -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect", groups=2, dtype=dtype),
        nn.BatchNorm2d(4, dtype=dtype),
        nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(16, 8, bias=False, dtype=dtype)),
        nn.Linear(8, 5, dtype=dtype),
    )


def network() -> nn.Sequential:
    """A variational one with weights and variances of order 1, some of them over the threshold."""
    net = plain_network()
    to_variational_dropout(net, loga_threshold=2.0)
    for _, layer in variational_layers(net):
        with torch.no_grad():
            layer.weight.normal_()
            layer.log_sigma2.uniform_(-3, 0)
    return net


# --- conversion ------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="embedding and output share a parameter"):
        to_variational_dropout(model, skip=skip)
    assert not list(variational_layers(model))
    to_variational_dropout(model, skip=["embedding", "output"])
    assert [name for name, _ in variational_layers(model)] == ["other"]


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


# --- the KL divergence from the forward pass -------------------------------------------------------------------------


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


# --- what PyTorch does with modules ----------------------------------------------------------------------------------


def test_state_dict_round_trip():
    net, other = network(), to_variational_dropout(plain_network(), loga_threshold=2.0)
    assert not torch.equal(other.eval()(IMAGES), net.eval()(IMAGES))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(IMAGES), net(IMAGES))
    assert torch.equal(kl_divergence(other), kl_divergence(net))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_equal_and_separate(clone):
    net = network()
    net[3].mask_in_training = False
    other = clone(net)
    assert (other[3].loga_threshold, other[3].mask_in_training) == (2.0, False)
    outputs = []
    for each in (net, other):
        torch.manual_seed(7)
        outputs.append(each.train()(IMAGES))
    assert torch.equal(*outputs)
    kl = kl_divergence(net).detach()
    nn.init.zeros_(other[3].log_sigma2)
    assert torch.equal(kl_divergence(net), kl)
    assert not torch.equal(kl_divergence(other), kl)


def test_channels_last_computes_the_same():
    net = network().eval()
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    assert last[0].log_sigma2.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(IMAGES.to(memory_format=torch.channels_last)), net(IMAGES))
    for each in (net, last):
        kl_divergence(each).backward()
    for a, b in zip(last.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_weights_in_another_memory_order_than_their_variances():
    net = network()
    expected = kl_divergence(net)
    expected.backward()
    other = copy.deepcopy(net)
    other.zero_grad()
    other[3].weight = nn.Parameter(net[3].weight.detach().t().contiguous().t())
    assert not other[3].weight.is_contiguous()
    kl = kl_divergence(other)
    kl.backward()
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(other[3].weight.grad, net[3].weight.grad, rtol=5e-4, atol=1e-6)
    torch.testing.assert_close(other[3].log_sigma2.grad, net[3].log_sigma2.grad, rtol=5e-4, atol=1e-6)


def test_compile():
    """In one graph, with the gradients of the net as it is, and with fresh noise each time."""
    net = network()[3:]
    layer, x = net[0], torch.linspace(-1, 1, 24).view(3, 8)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    grad = torch.linspace(1, 2, 15).view(3, 5)
    gradients = []
    for each in (compiled, net):
        net.zero_grad()
        output, kl = forward_with_kl(each, x)
        ((output * grad).sum() + kl).backward()
        gradients.append([kl, layer.bias.grad, layer.weight.grad])  # those that no noise enters
        noisy = layer.log_sigma2.grad
        (of_kl,) = torch.autograd.grad(kl_divergence(net), layer.log_sigma2)
        assert noisy.isfinite().all() and not torch.isclose(noisy, of_kl).any()
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=5e-4, atol=1e-5)
    assert not torch.equal(compiled(x), compiled(x))
    assert torch.equal(compiled.eval()(x), net(x))


def test_autocast():
    net = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, kl = forward_with_kl(net, IMAGES)
    assert output.dtype == torch.bfloat16
    (output.float().square().sum() + kl).backward()
    for parameter in net.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all() and parameter.grad.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net.eval()(IMAGES)
    torch.testing.assert_close(low.float(), net(IMAGES), rtol=0.05, atol=0.05 * float(net(IMAGES).detach().abs().max()))


def test_autocast_noise_has_its_standard_deviation():
    layer = VariationalDropoutLinear(16, 4, bias=False, initial_log_sigma2=-1.0)
    nn.init.zeros_(layer.weight)
    x = torch.linspace(0.1, 1, 16).expand(20_000, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        draws = layer(x).detach().float()
    expected = math.exp(-0.5) * x[0].norm()
    torch.testing.assert_close(draws.std(0), expected.expand(4), rtol=0.03, atol=0)


def test_a_model_that_is_variational_already_is_refused_saying_so():
    with pytest.raises(
        ValueError, match=r"Sequential has no .* to make variational; it is variational already: 0, 2\.2, 3"
    ):
        to_variational_dropout(network())
    with pytest.raises(ValueError, match="to make variational; it is variational already: itself"):
        to_variational_dropout(VariationalDropoutLinear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float16_trains_at_the_loss_scale_that_pytorch_starts_with(dtype):
    """Under autocast, and with layers that are float16 themselves; a plain net of this size has no trouble there."""
    torch.manual_seed(0)
    net = to_variational_dropout(LeNet5()).to(dtype)
    images = torch.rand(20, 1, 28, 28, dtype=dtype)
    images[..., :14] = 0  # where nothing varies the gradient by the variance is largest
    with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float32):
        output, kl = forward_with_kl(net, images)
    assert output.dtype == torch.float16
    loss = functional.cross_entropy(output.float(), torch.arange(20) % 10) + kl / 60_000
    (65536 * loss).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("log_sigma2", [-1.0, -18.0])  # the latter's variance is 0 in float16
def test_float16_noise_and_its_gradient_are_those_of_float32(log_sigma2):
    """For inputs whose squares do not fit a float16 too."""
    layer = VariationalDropoutLinear(16, 4, bias=False, initial_log_sigma2=log_sigma2)
    nn.init.zeros_(layer.weight)
    x = torch.linspace(100, 300, 16).expand(5_000, 16)
    drawn = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            output = layer(x).float()
        layer.zero_grad()
        output.square().mean().backward()
        drawn.append((output.detach().std(0), layer.log_sigma2.grad))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0.1, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda():
    net = network()
    gpu = copy.deepcopy(net).cuda()
    kls = [kl_divergence(each) for each in (net, gpu)]
    for kl in kls:
        kl.backward()
    torch.testing.assert_close(kls[1].cpu(), kls[0])
    torch.testing.assert_close(gpu[0].log_sigma2.grad.cpu(), net[0].log_sigma2.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gpu.eval()(IMAGES.cuda()).cpu(), net.eval()(IMAGES), rtol=1e-3, atol=1e-3)

    layer = gpu[3].train()
    draws = layer(torch.ones(20_000, 8, device="cuda"))
    torch.testing.assert_close(draws.std(0), layer.log_sigma2.exp().sum(1).sqrt(), rtol=0.03, atol=0)
    draws.sum().backward()
    assert layer.log_sigma2.grad.isfinite().all()
    late = to_variational_dropout(plain_network().cuda())
    assert all(layer.log_sigma2.is_cuda for _, layer in variational_layers(late))
    assert isinstance(late[0], VariationalDropout)
