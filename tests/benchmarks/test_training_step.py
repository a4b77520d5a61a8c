"""What a training step of variational dropout costs, in steps of the same net without it.

Targets: 2.5 dense steps for LeNet-300-100 and 1.9 for LeNet-5; a textbook implementation is defined below. All
contenders take their steps in turn, in one process on one thread. Ratios are of median processor time, which other
processes disturb least; `pytest tests/benchmarks --benchmark-only` prints them and stores them in `extra_info`. Nothing
is asserted of times.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vdbench import outputs
from vdbench.config import DenseRecipe, VariationalRecipe
from vdbench.conversion import to_variational_dropout
from vdbench.models import MODELS
from vdbench.posterior import K1, K2, K3
from vdbench.steps import build_optimizer
from vdbench.variational import forward_with_kl, kl_divergence

TARGETS = {"lenet300100": 2.5, "lenet5": 1.9}
BATCH, NUM_EXAMPLES = 100, 60_000
WARM_UP, ROUNDS = 20, 60

Step = Callable[[], Tensor]


class Textbook(nn.Module):
    """A layer as the formulas read: two operations, noise from `randn_like`, all gradients by autograd."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.log_sigma2 = nn.Parameter(torch.full_like(layer.weight, -10.0))
        self.operation = functional.linear if isinstance(layer, nn.Linear) else functional.conv2d

    def log_alpha(self) -> Tensor:
        return (self.log_sigma2 - torch.log(self.weight**2 + 1e-8)).clamp(-8, 8)

    def forward(self, input: Tensor) -> Tensor:
        mean = self.operation(input, self.weight * (self.log_alpha() < 3.0), self.bias)
        variance = self.operation(input**2, torch.exp(self.log_sigma2))
        return mean + torch.sqrt(variance.clamp_min(0.0) + 1e-8) * torch.randn_like(mean)

    def kl_divergence(self) -> Tensor:
        log_alpha = self.log_alpha()
        return -(K1 * torch.sigmoid(K2 + K3 * log_alpha) - 0.5 * torch.log1p(torch.exp(-log_alpha)) - K1).sum()


def seeded_net(model: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[model](10)


def textbook_net(model: str) -> nn.Module:
    net = seeded_net(model)
    for name, child in list(net.named_children()):
        if isinstance(child, nn.Linear | nn.Conv2d):
            setattr(net, name, Textbook(child))
    return net


def textbook_kl(net: nn.Module) -> Tensor:
    return torch.stack([layer.kl_divergence() for layer in net.children() if isinstance(layer, Textbook)]).sum()


def with_textbook_kl(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    return net(images), textbook_kl(net)


def without_kl(net: nn.Module, images: Tensor) -> tuple[Tensor, float]:
    return net(images), 0.0


def step_of(net: nn.Module, optimizer: torch.optim.Optimizer, forward: Callable, batch: tuple[Tensor, Tensor]) -> Step:
    def step() -> Tensor:
        logits, kl = forward(net.train(), batch[0])
        loss = functional.cross_entropy(logits, batch[1]) + kl / NUM_EXAMPLES
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.fixture
def steps(model: str) -> Iterator[dict[str, Step]]:
    """A training step of every contender, all with the same initial weights, images and fused Adam."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with torch.random.fork_rng():
        batch = torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
        dense, textbook = seeded_net(model), textbook_net(model)
        variational = to_variational_dropout(seeded_net(model))
        yield {
            "dense": step_of(dense, build_optimizer(dense, DenseRecipe(epochs=1)), without_kl, batch),
            "variational": step_of(
                variational, build_optimizer(variational, VariationalRecipe(epochs=1)), forward_with_kl, batch
            ),
            "textbook": step_of(
                textbook, torch.optim.Adam(textbook.parameters(), lr=1e-3, fused=True), with_textbook_kl, batch
            ),
        }
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.mark.benchmark(group="training step", timer=time.process_time)
@pytest.mark.parametrize("model", ["lenet300100", "lenet5"])
def test_variational_step(benchmark, steps, model, capsys):
    ours, theirs = kl_divergence(to_variational_dropout(seeded_net(model))), textbook_kl(textbook_net(model))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
    for step in [*steps.values()] * WARM_UP:
        assert math.isfinite(step())
    seconds: dict[str, list[float]] = {"dense": [], "textbook": []}

    def others_first() -> None:
        for name, taken in seconds.items():
            started = time.process_time()
            steps[name]()
            taken.append(time.process_time() - started)

    benchmark.pedantic(steps["variational"], setup=others_first, rounds=ROUNDS)
    seconds["variational"] = benchmark.stats.stats.data
    typical = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratios = {name: round(typical[name] / typical["dense"], 2) for name in ("variational", "textbook")}
    benchmark.extra_info.update({"net": outputs.MODELS[model], "target": TARGETS[model]} | ratios)
    with capsys.disabled():
        print(
            f"\n{model}: dense step {1e3 * typical['dense']:.2f} ms; in dense steps: variational "
            f"{ratios['variational']} (target {TARGETS[model]}), textbook {ratios['textbook']}"
        )
