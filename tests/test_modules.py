"""What PyTorch does with any module, done with variational ones: copies, compile, autocast, 16 bits, checkpoints."""

import copy
import math
import pickle

import pytest
import torch
from small_net import IMAGES, network, plain_network
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vdbench import posterior
from vdbench.conversion import to_variational_dropout
from vdbench.models import LeNet5
from vdbench.variational import (
    VariationalDropout,
    VariationalDropoutConv2d,
    VariationalDropoutLinear,
    forward_with_kl,
    kl_divergence,
    variational_layers,
)


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


def test_under_autocast_an_input_may_be_changed_in_place(monkeypatch):
    """As with a plain layer, which has kept a bfloat16 copy."""
    monkeypatch.setattr(posterior, "_HAS_BFLOAT16", True)
    layer, gradients = VariationalDropoutLinear(16, 4, initial_log_sigma2=-1.0), []
    for factor in (1, 100):
        torch.manual_seed(0)
        layer.zero_grad()
        x = torch.linspace(0.1, 1, 16).repeat(3, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(x)
        x.mul_(factor)
        output.float().square().sum().backward()
        gradients.append(layer.log_sigma2.grad)
    assert torch.equal(*gradients)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_layers_have_finite_gradients_and_the_same_kl(dtype):
    torch.manual_seed(0)
    layer = VariationalDropoutLinear(784, 300, dtype=dtype)
    with torch.no_grad():
        layer.weight[0] = 0.0
    twin = copy.deepcopy(layer).float()
    output = layer(torch.rand(4, 784, dtype=dtype))
    assert output.dtype == dtype
    kl = layer.kl_divergence()
    (output.float().square().mean() + kl / 60_000).backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
    assert kl.item() == pytest.approx(twin.kl_divergence().item(), rel=1e-5)
    assert torch.equal(layer.mask, twin.mask)


@pytest.mark.parametrize("layer", [VariationalDropoutLinear(6, 5), VariationalDropoutConv2d(6, 5, 1)])
def test_activation_checkpoints(layer):
    """Where a layer runs again in the backward pass, with the same noise, gradients are the same."""
    batch = torch.randn(3, 6, *[1] * (layer.weight.dim() - 2))
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(0)
        layer.zero_grad()
        run(batch).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


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
