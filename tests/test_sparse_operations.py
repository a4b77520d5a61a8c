"""Operations traced one by one: what each becomes in the graph, and what is left of calls that are none."""

import pytest
import torch
import torchvision
from sparse_graphs import IMAGE, VECTOR, checked, kinds
from sparse_net import Calls
from torch import nn
from torch.nn import functional as F


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(6, 3), VECTOR, "Linear"),
        (nn.Linear(6, 3, bias=False), VECTOR, "Linear"),
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
        (Calls(lambda x, w: F.linear(x, w), w=torch.randn(6)), VECTOR, "TorchOp"),
        (Calls(lambda x, w, b: F.linear(x, w, b), w=torch.randn(3, 6), b=torch.randn(1)), VECTOR, "TorchOp"),
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


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x, inplace=True) + x,
        lambda x: x.relu_() + x.contiguous(),
        lambda x: (x.clamp_(-0.1, 0.1), x + x)[1],
        lambda x: (x.mul_(3), x.relu())[1],
        lambda x: x.sigmoid_() * x,
        lambda x: (y := x + 0, y.tanh_(), x + y)[2],
        lambda x: (y := x.exp().view(-1, 2, 3).transpose(1, 2), z := y.contiguous(), z.mul_(2), y + z)[3],
        lambda x: (y := x.exp(), halves := y.chunk(2, 1), first := halves[0].mul_(2), first + halves[1])[3],
        lambda x: (y := x + 0, z := y.view(-1, 2, 3).relu_(), z.view(y.shape[0], 6))[2],
    ],
)
def test_calls_that_overwrite_their_input_change_what_is_read_afterwards(function):
    checked(Calls(function), *VECTOR)


def test_calls_whose_result_is_not_used_leave_no_operation():
    assert kinds(checked(Calls(lambda x: (x.exp(), x.relu())[1]), *VECTOR)) == ["Clip"]


def test_numbers_that_depend_on_the_data_are_computed_anew():
    graph = checked(Calls(lambda x: x + (x.max() > 50).item()), *VECTOR)
    assert torch.equal(graph(torch.full((1, 6), 99.0)), torch.full((1, 6), 100.0))
