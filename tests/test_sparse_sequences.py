"""Layers on sequences, and on values with their channels last: what they become in the graph, and that it is exact."""

import numpy as np
import pytest
import torch
import torchvision
from sparse_graphs import IMAGE, assert_same, checked, kinds
from sparse_net import Calls
from torch import Tensor, nn
from torch.nn import functional as F

from vdbench import compile_sparse
from vdbench.sparse.compact import compact
from vdbench.sparse.engine import CompiledNet
from vdbench.sparse.graph import LinearAtPlaces
from vdbench.sparse.layout import array_shape
from vdbench.sparse.plan import Network, measure
from vdbench.sparse.running import Runner
from vdbench.sparse.stencil import Stencil
from vdbench.sparse.threads import Pool
from vdbench.sparse.tracing import trace

WORDS, SOUND = (7, 6), (4, 9)  # (places, channels), (channels, places)
LINEAR = "ChannelsFirst LinearAtPlaces ChannelsLast"


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(6, 3), WORDS, LINEAR),
        (nn.Linear(6, 3, bias=False), (1, 6), LINEAR),
        (nn.Linear(5, 3), IMAGE, LINEAR),
        (nn.Linear(3, 2), (2, 4, 5, 3), LINEAR),
        (nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 3)), WORDS,
         "ChannelsFirst LinearAtPlaces Pointwise LinearAtPlaces ChannelsLast"),
        (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), IMAGE,
         "ChannelsFirst LinearAtPlaces Clip LinearAtPlaces ChannelsLast"),
        (nn.Sequential(nn.Linear(6, 3), nn.Softmax(dim=-1)), WORDS, f"{LINEAR} TorchOp"),
        (nn.Sequential(nn.Linear(6, 3), nn.Flatten(), nn.Linear(21, 2)), WORDS, f"{LINEAR} Reshape Linear"),
        (nn.Sequential(nn.Linear(6, 3), nn.Unflatten(2, (3, 1))), WORDS, f"{LINEAR} Reshape"),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 3)), WORDS, f"TorchOp {LINEAR}"),
        (Calls(lambda x, w: x + F.linear(x, w).relu(), w=torch.randn(6, 6)), WORDS,
         "ChannelsFirst LinearAtPlaces Clip Add ChannelsLast"),
        (Calls(lambda x, w: F.linear(x, w) - 2 * x, w=torch.randn(6, 6)), WORDS,
         "ChannelsFirst LinearAtPlaces TorchOp ChannelsFirst Affine Add ChannelsLast"),
        (Calls(lambda x, w, s: F.linear(x, w) * s, w=torch.randn(3, 6), s=torch.randn(3)), WORDS,
         "ChannelsFirst LinearAtPlaces Affine ChannelsLast"),
        (Calls(lambda x, w, s: F.linear(x, w) * s, w=torch.randn(7, 6), s=torch.randn(7, 1)), WORDS,
         f"{LINEAR} TorchOp"),
        (Calls(lambda x, w, s: F.linear(x, w) + s, w=torch.randn(4, 5), s=torch.randn(4, 1, 1)), IMAGE,
         f"{LINEAR} Affine"),
        (Calls(lambda x, w, s: F.linear(x, w) * s, w=torch.randn(3, 6), s=torch.randn(1, 1, 3)), WORDS,
         "ChannelsFirst LinearAtPlaces Affine ChannelsLast"),
        (Calls(lambda x, w, s: F.linear(x, w) * s, w=torch.randn(1, 6), s=torch.randn(7, 1)), WORDS,
         f"{LINEAR} TorchOp"),
        (nn.Sequential(nn.Linear(6, 8), nn.MaxPool1d(2)), WORDS, f"{LINEAR} Reshape MaxPool2d Reshape"),
        (nn.Sequential(nn.Linear(6, 7), nn.Conv1d(7, 7, 3)), WORDS, f"{LINEAR} Reshape Conv2d Reshape"),
        (nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7)), WORDS, f"{LINEAR} Reshape Affine Reshape"),
        (nn.Sequential(nn.Conv1d(4, 3, 2), nn.Linear(8, 5), nn.ReLU(), nn.Conv1d(3, 2, 2)), SOUND,
         "Reshape Conv2d Reshape ChannelsFirst LinearAtPlaces Clip ChannelsLast Reshape Conv2d Reshape"),
        (Calls(lambda x, w: F.linear(x, w), w=torch.randn(6)), WORDS, "TorchOp"),
        (Calls(lambda x, w: torch.cat([x, F.linear(x[:, :0], w)], 1), w=torch.randn(6, 6)), WORDS,
         "TorchOp TorchOp TorchOp"),
        (Calls(lambda x, w, b: F.linear(x, w, b), w=torch.randn(3, 6), b=torch.randn(1)), WORDS, "TorchOp"),
        (Calls(lambda x, w: F.linear(x, w).mean(1), w=torch.randn(3, 6)), WORDS,
         "ChannelsFirst LinearAtPlaces AvgPool2d Flatten"),
        (Calls(lambda x, w: F.linear(x, w).mean((1, 2)), w=torch.randn(3, 5)), IMAGE,
         "ChannelsFirst LinearAtPlaces AvgPool2d Flatten"),
        (Calls(lambda x, w: F.linear(x, w).mean(-1), w=torch.randn(3, 6)), WORDS, f"{LINEAR} TorchOp"),
        (Calls(lambda x, w: F.linear(x, w).mean(1, keepdim=True), w=torch.randn(3, 6)), WORDS, f"{LINEAR} TorchOp"),
        (nn.Conv1d(4, 6, 3), SOUND, "Reshape Conv2d Reshape"),
        (nn.Conv1d(4, 6, 3, 2, 2, dilation=2, groups=2, bias=False), SOUND, "Reshape Conv2d Reshape"),
        (nn.Conv1d(4, 6, 4, padding="same", dilation=2), SOUND, "Reshape Conv2d Reshape"),
        (nn.Conv1d(4, 6, 3, padding="valid"), SOUND, "Reshape Conv2d Reshape"),
        (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), SOUND, "TorchOp"),
        (nn.BatchNorm1d(4), SOUND, "Reshape Affine Reshape"),
        (nn.MaxPool1d(3, 2, 1, 2, ceil_mode=True), SOUND, "Reshape MaxPool2d Reshape"),
        (nn.MaxPool1d(2), SOUND, "Reshape MaxPool2d Reshape"),
        (Calls(lambda x: torch.max_pool1d(x, 2, ())), SOUND, "Reshape MaxPool2d Reshape"),
        (Calls(lambda x: F.avg_pool1d(x, kernel_size=3, stride=2, padding=1)), SOUND, "Reshape AvgPool2d Reshape"),
        (nn.AvgPool1d(3, 2, 1, True, False), SOUND, "Reshape AvgPool2d Reshape"),
        (nn.AvgPool1d(4), SOUND, "Reshape AvgPool2d Reshape"),
        (nn.AdaptiveAvgPool1d(1), SOUND, "Reshape AvgPool2d Reshape"),
        (nn.AdaptiveMaxPool1d(3), SOUND, "Reshape MaxPool2d Reshape"),
        (nn.AdaptiveAvgPool1d(4), SOUND, "Reshape AvgPool2d Reshape"),
        (nn.AdaptiveAvgPool1d(6), SOUND, "TorchOp"),
        (nn.Sequential(nn.AdaptiveAvgPool1d(9), nn.ReLU()), SOUND, "TorchOp"),
        (nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(),
                       nn.Linear(18, 2)), SOUND, "Reshape Conv2d Affine Clip MaxPool2d Flatten Linear"),
        (Calls(lambda x, w: F.conv1d(x, w).relu().mean(2), w=torch.randn(3, 4, 2)), SOUND,
         "Reshape Conv2d Clip AvgPool2d Flatten"),
        (Calls(lambda x, w: F.conv1d(x, w, padding=1) + x, w=torch.randn(4, 4, 3)), SOUND,
         "Reshape Conv2d Add Reshape"),
        (Calls(lambda x, w, s: F.conv1d(x, w) * s, w=torch.randn(3, 4, 2), s=torch.randn(3, 1)), SOUND,
         "Reshape Conv2d Affine Reshape"),
        (Calls(lambda x, w, s: F.conv1d(x, w) * s, w=torch.randn(8, 4, 2), s=torch.randn(8)), SOUND,
         "Reshape Conv2d Reshape TorchOp"),
        (Calls(lambda x, v, w: F.linear(F.conv1d(x, v).transpose(1, 2), w).transpose(1, 2),
               v=torch.randn(5, 4, 2), w=torch.randn(3, 5)), SOUND, "Reshape Conv2d LinearAtPlaces Reshape"),
        (Calls(lambda x, w: F.linear(x.permute(0, 2, 3, 1), w).relu().permute(0, 3, 1, 2), w=torch.randn(3, 4)), IMAGE,
         "LinearAtPlaces Clip"),
        (Calls(lambda x: x.permute(0, 3, 1, 2)), IMAGE, "ChannelsFirst"),
        (Calls(lambda x: torch.permute(x, (0, 2, 3, 1))), IMAGE, "ChannelsLast"),
        (Calls(lambda x: x.permute(0, 2, 1, 3)), IMAGE, "TorchOp"),
        (Calls(lambda x: x.transpose(-1, -2)), IMAGE, "TorchOp"),
        (Calls(lambda x: torch.transpose(x, -1, 1)), WORDS, "Reshape ChannelsLast"),
        (Calls(lambda x, w: F.linear(x, w) + F.conv1d(x, w[:, :, None]), w=torch.randn(6, 6)), (6, 6),
         "ChannelsFirst LinearAtPlaces Reshape Conv2d Reshape ChannelsFirst Add ChannelsLast"),
    ],
)  # fmt: skip
def test_operations(layer, shape, expected):
    for name, buffer in layer.named_buffers():
        if name.startswith("running"):
            buffer.uniform_(0.5, 2)
    assert kinds(checked(layer, *shape)) == expected.split()


