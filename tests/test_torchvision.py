"""Networks of torchvision made variational: all their layers, the same function before any noise, and trainable."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.vgg import VGG, cfgs, make_layers

from vdbench import VariationalDropoutChain, forward_with_kl, metrics, to_variational_dropout
from vdbench.variational import variational_layers


class VGG16VD(VariationalDropoutChain, VGG):
    def __init__(self, **options) -> None:
        super().__init__(make_layers(cfgs["D"], batch_norm=True), init_weights=False, **options)


def test_vgg16_is_variational_throughout_and_has_a_loss() -> None:
    """On the meta device: shapes and gradients, without the 134 million weights."""
    with torch.device("meta"):
        net = VGG16VD(num_classes=10, num_examples=50_000)
        images, labels = torch.empty(2, 3, 64, 64), torch.empty(2, dtype=torch.int64)
    weights = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert net.to_variational_dropout() is net
    assert [name for name, _ in variational_layers(net)] == weights and len(weights) == 16
    loss = net.train().calc_loss(images, labels)
    loss.backward()
    assert loss.shape == () and loss.is_meta
    for _, layer in variational_layers(net):
        assert layer.weight.grad is not None and layer.log_sigma2.grad is not None
        assert layer.log_sigma2.grad.shape == layer.weight.shape


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet18(num_classes=10)


def test_resnet18_computes_what_it_did_and_learns(residual: nn.Module) -> None:
    plain = copy.deepcopy(residual)
    net = to_variational_dropout(copy.deepcopy(residual), initial_log_sigma2=-30.0)
    images, labels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    assert len(list(variational_layers(net))) == 21
    assert set(net.state_dict()) - set(plain.state_dict()) == {f"{n}.log_sigma2" for n, _ in variational_layers(net)}
    torch.testing.assert_close(net.eval()(images), plain.eval()(images), rtol=1e-3, atol=1e-3)
    optimizer = torch.optim.Adam(net.train().parameters(), lr=1e-3, fused=True)
    losses = []
    for _ in range(4):
        logits, kl = forward_with_kl(net, images)
        loss = nn.functional.cross_entropy(logits, labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        (loss + kl / 50_000).backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(layer.log_sigma2.grad is not None for _, layer in variational_layers(net))


def test_layers_that_are_skipped_stay_as_they_are(residual: nn.Module) -> None:
    net = to_variational_dropout(copy.deepcopy(residual), skip=["conv1", "fc"])
    names = {name for name, _ in variational_layers(net)}
    assert len(names) == 19 and not names & {"conv1", "fc"}
    assert metrics.size(net).weights == metrics.size(residual).weights
