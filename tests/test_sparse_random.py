"""Random networks with kernels picked at random, against PyTorch: nothing may depend on what is fastest here."""

import itertools
import math
import random

import pytest
import torch
from sparse_net import assert_same
from torch import Tensor, nn

from vdbench.sparse import CompiledNet, compile_sparse, engine, plan
from vdbench.sparse.plan import PYTORCH

pytestmark = pytest.mark.usefixtures("engine_cache")

SMOOTH = [nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ELU(), nn.Hardsigmoid(), nn.Hardswish()]


class RandomNet(nn.Module):
    """Convolutions, pooling, activations, normalisation, sums and concatenations of earlier values with what fits them,
    in any order; then perhaps a vector, and what is done to those."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.pick, self.steps, self.layers = random.Random(seed), [], nn.ModuleList()
        self.shape = self.pick.randint(1, 5), self.pick.randint(1, 13), self.pick.randint(1, 36)
        self.shapes = [self.shape]
        for _ in range(self.pick.randint(2, 7)):
            self.add(
                self.pick.choice(
                    [self.convolution, self.pool, self.channelwise, self.sum, self.scaling, self.concatenation]
                )
            )
        if self.pick.random() < 0.6:
            self.add(lambda shape: nn.Flatten())
            for _ in range(self.pick.randint(0, 4)):
                self.add(
                    self.pick.choice(
                        [self.linear, self.channelwise, self.sum, self.product, self.scaling, self.concatenation]
                    )
                )

    def add(self, make) -> None:
        source = self.pick.choice([len(self.shapes) - 1, self.pick.randrange(len(self.shapes))])
        if len(self.shapes[-1]) == 1:
            source = len(self.shapes) - 1
        made = make(self.shapes[source])
        if isinstance(made, nn.Module):
            try:
                shape = tuple(made.eval()(torch.zeros(1, *self.shapes[source])).shape[1:])
            except RuntimeError:  # nothing would be left
                return
            self.layers.append(made)
            self.steps.append((made, [source]))
        else:
            function, others = made
            self.steps.append((function, [source, *others]))
            shape = tuple(function(*(torch.zeros(1, *self.shapes[k]) for k in (source, *others))).shape[1:])
        self.shapes.append(shape)

    def convolution(self, shape) -> nn.Module:
        pick, channels = self.pick, shape[0]
        groups = pick.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
        sizes = {
            "kernel_size": (pick.randint(1, 4), pick.randint(1, 5)),
            "stride": (pick.choice([1, 1, 2, 3]), pick.choice([1, 1, 2, 3, 4])),
            "padding": (pick.randint(0, 3), pick.randint(0, 3)),
            "dilation": (pick.randint(1, 2), pick.randint(1, 2)),
        }
        layer = nn.Conv2d(channels, groups * pick.randint(1, 5), groups=groups, bias=pick.random() < 0.7, **sizes)
        around = nn.ZeroPad2d([pick.randint(0, 2) for _ in range(4)])
        return nn.Sequential(around, self.thinned(layer)) if pick.random() < 0.2 else self.thinned(layer)

    def linear(self, shape) -> nn.Module:
        return self.thinned(nn.Linear(shape[0], self.pick.choice([shape[0], self.pick.randint(1, 40)])))

    def thinned(self, layer: nn.Module) -> nn.Module:
        with torch.no_grad():
            layer.weight *= torch.rand_like(layer.weight) < self.pick.choice([0.0, 0.1, 0.3, 1.0])
        return layer

    def pool(self, shape) -> nn.Module:
        pick = self.pick
        size = pick.randint(1, 3), pick.randint(1, 4)
        options = {
            "stride": pick.choice([size, (pick.randint(1, 3), pick.randint(1, 4))]),
            "padding": pick.choice([(0, 0), (size[0] // 2, size[1] // 2)]),
            "ceil_mode": pick.random() < 0.3,
        }
        return nn.AvgPool2d(size, **options) if pick.random() < 0.4 else nn.MaxPool2d(size, **options)

    def channelwise(self, shape) -> nn.Module:
        norm = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0])
        nn.init.normal_(norm.running_mean)
        smooth = self.pick.choice(SMOOTH)
        return self.pick.choice([nn.ReLU(), nn.LeakyReLU(0.1), nn.Hardtanh(-0.5, 0.5), nn.ReLU6(), smooth, norm])

    def sum(self, shape):
        how = self.pick.choice([torch.add, torch.sub, lambda a, b: torch.add(a, b, alpha=0.5)])
        return how, [self.pick.choice([k for k, other in enumerate(self.shapes) if other == shape])]

    def product(self, shape):
        if len(shape) == 3 and self.pick.random() < 0.5:
            return lambda x: x.mean((2, 3), keepdim=True).sigmoid() * x, []
        return torch.mul, [self.pick.choice([k for k, other in enumerate(self.shapes) if other == shape])]

    def scaling(self, shape):
        factors = torch.randn(self.pick.choice([shape[0], 1]), *[1] * (len(shape) - 1))
        return self.pick.choice([lambda x: 1 - x / 3, lambda x: factors - x, lambda x: x * factors]), []

    def concatenation(self, shape):
        fitting = [k for k, other in enumerate(self.shapes) if other[1:] == shape[1:] and len(other) == len(shape)]
        return lambda *values: torch.cat(values, 1), [self.pick.choice(fitting)]

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step, sources in self.steps:
            values.append(step(*(values[k] for k in sources)))
        return values[-1]


@pytest.fixture
def any_way(monkeypatch):
    """Every kernel is the fastest as often as any other, and PyTorch runs only what none can."""
    pick = random.Random(0)

    def seconds(run, limit=0.0) -> float:
        run()
        return pick.random()

    monkeypatch.setattr(plan, "fastest", seconds)
    order = itertools.count(1)
    monkeypatch.setattr(engine, "fastest", lambda run, limit=0.0: float(next(order)))  # our kernels are tried first
    monkeypatch.setattr(engine, "quickest", lambda ways, _: pick.choice(ways))


def checked(model: nn.Module, batch: Tensor, threads: int, caplog) -> CompiledNet:
    """The compiled net, which computes what the model does, all of the batch or less of it."""
    with torch.no_grad():
        expected = model.eval()(batch)
        net = compile_sparse(model, batch[:1], threads=threads)
        for count in (1, 2, 17, len(batch)):
            assert_same(net(batch[:count]), expected[:count])
    assert "do not compute" not in caplog.text
    return net


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("seed", range(60))
def test_random_networks(seed, caplog):
    model = RandomNet(seed)
    batch = torch.randn(300 if seed % 10 == 0 else 35, *model.shape)
    net = checked(model, batch, 1 + 2 * (seed % 2), caplog)
    assert all(item.native for item in net.plans["batch"][0].items if set(item.seconds) - {PYTORCH})


class Sum(nn.Module):
    """Of two convolutions, one of which reads what is larger than the other's input by its padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Conv2d(3, 3, 5, padding=2), nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.one(x) + nn.functional.avg_pool2d(x, 3, 1).repeat(1, 3, 1, 1)[:, :8] + self.other(x)