class Mixer(nn.Module):
    """Layers along the channels of a sequence and, transposed, along its places, with sums around them."""

    def __init__(self, places: int = 7, channels: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.places = nn.Sequential(nn.Linear(places, 20), nn.GELU(), nn.Linear(20, places))
        self.channels = nn.Sequential(nn.Linear(channels, 30), nn.ReLU(), nn.Linear(30, channels))
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(self.norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm(x))
        return self.head(x.mean(1))


def sound() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(8, 16, 3, groups=2), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 3)),
    )


def thinned(model: nn.Module, density: float) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= torch.rand_like(parameter) < density
    return model.eval()


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(Mixer, WORDS), (sound, SOUND), (lambda: torchvision.models.convnext.CNBlock(6, 1e-1, 0.1), (6, 5, 4))],
    ids=["mixer", "sound", "convnext"],
)
def test_whole_networks(make, shape, density):
    model, batch = thinned(make(), density), torch.randn(35, *shape)
    net = compile_sparse(model, batch[:1])
    for count in (1, 2, 16, 35):
        assert_same(net, model, batch[:count])


def test_units_between_linear_layers_are_removed():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight[2:5] = 0  # constant
        model[2].weight[:, 6] = 0  # unread
    graph = compact(checked(model, *WORDS))
    assert graph["0"].shape == (4, 1, 7) and graph.removed["0"].startswith("4 of 8 units")
    batch = torch.randn(5, *WORDS)
    assert_same(graph, model, batch)


