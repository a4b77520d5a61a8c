"""Runs that really train, in a fraction of a second: noisy templates as data, a spec for every method."""

import contextlib
import csv
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import factory
import torch

from vdbench import metrics, records, tensors, training
from vdbench.baselines import GradualPruner
from vdbench.config import RunSpec
from vdbench.data import Dataset
from vdbench.models import MODELS
from vdbench.records import Record

RECIPES: dict[str, dict[str, Any]] = {
    "dense": {"epochs": 3},
    "vd_finetune": {"epochs": 3, "kl_warmup_epochs": 2, "initial_log_sigma2": -6.0},
    "vd_warmup": {"epochs": 3, "kl_warmup_epochs": 2, "initial_log_sigma2": -6.0},
    "magnitude": {"epochs": 3, "prune_epochs": 2},
    "random": {"epochs": 3, "prune_epochs": 2},
}


def dataset(train: int = 600, evaluation: int = 200) -> Dataset:
    """Ten pictures of random squares, each image one of them under noise; a net learns them in a few epochs."""
    generator = torch.Generator().manual_seed(5)
    templates = torch.rand(10, 1, 7, 7, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    labels = torch.randint(10, (train + evaluation,), generator=generator)
    noise = torch.rand(len(labels), 1, 28, 28, generator=generator)
    images = 0.5 * templates[labels] + 0.5 * noise
    return Dataset("digits", images[:train], labels[:train], images[train:], labels[train:], 10)


def sparse_net(model: str) -> torch.nn.Module:
    """A net with 95 % of its weights removed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MODELS[model](10)
    kept = {layer.name: layer.total // 20 for layer in metrics.layers(net)}
    GradualPruner(net, kept).update(1.0)
    return net.eval()


def spec(method: str, model: str = "lenet300100", seed: int = 0, threshold: float = 3.0, **recipe: Any) -> RunSpec:
    return RunSpec.model_validate(
        {
            "experiment": "tiny",
            "dataset": "digits",
            "model": model,
            "method": method,
            "seed": seed,
            "threshold": threshold,
            "validation_size": 0,
            "recipe": RECIPES[method] | recipe,
            "after": [],
        }
    )


def train(spec: RunSpec, output: Path, data: Dataset | None = None, **inputs: Any) -> Record:
    return training.train(spec, suite="tiny", output=output, data=data or dataset(), **inputs)


def matched(path: Path, model: str = "lenet300100", compression: float = 20.0) -> Path:
    """A prune record with this compression in every layer, for baselines to copy."""
    suite = factory.suite(net=factory.experiment(model))
    records.write(
        factory.record(suite, "net", "vd_finetune", 0, compression=compression, weights_sha256="5" * 64), path
    )
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return tensors.load_tensors(folder / "weights.pt")


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def train_until(moment: tuple[str, int] | None, spec: RunSpec, output: Path, **inputs: Any) -> None:
    """Train on 120 images with a checkpoint after every epoch, and die by SIGKILL at the n-th of some moments.

    Moments: "step", before an optimizer step; "write NAME", the file's content is on disk but not in its place; "wrote
    NAME", it has just taken its place. To be run in a process of its own.
    """
    torch.set_num_threads(1)
    training.CHECKPOINT_SECONDS = -1.0
    passed: Counter[str] = Counter()

    def passes(name: str) -> None:
        passed[name] += 1
        if (name, passed[name]) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    real_write, real_step = records.atomic_write, torch.optim.Adam.step

    @contextlib.contextmanager
    def write(path: Path) -> Iterator[Path]:
        with real_write(path) as temporary:
            yield temporary
            passes(f"write {path.name}")
        passes(f"wrote {path.name}")

    def step(self: torch.optim.Adam) -> Any:
        passes("step")
        return real_step(self)

    records.atomic_write, torch.optim.Adam.step = write, step  # type: ignore[assignment]
    train(spec, output, dataset(train=120, evaluation=50), **inputs)