class Residual(nn.Module):
    """A sum of vectors, one of which is a map that was flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.layer = nn.Conv2d(3, 4, 3), nn.Linear(4 * 7 * 5, 4 * 7 * 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x).relu().flatten(1)
        return self.layer(x) + x


def flattened(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), *layers)


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize(
    "model",
    [
        *(nn.Conv2d(3, 8, 3, stride=stride) for stride in (2, 3, 4, (1, 3), (3, 1))),
        *(nn.Sequential(nn.ReLU(), pool(size)) for pool in (nn.MaxPool2d, nn.AvgPool2d) for size in (2, 3, (1, 4))),
        Sum(),
        Residual(),
        flattened(nn.ReLU()),
        flattened(nn.ReLU(), nn.BatchNorm1d(140), nn.ReLU(), nn.Linear(140, 5)),
        nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(189, 5)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_places_of_values_of_several_sizes(model, caplog):
    checked(model, torch.randn(35, 3, 9, 7), 1, caplog)


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("function", SMOOTH, ids=str)
@pytest.mark.parametrize("shape", [(40,), (4, 10, 1)], ids=["vectors", "maps"])
def test_functions_of_single_numbers(function, shape):
    """Over all sizes, of both signs, and where there is a NaN or an infinity."""
    layer = nn.Linear(40, 40) if len(shape) == 1 else nn.Conv2d(4, 4, 1)
    with torch.no_grad():
        nn.init.zeros_(layer.bias)
        nn.init.eye_(layer.weight.flatten(1))
    sizes = torch.logspace(-7, 2.5, 40 * 32)
    batch = torch.cat([sizes, -sizes, torch.linspace(-4, 4, 40 * 300)])
    batch[:6] = torch.tensor([math.nan, math.inf, 0.0, 100.0, -100.0, -0.0])
    batch = batch[torch.randperm(len(batch))].view(-1, *shape)
    net = compile_sparse(nn.Sequential(layer, function).eval(), batch[:1], threads=1)
    assert all(item.native for plans in net.plans.values() for item in plans[0].items)
    expected = function(batch.double())
    for found in (net(batch), torch.cat([net(example[None]) for example in batch[:100]])):
        torch.testing.assert_close(found.double(), expected[: len(found)], rtol=1e-6, atol=5e-7, equal_nan=True)
