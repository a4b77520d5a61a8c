"""Tracing: the graph against the model it was read from, its layers, their weights and their names."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from sparse_graphs import IMAGE, VECTOR, checked, kinds
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from vdbench.chain import VariationalDropoutChain
from vdbench.conversion import to_variational_dropout
from vdbench.models import LeNet5, LeNet300100
from vdbench.sparse.graph import Conv2d, Linear
from vdbench.sparse.opaque import TorchOp
from vdbench.sparse.tracing import trace
from vdbench.variational import VariationalDropoutConv2d, VariationalDropoutLinear


class Block(nn.Module):
    """A residual block, as torchvision writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def test_a_residual_block():
    graph = checked(Block(), *IMAGE)
    assert kinds(graph) == ["Conv2d", "Affine", "Clip", "Conv2d", "Affine", "Add", "Clip"]
    assert [op.name for op in graph.ops] == ["input", "conv1", "bn1", "relu", "conv2", "bn2", "add", "relu_1"]


def test_variational_layers_are_masked():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5, bias=False))
    to_variational_dropout(net)
    with torch.no_grad():
        for layer in (net[0], net[3]):
            layer.log_sigma2.copy_(torch.log(layer.weight**2) + 3 + torch.randn_like(layer.weight))
    graph = checked(net, *IMAGE)
    for name, layer in (("0", net[0]), ("3", net[3])):
        op = graph[name]
        assert isinstance(op, Conv2d | Linear)
        assert np.array_equal(op.weight, layer.masked_weight().detach().numpy())
        assert 0 < op.weight_count == layer.mask.sum() < layer.weight.numel()
    assert isinstance(graph["3"], Linear) and not graph["3"].bias.any()


@pytest.mark.parametrize(
    "layer",
    [VariationalDropoutLinear(5, 3), VariationalDropoutConv2d(4, 3, 3), nn.Linear(5, 3), nn.BatchNorm2d(4)],
)
def test_a_model_may_itself_be_a_layer(layer):
    shape = (5,) if isinstance(layer, nn.Linear) else IMAGE
    assert [op.name for op in checked(layer, *shape).ops] == ["input", "0"]


@pytest.mark.parametrize("network", [LeNet5, LeNet300100])
def test_the_networks_of_the_paper(network):
    class Chain(VariationalDropoutChain, network):
        pass

    graph = checked(Chain(num_examples=10).to_variational_dropout(), 1, 28, 28)
    assert [op.name for op in graph.ops[1:]] == list(dict(network().named_children()))
    assert not any(isinstance(op, TorchOp) for op in graph.ops)


def test_weights_are_contiguous_copies_without_negative_zeros():
    net = nn.Sequential(nn.Conv2d(4, 3, 3), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(36, 2))
    net.to(memory_format=torch.channels_last)
    with torch.no_grad():
        net[0].weight[0] = -0.0
    graph = checked(net, *IMAGE)
    batch = torch.randn(2, *IMAGE)
    before = graph(batch)
    for op in (graph["0"], graph["3"]):
        assert isinstance(op, Conv2d | Linear)
        assert op.weight.flags.c_contiguous and op.weight.dtype == op.bias.dtype == np.float32
        assert not np.signbit(op.weight[op.weight == 0]).any()
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    assert torch.equal(graph(batch), before)


def test_a_layer_used_twice_is_two_operations():
    layer = nn.Linear(6, 6)
    graph = checked(nn.Sequential(layer, nn.ReLU(), layer), *VECTOR)
    assert [op.name for op in graph.ops] == ["input", "0", "1", "0_1"]


def test_weights_pruned_or_parametrised_by_torch():
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    prune.random_unstructured(net[0], "weight", 0.5)
    parametrizations.weight_norm(net[1])
    graph = checked(net, *VECTOR)
    assert kinds(graph) == ["Linear", "Linear"] and graph["0"].weight_count == 15


def test_subclasses_of_layers_compute_what_they_compute():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    checked(nn.Sequential(Doubled(6, 4), nn.Linear(4, 2)), *VECTOR)


def test_attention_stays_with_torch():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            y, _ = self.attention(x, x, x)
            return self.head((scale * y)[:, 0])

    assert kinds(checked(Attending(), 4, 6))[-1] == "Linear"


def test_models_may_be_traced_in_inference_mode():
    depth = torchvision.ops.StochasticDepth(0.5, "row")
    with torch.inference_mode():
        assert kinds(checked(nn.Sequential(nn.Linear(6, 3), depth), *VECTOR)) == ["Linear"]


def test_names_that_the_tracer_makes_up_are_not_those_of_layers():
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.ModuleDict({"pool": nn.Conv2d(3, 3, 1)})

        def forward(self, x: Tensor) -> Tensor:
            return self.mean["pool"](x).mean((2, 3))

    assert kinds(checked(Pools(), 3, 4, 4)) == ["Conv2d", "AvgPool2d", "Flatten"]


def test_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    net = LeNet300100().eval()
    torch.manual_seed(3)
    trace(net, torch.zeros(1, 1, 28, 28))
    assert torch.equal(torch.rand(2), expected)


def small(model: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A network of torchvision with statistics that are not those of a new one."""
    torch.manual_seed(0)
    net = model(num_classes=10, **options)
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    return net


def test_resnet18():
    graph = checked(small(torchvision.models.resnet18), 3, 32, 32)
    assert kinds(graph).count("Add") == 8 and kinds(graph).count("Conv2d") == 20 and "TorchOp" not in kinds(graph)


@pytest.mark.slow
def test_vgg16():
    graph = checked(small(torchvision.models.vgg16, init_weights=False), 3, 32, 32)
    assert kinds(graph).count("Conv2d") == 13 and kinds(graph).count("TorchOp") == 1  # pooling 1x1 up to 7x7


def test_networks_that_split_and_join():
    checked(small(torchvision.models.shufflenet_v2_x0_5), 3, 32, 32)
    checked(small(torchvision.models.squeezenet1_1), 3, 32, 32)


def test_an_output_that_depends_on_the_number_of_examples_alone():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.bias.expand(x.shape[0], 3)

    checked(Fixed(), *VECTOR)  # through the size of the batch it does
