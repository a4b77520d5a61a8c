"""Compaction of PyTorch's networks: what goes of channels, groups, sums and normalisations, and what has to stay."""

import pytest
import torch
import torchvision
from sparse_graphs import assert_same, size
from torch import nn

from vdbench.sparse.compact import compact
from vdbench.sparse.graph import Affine, Clip, Conv2d, Graph, Input
from vdbench.sparse.tracing import trace


def traced(net: nn.Module, *shape: int) -> tuple[Graph, Graph, torch.Tensor]:
    batch = torch.randn(4, *shape)
    graph = trace(net.eval(), batch)
    compacted = compact(graph)
    assert_same(compacted, graph, batch)
    return graph, compacted, batch


def zero(parameter: torch.Tensor, index) -> None:
    with torch.no_grad():
        parameter[index] = 0


def test_a_channel_is_many_columns_after_flatten():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))
    zero(net[0].weight, 1)
    zero(net[3].weight, (slice(None), slice(18, 27)))
    zero(net[3].weight, (slice(None), slice(3, 6)))
    _, compacted, _ = traced(net, 1, 4, 4)
    assert compacted["0"].weight.shape == (1, 1, 2, 2) and compacted["3"].weight.shape == (4, 9)
    assert compacted.removed["0"] == "2 of 3 units (1 constant, 1 unread)"
    assert compacted.removed["3"] == "3 of 9 inputs unread"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        return self.c(a + self.b(a))


def test_a_sum_loses_units_where_both_of_its_parts_do():
    net = Residual()
    zero(net.c.weight, (slice(None), [0, 1]))
    zero(net.b.weight, (slice(None), 0))  # nobody reads a's unit 0, but b reads its unit 1
    _, compacted, _ = traced(net, 3)
    assert compacted["a"].weight.shape == (3, 3) and compacted["b"].weight.shape == (3, 3)
    assert not compacted["b"].weight[0].any()  # kept for its place only


def test_gates_go_with_the_channels_that_they_are_for():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.last = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.last(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())

    net = Gated()
    zero(net.last.weight, (slice(None), slice(2)))
    zero(net.gate.weight, (slice(None), slice(4)))
    _, compacted, _ = traced(net, 2, 6, 5)
    assert compacted["gate"].shape == (4, 1, 1) and compacted["mul"].shape == compacted["mul.maps"].shape == (4, 4, 3)
    assert compacted["first"].shape == (4, 4, 3)


def test_a_concatenation_loses_units_of_each_part():
    class Parts(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.a(x)
            return self.wide(torch.cat([a, self.b(a)], dim=1))

    net = Parts()
    net.wide = nn.Linear(8, 2)
    zero(net.wide.weight, (slice(None), [1, 4, 5]))
    zero(net.b.weight, (slice(None), 1))
    _, compacted, _ = traced(net, 3)
    assert [compacted[name].shape for name in ("a", "b", "cat")] == [(3,), (2,), (5,)]


def test_groups_go_as_a_whole():
    net = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=3, padding=1), nn.Conv2d(6, 2, 1))
    zero(net[2].weight, (slice(None), [0, 1, 2]))
    _, compacted, _ = traced(net, 2, 5, 5)
    assert compacted["1"].groups == 2 and compacted["1"].weight.shape == (4, 2, 3, 3)
    assert not compacted["1"].weight[0].any()  # its group has another that is read
    assert compacted["0"].shape == (4, 5, 5)


def test_depthwise_channels_go_one_by_one():
    net = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1))
    zero(net[1].weight, [0, 3])
    _, compacted, _ = traced(net, 2, 5, 5)
    assert compacted["1"].groups == 4 and compacted["0"].shape == (4, 5, 5) and compacted["2"].bias.shape == (2,)


def test_normalisations_go_into_the_layer_before_them():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    net.train()(3 * torch.randn(8, 2, 5, 5) + 1)
    _, compacted, _ = traced(net, 2, 5, 5)
    assert [type(op) for op in compacted.ops] == [Input, Conv2d, Clip] and compacted.ops[1].name == "0"
    traced(net[:2], 2, 5, 5)  # the normalisation may be the output


@pytest.mark.parametrize(("reader", "stays"), [(nn.Conv2d(2, 3, 3), False), (nn.Conv2d(2, 3, 3, padding=1), True)])
def test_normalisations_without_a_layer_before_them_go_into_the_next_if_it_does_not_pad(reader, stays):
    net = nn.Sequential(nn.BatchNorm2d(2), reader)
    net.train()(3 * torch.randn(8, 2, 5, 5) + 1)
    _, compacted, _ = traced(net, 2, 5, 5)
    assert any(isinstance(op, Affine) for op in compacted.ops) == stays


def test_a_layer_that_others_read_does_not_take_a_normalisation():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(x)
            return x + self.norm(x)

    net = Twice()
    net.train()(torch.randn(8, 3))
    graph, compacted, _ = traced(net, 3)
    assert size(compacted) == size(graph)


def test_other_operations_see_all_of_their_inputs():
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2))
    zero(net[0].weight, 1)
    zero(net[2].weight, (slice(None), 2))
    _, compacted, _ = traced(net, 3)
    assert compacted["0"].shape == (4,) and compacted["1"].shape == (4,)
    assert not compacted["0"].weight[[1]].any()


@pytest.mark.parametrize("shape", [(3,), (2, 6, 6)])
def test_networks_without_any_weight_left(shape):
    layers = [nn.Linear(3, 5)] if len(shape) == 1 else [nn.Conv2d(2, 5, 3, padding=1), nn.MaxPool2d(6), nn.Flatten()]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    for layer in net:
        if hasattr(layer, "weight"):
            zero(layer.weight, slice(None))
    _, compacted, batch = traced(net, *shape)
    assert sum(op.weight_count for op in compacted.ops) == 0
    assert torch.equal(compacted(batch), net[-1].bias.detach().expand(4, 2))


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision(model, density):
    torch.manual_seed(0)
    net = torchvision.models.get_model(model, weights=None, num_classes=10).eval()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            live = torch.rand_like(layer.weight) < density
            live[torch.rand(len(live)) < 0.3] = False
            with torch.no_grad():
                layer.weight *= 2 * live / max(density, 0.01) ** 0.5
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.bias)
    graph, compacted, _ = traced(net, 3, 32, 32)
    before, after = (sum(op.weight_count for op in g.ops) for g in (graph, compacted))
    assert after < 0.95 * before or before == 0
    assert len(compacted.ops) < len(graph.ops)
