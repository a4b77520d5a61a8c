"""How long a job takes and how much memory it holds: from finished runs, on this CPU if any, else a stated guess."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from vdbench import records, shipping
from vdbench.config import BASELINE_METHODS, VARIATIONAL_METHODS
from vdbench.provenance import cpu_model, gpu_model
from vdbench.records import Record

# Seconds an epoch of 60,000 examples takes one core of a 2020s server, dense, variational and of a baseline: for what
# has not been run before.
_GUESSES = {
    "lenet300100": (1.8, 4.0, 2.0),
    "lenet5": (18.0, 34.0, 19.0),
    "rnnlm_tanh": (30.0, 34.0, 32.0),
    "rnnlm_tanh_200": (10.0, 12.0, 11.0),
    "rnnlm_lstm": (50.0, 60.0, 52.0),
    "rnnlm_lstm_200": (13.0, 16.0, 14.0),
    "rnnlm_lstm_onehot": (50.0, 60.0, 52.0),
    "vgglike_k025": (70.0, 130.0, 70.0),
    "vgglike_k050": (210.0, 400.0, 210.0),
    "vgglike_k100": (800.0, 1500.0, 800.0),
    "vgglike_k150": (1800.0, 3300.0, 1800.0),
}
GUESSED_EPOCH_S = {
    model: {
        "dense": dense,
        **dict.fromkeys(VARIATIONAL_METHODS, variational),
        **dict.fromkeys(BASELINE_METHODS, baseline),
    }
    for model, (dense, variational, baseline) in _GUESSES.items()
}
GUESSED_S = {"prune": 20.0, "time": 120.0, "layer": 15.0, "fetch": 10.0, "collect": 5.0, "table": 10.0, "plot": 60.0}
GUESSED_MB = 4000  # more than any run of this project has held
# Training examples, or words, of the data sets there are; of the user's own nothing is known before they are read.
EXAMPLES = {
    "mnist": 60_000,
    **dict.fromkeys(("cifar10", "cifar10_jpeg", "cifar100", "cifar100_coarse"), 50_000),
    "digits": 1_442,
    "ptb": 929_589,
    "topics": 100_000,  # about: they come with Python, and differ with its version
}

# What is asked for over what was measured: other processors are slower, other nodes busier, other libraries larger. A
# limit that is too short costs little, for training resumes; one that is too long costs waiting in a queue.
TIME_MARGIN, LEAST_MINUTES = 3.0, 15
MEMORY_MARGIN = 1.25
SHORT_S = 300.0  # a training that takes no longer waits longer in a queue than it runs, and shares a place in it
_ROUND_MINUTES, _ROUND_MB = 5, 100


class Past:
    """Finished runs, found by what they were runs of; `cpu` is the processor whose times are asked for."""

    def __init__(self, finished: Iterable[Record], cpu: str | None = None) -> None:
        self._alike: dict[tuple[str, ...], list[Record]] = defaultdict(list)
        for record in finished:
            self._alike[_kind(record.stage, record.spec | {"method": record.method})].append(record)
        self._seconds: dict[tuple[Any, ...], tuple[float, str]] = {}
        self._cpu, self._gpu_counts = cpu or cpu_model(), cpu is None

    def alike(self, stage: str, spec: dict) -> list[Record]:
        """Runs of the same stage, net and data; of training, by the same method, and of a layer, of the same sizes.
        Those on a GPU where this machine has one, else those on a CPU."""
        alike = self._alike.get(_kind(stage, spec), [])
        on_gpu = [record for record in alike if record.provenance.device != "cpu"]
        if on_gpu and self._gpu_counts and gpu_model():
            return on_gpu
        return [record for record in alike if record.provenance.device == "cpu"]

    def seconds(self, stage: str, spec: dict) -> tuple[float, str]:
        """How long a job takes, and where that is from: the median of what the same took on this CPU, else on another,
        else a guess; on a machine with a GPU, of what the same took on one, if anything did."""
        key = (*_kind(stage, spec), spec.get("recipe", {}).get("epochs"))
        if key not in self._seconds:
            self._seconds[key] = self._estimated(stage, spec)
        return self._seconds[key]

    def _estimated(self, stage: str, spec: dict) -> tuple[float, str]:
        alike = self.alike(stage, spec)
        on_gpu = bool(alike) and alike[0].provenance.device != "cpu"
        unit, own = ("GPU", gpu_model()) if on_gpu else ("CPU", self._cpu)
        here = [record for record in alike if record.provenance.hardware == own]
        chosen = here or alike
        if not chosen:
            return guess("layer" if "layer" in spec.get("densities", ()) else stage, spec)
        where = f"this {unit}" if here else f"another {unit} ({chosen[0].provenance.hardware})"
        if stage == "train":
            epoch_s = statistics.median(r.wall_s / r.spec["recipe"]["epochs"] for r in chosen)
            return epoch_s * spec["recipe"]["epochs"], f"{epoch_s:.3g} s an epoch, {_runs(chosen)} on {where}"
        seconds = statistics.median(record.wall_s for record in chosen)
        return seconds, f"{seconds:.3g} s, {_runs(chosen)} on {where}"

    def peak_mb(self, stage: str, spec: dict) -> float | None:
        """The most memory that a run like this one has held at once; None where there was none."""
        return max((record.peak_rss_mb for record in self.alike(stage, spec)), default=None)

    def minutes_to_ask_for(self, stage: str, spec: dict, attempt: int = 1) -> int:
        """The time limit of a job; another attempt gets as much again."""
        needed = max(LEAST_MINUTES, TIME_MARGIN * self.seconds(stage, spec)[0] / 60)
        return attempt * _up(needed, _ROUND_MINUTES)

    def megabytes_to_ask_for(self, stage: str, spec: dict, attempt: int = 1) -> int:
        """The memory limit of a job; another attempt gets as much again."""
        peak = self.peak_mb(stage, spec)
        return attempt * (GUESSED_MB if peak is None else _up(MEMORY_MARGIN * peak, _ROUND_MB))


def _kind(stage: str, spec: dict) -> tuple[str, ...]:
    method = spec["method"] if stage == "train" else ""
    return stage, spec["dataset"], spec["model"], method, json.dumps(spec.get("arguments"), sort_keys=True)


def _up(amount: float, unit: int) -> int:
    return math.ceil(amount / unit) * unit


def _runs(chosen: list[Record]) -> str:
    return "one run" if len(chosen) == 1 else f"median of {len(chosen)} runs"


def guess(stage: str, spec: dict | None = None) -> tuple[float, str]:
    """Seconds for what has never been run, and that it is a guess."""
    if stage != "train" or spec is None:
        return GUESSED_S[stage], f"{GUESSED_S[stage]:g} s, a guess"
    share = EXAMPLES.get(spec["dataset"], 60_000) / 60_000
    epoch_s = GUESSED_EPOCH_S[spec["model"]][spec["method"]] * share
    return epoch_s * spec["recipe"]["epochs"], f"{epoch_s:.3g} s an epoch, a guess: no such run is recorded on a CPU"


def past_records(*folders: Path) -> Iterator[Record]:
    """Every finished run under the folders, once if it was recorded too; files that are no records say nothing."""
    seen = set()
    for folder in folders:
        for stage in records.STAGES:
            for path in folder.glob(f"**/{stage}.json"):
                try:
                    record = records.read(path)
                except records.RecordError:
                    continue
                made = record.suite, record.stage, record.run, record.provenance.started_at
                if record.status == "ok" and made not in seen:
                    seen.add(made)
                    yield record


@cache
def shipped() -> Past:
    """The runs that come with the project: known to every machine that has its code, whatever else was run there."""
    return Past(past_records(shipping.recorded()))