def test_constants_that_differ_from_place_to_place_become_a_map_of_biases():
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x)).permute(0, 2, 3, 1))

    model = Behind().eval()
    with torch.no_grad():
        model.first.weight[1] = 0
        model.second.weight[2, [0, 2, 3]] = 0
    graph = compact(checked(model, 3, 6, 6))
    (layer,) = (op for op in graph.ops if isinstance(op, LinearAtPlaces))
    assert layer.bias.shape == (2, 6, 6)
    assert_same(graph, model, torch.randn(5, 3, 6, 6))


@pytest.mark.parametrize("make", [sound, lambda: nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 3))])
def test_files(make, tmp_path):
    model, batch = thinned(make(), 0.2), torch.randn(20, *SOUND)
    compile_sparse(model, batch[:1]).save(tmp_path / "net.npz")
    assert_same(CompiledNet.load(tmp_path / "net.npz"), model, batch)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), WORDS),
        (nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)), (4, 3, 6)),
        (nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2)), SOUND),
        (Calls(lambda x, w: F.linear(x.transpose(1, 2), w), w=torch.randn(3, 7)), (7, 9)),
    ],
    ids=["words", "image", "sound", "transposed"],
)
def test_copies_in_and_out_put_axes_in_order(model, shape, threads):
    """Around what runs natively there is nothing in PyTorch."""
    model, batch = thinned(model, 0.3), torch.randn(35, *shape)
    graph = compact(trace(model, batch[:1]))
    for single in (True, False):
        network = Network(graph, single=single)
        assert all(isinstance(item, Stencil) for item in network.items)
        plan = measure(network)
        for item in plan.items:
            item.native = True
        runner, pool = Runner(network, plan), Pool(threads)
        for count in (1, 16, 35):
            given = batch[:count].numpy()
            outs = [runner(given, pool), runner.stretches[0]([as_read(network, given)], pool, True)[0]]
            for out in outs:
                expected = model(batch[:count]).detach()
                torch.testing.assert_close(torch.from_numpy(out).reshape(expected.shape), expected, rtol=0, atol=1e-5)


def as_read(network: Network, batch: np.ndarray) -> np.ndarray:
    return batch.reshape(len(batch), *array_shape(network.graph.input.shape, network.input in network.channels_last))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.transpose(1, 2), (5, 4)),
        (lambda x: x.permute(0, 2, 3, 1), (5, 3, 4)),
        (lambda x: x.permute(0, 3, 1, 2), (5, 3, 4)),
        (lambda x: x.permute(0, 3, 1, 2).flatten(1), (5, 3, 4)),
        (lambda x: x.permute(0, 3, 1, 2).flatten(1).unflatten(1, (6, 10)), (5, 3, 4)),
        (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), (5, 3, 4)),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1), (5, 3, 4)),
        (lambda x: x.flatten(1).unflatten(1, (6, 10)), (5, 3, 4)),
    ],
)
def test_networks_that_do_little_but_change_the_order_of_axes(function, shape, relu):
    model, batch = Calls(lambda x: function(x).relu() if relu else function(x)).eval(), torch.randn(20, *shape)
    net = compile_sparse(model, batch[:1])
    for count in (1, 20):
        assert torch.equal(net(batch[:count]), model(batch[:count]))
