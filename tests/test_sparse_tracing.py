"""Tracing: the graph against the model it was read from."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from sparse_net import Calls
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from vdbench.chain import VariationalDropoutChain
from vdbench.conversion import to_variational_dropout
from vdbench.models import LeNet5, LeNet300100
from vdbench.sparse.graph import Conv2d, Graph, Linear, TorchOp
from vdbench.sparse.tracing import trace
from vdbench.variational import VariationalDropoutConv2d, VariationalDropoutLinear


def checked(model: nn.Module, *shape: int) -> Graph:
    """A model's graph, found equal to it on batches of other sizes than the example's, which may change the model's
    own input: it gets a copy."""
    graph = trace(model.eval(), torch.zeros(2, *shape))
    for examples in (1, 5):
        batch = torch.randn(examples, *shape)
        expected = model(batch.clone()).detach()
        found = graph(batch.clone())
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert [op.name for op in graph.ops] == list(dict.fromkeys(op.name for op in graph.ops))
    values = {}
    for op in graph.ops:
        values[op.name] = batch if not op.inputs else op(*(values[name] for name in op.inputs))
        assert values[op.name].shape == (5, *op.shape)
    return graph


def kinds(graph: Graph) -> list[str]:
    return [type(op).__name__ for op in graph.ops[1:]]


IMAGE, VECTOR = (4, 6, 5), (6,)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(6, 3), VECTOR, "Linear"),
        (nn.Linear(6, 3, bias=False), VECTOR, "Linear"),
        (nn.Linear(5, 3), IMAGE, "TorchOp"),
        (nn.Conv2d(4, 6, 3), IMAGE, "Conv2d"),
        (nn.Conv2d(4, 6, (3, 2), (1, 2), (0, 1), dilation=(2, 1), groups=2, bias=False), IMAGE, "Conv2d"),
        (nn.Conv2d(4, 6, 3, padding="same"), IMAGE, "Conv2d"),
        (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(2, 1)), IMAGE, "Conv2d"),
        (nn.Conv2d(4, 6, 3, padding="valid"), IMAGE, "Conv2d"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE, "TorchOp"),
        (nn.BatchNorm2d(4), IMAGE, "Affine"),
        (nn.BatchNorm1d(6, affine=False, eps=0.1), VECTOR, "Affine"),
        (nn.ReLU(), IMAGE, "Clip"),
        (nn.ReLU6(inplace=True), IMAGE, "Clip"),
        (nn.Hardtanh(-0.5, 0.25), VECTOR, "Clip"),
        (nn.LeakyReLU(0.3), VECTOR, "LeakyReLU"),
        (nn.GELU(), VECTOR, "Pointwise"),
        (nn.GELU("tanh"), IMAGE, "Pointwise"),
        (nn.ELU(), VECTOR, "Pointwise"),
        (nn.ELU(0.5), VECTOR, "TorchOp"),
        (nn.SiLU(inplace=True), IMAGE, "Pointwise"),
        (nn.LogSoftmax(dim=1), VECTOR, "Softmax"),
        (nn.Softmax(dim=-1), VECTOR, "Softmax"),
        (nn.Softmax(dim=1), IMAGE, "Softmax"),
        (nn.Softmax(dim=-1), IMAGE, "TorchOp"),
        (nn.PReLU(4), IMAGE, "TorchOp"),
        (nn.LayerNorm(5), IMAGE, "TorchOp"),
        (nn.MaxPool2d(3, stride=2, padding=1, dilation=(1, 2), ceil_mode=True), IMAGE, "MaxPool2d"),
        (nn.MaxPool2d((2, 1)), IMAGE, "MaxPool2d"),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE, "AvgPool2d"),
        (nn.AvgPool2d(2, divisor_override=3), IMAGE, "AvgPool2d"),
        (nn.AdaptiveAvgPool2d(1), IMAGE, "AvgPool2d"),
        (nn.AdaptiveAvgPool2d((3, None)), IMAGE, "AvgPool2d"),
        (nn.AdaptiveAvgPool2d((2, 2)), IMAGE, "AvgPool2d"),  # windows of 3 out of 5 columns, from 0 and from 2
        (nn.AdaptiveAvgPool2d((4, 1)), IMAGE, "TorchOp"),
        (nn.AdaptiveAvgPool2d(7), IMAGE, "TorchOp"),
        (nn.AdaptiveMaxPool2d((2, 1)), IMAGE, "MaxPool2d"),
        (nn.AdaptiveAvgPool2d((6, 5)), IMAGE, ""),
        (nn.Flatten(), IMAGE, "Flatten"),
        (nn.Flatten(), VECTOR, ""),
        (nn.Flatten(2), IMAGE, "Reshape"),
        (nn.Dropout(), VECTOR, ""),
        (nn.Dropout2d(inplace=True), IMAGE, ""),
        (nn.Identity(), VECTOR, ""),
        (Calls(lambda x, w: F.linear(x, w), w=torch.randn(3, 6)), VECTOR, "Linear"),
        (Calls(lambda x, w, b: F.conv2d(x, w, b, 2), w=torch.ones(3, 4, 2, 2), b=torch.ones(3)), IMAGE, "Conv2d"),
        (Calls(lambda x, w, m: F.linear(x, w * (m > 0)), w=torch.randn(3, 6), m=torch.randn(3, 6)), VECTOR, "Linear"),
        (Calls(F.relu_), IMAGE, "Clip"),
        (Calls(lambda x: x.clamp(max=0.5)), VECTOR, "Clip"),
        (Calls(lambda x: torch.clamp(x, -0.1, 0.5)), VECTOR, "Clip"),
        (Calls(lambda x: x.clamp(0.5, -0.5)), VECTOR, "TorchOp"),
        (Calls(lambda x: F.hardtanh(x, inplace=True)), VECTOR, "Clip"),
        (Calls(lambda x: F.leaky_relu(x, 0.2)), VECTOR, "LeakyReLU"),
        (Calls(lambda x: F.max_pool2d(x, 2, ceil_mode=True)), IMAGE, "MaxPool2d"),
        (Calls(lambda x: F.avg_pool2d(x, x.size()[2:])), IMAGE, "AvgPool2d"),
        (Calls(lambda x: F.adaptive_avg_pool2d(x, (2, 1))), IMAGE, "AvgPool2d"),
        (Calls(lambda x: F.dropout(x, training=False)), VECTOR, ""),
        (Calls(lambda x: x.mean((2, 3))), IMAGE, "AvgPool2d Flatten"),
        (Calls(lambda x: torch.mean(x, dim=[-1, -2], keepdim=True)), IMAGE, "AvgPool2d"),
        (Calls(lambda x: x.mean(1)), IMAGE, "TorchOp"),
        (Calls(lambda x: torch.flatten(x, 1)), IMAGE, "Flatten"),
        (Calls(lambda x: x.view(x.size(0), -1)), IMAGE, "Flatten"),
        (Calls(lambda x: x.reshape(x.shape[0], -1)), IMAGE, "Flatten"),
        (nn.Unflatten(1, (2, 3)), VECTOR, "Reshape"),
        (Calls(lambda x: x.view(x.shape[0], 2, 3)), VECTOR, "Reshape"),
        (Calls(lambda x: x.unsqueeze(1)), (6, 5), "Reshape"),
        (Calls(lambda x: x.view(-1, 30)), (6, 5), "Reshape"),
        (nn.ZeroPad2d((1, 0, 2, 1)), IMAGE, "Pad"),
        (nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 6, 3, 2, padding=(0, 1))), IMAGE, "Conv2d"),
        (Calls(lambda x, w: F.conv2d(F.pad(x, (2, 1)), w), w=torch.randn(3, 4, 2, 2)), IMAGE, "Conv2d"),
        (nn.ConstantPad2d(1, 0.5), IMAGE, "TorchOp"),
        (Calls(lambda x: F.pad(x, (1, -1))), IMAGE, "TorchOp"),
        (Calls(lambda x: F.pad(x, (1, 1, 1, 1), "reflect")), IMAGE, "TorchOp"),
        (Calls(lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))), IMAGE, "TorchOp"),
        (Calls(lambda x: F.pad(x, (1, 1))), VECTOR, "TorchOp"),
        (Calls(lambda x: x.contiguous(memory_format=torch.channels_last).to(torch.float32)), IMAGE, ""),
        (Calls(lambda x: x.double().exp().float()), VECTOR, "TorchOp"),
        (Calls(lambda x: x + x), VECTOR, "Add"),
        (Calls(lambda x: torch.add(x, x.relu(), alpha=2)), VECTOR, "Clip Affine Add"),
        (Calls(lambda x: x - x.relu()), IMAGE, "Clip Affine Add"),
        (Calls(lambda x: torch.add(input=x, other=1)), VECTOR, "TorchOp"),
        (Calls(lambda x: x + x.mean((2, 3), keepdim=True)), IMAGE, "AvgPool2d Expand Add"),
        (Calls(lambda x: F.adaptive_avg_pool2d(x, 1).sigmoid() * x), IMAGE, "AvgPool2d Pointwise Expand Multiply"),
        (Calls(lambda x: x * x[:, :1]), IMAGE, "TorchOp TorchOp"),
        (Calls(lambda x: torch.mul(x, x)), IMAGE, "Multiply"),
        (Calls(lambda x: x / (x * x + 1)), VECTOR, "Multiply Affine TorchOp"),
        (Calls(lambda x: 1 + x), VECTOR, "Affine"),
        (Calls(lambda x: 1 - x / 3), IMAGE, "Affine Affine"),
        (Calls(lambda x: -x * 2), VECTOR, "Affine Affine"),
        (Calls(lambda x: 2 / (x.relu() + 1)), VECTOR, "Clip Affine TorchOp"),
        (Calls(lambda x: torch.clamp(x / 0, -1, 1)), VECTOR, "TorchOp Clip"),
        (Calls(lambda x, m, s: (x - m) / s, m=torch.rand(4, 1, 1), s=torch.ones(1, 4, 1, 1)), IMAGE, "Affine Affine"),
        (Calls(lambda x, m: x - m, m=torch.randn(6, 5)), IMAGE, "TorchOp"),
        (Calls(lambda x, m: x - m, m=torch.randn(1, 1, 5)), IMAGE, "TorchOp"),
        (Calls(lambda x, m: x.add(m, alpha=3), m=torch.randn(())), IMAGE, "Affine"),
        (Calls(lambda x, m: x * m, m=torch.randn(4, 1, 1)), (1, 6, 5), "TorchOp"),
        (Calls(lambda x: torch.add(2, x)), VECTOR, "Affine"),
        (Calls(lambda x, b: b + x, b=torch.randn(6)), VECTOR, "Affine"),
        (Calls(lambda x, b: torch.clamp(b, max=x), b=torch.randn(6)), VECTOR, "TorchOp"),
        (Calls(lambda x: sum([x, x.relu()])), VECTOR, "Clip Affine Add"),
        (Calls(lambda x: 1 - x * x.sigmoid()), VECTOR, "Pointwise Multiply Affine"),
        (Calls(lambda x, scale: x * scale, scale=torch.randn(6)), VECTOR, "Affine"),
        (Calls(lambda x: torch.cat([x, x.relu(), x], dim=1)), IMAGE, "Clip Concat"),
        (Calls(lambda x: torch.cat([x, x], -3)), IMAGE, "Concat"),
        (Calls(lambda x: torch.cat([x, x], 2)), IMAGE, "TorchOp"),
        (Calls(lambda x: torch.cat(torch.chunk(x, 2, 1)[::-1], 1)), VECTOR, "TorchOp"),
        (Calls(lambda x: torch.where(x > 0, x, x.exp())), VECTOR, "TorchOp TorchOp"),
        (Calls(lambda x: x.sum((1, 2, 3))), IMAGE, "TorchOp"),
        (Calls(lambda x: F.softmax(x.mul_(2), dim=1)), VECTOR, "Affine Softmax"),
    ],
)  # fmt: skip
def test_operations(layer, shape, expected):
    for name, buffer in layer.named_buffers():
        if name.startswith("running"):
            buffer.uniform_(0.5, 2)
    assert kinds(checked(layer, *shape)) == expected.split()


def test_what_a_call_gives_back_as_it_was_is_no_operation():
    depth = torchvision.ops.StochasticDepth(0.5, "row")
    assert kinds(checked(nn.Sequential(nn.ReLU(), depth, nn.ReLU()), *IMAGE)) == ["Clip", "Clip"]
    assert kinds(checked(Calls(lambda x: F.selu(x, True)), *VECTOR)) == ["TorchOp"]  # given back, but not as it was


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


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x, inplace=True) + x,
        lambda x: x.relu_() + x.contiguous(),
        lambda x: (x.clamp_(-0.1, 0.1), x + x)[1],
        lambda x: (x.mul_(3), x.relu())[1],
        lambda x: x.sigmoid_() * x,
        lambda x: (y := x + 0, y.tanh_(), x + y)[2],
    ],
)
def test_calls_that_overwrite_their_input_change_what_is_read_afterwards(function):
    checked(Calls(function), *VECTOR)


def test_calls_whose_result_is_not_used_leave_no_operation():
    assert kinds(checked(Calls(lambda x: (x.exp(), x.relu())[1]), *VECTOR)) == ["Clip"]


def test_numbers_that_depend_on_the_data_are_computed_anew():
    graph = checked(Calls(lambda x: x + (x.max() > 50).item()), *VECTOR)
    assert torch.equal(graph(torch.full((1, 6), 99.0)), torch.full((1, 6), 100.0))


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
