"""What a handful of seeds says: mean, sample standard deviation, bootstrap interval, paired differences and ratios."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from vdbench.config_timing import DENSE_BACKENDS
from vdbench.records import BackendTiming, Record

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Summary:
    """`n` values: `std` is the sample standard deviation (n - 1) and needs n >= 2; `interval`, for the mean, n >= 3."""

    n: int
    mean: float
    std: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as `reference`, a backend, sample by interleaved sample; no samples for over itself."""

    reference: str
    samples: tuple[float, ...]

    @property
    def value(self) -> float:
        return float(np.median(self.samples)) if self.samples else 1.0

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        return bootstrap_interval(self.samples, np.median)


@dataclass(frozen=True)
class Speedup:
    """One backend in one setting, against the dense backend that was fastest there and against
    dense torch: None where that was not timed.

    `gflops` are spent on weights that are not zero, `limit` is the share of what the machine's cores could do at most;
    both are None where the record does not know.
    """

    timing: BackendTiming
    seconds: float
    over_best: Ratio | None
    over_torch: Ratio | None
    gflops: float | None
    limit: float | None

    @property
    def seconds_an_example(self) -> float:
        return self.seconds / self.timing.examples


def summarise(values: Sequence[float]) -> Summary | None:
    """None for no values."""
    if not len(values):
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(np.mean(values)), std, bootstrap_interval(values))


def bootstrap_interval(
    values: Sequence[float], statistic: Callable[..., np.ndarray] = np.mean, *, level: float = LEVEL, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval (Efron 1979) of a statistic that takes `axis`; None for fewer than three
    values: of two it would be these two, which says nothing of 95 %.

    With three to five values it covers less than `level`: quote n with it.
    """
    if len(values) < 3:
        return None
    resampled = np.asarray(values, dtype=float)[_draws(len(values), seed)]
    low, high = np.quantile(statistic(resampled, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _draws(count: int, seed: int) -> np.ndarray:
    """Which of `count` values each resample is made of, (RESAMPLES, count)."""
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """ours - theirs for every seed that both have, in order of seeds."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def speedups(record: Record) -> list[Speedup]:
    """Every backend against the fastest dense one and against dense torch, in equal settings.

    A ratio is the median of the ratios sample by interleaved sample. Raises ValueError when two backends have
    different numbers of samples, and so were not interleaved.
    """
    return [_speedup(record, timing) for timing in record.timing]


def contestants(found: Sequence[Speedup]) -> tuple[Speedup | None, Speedup | None, Speedup | None]:
    """Of one setting: vdbench, the fastest dense engine and the fastest of the others."""
    ordered = sorted(found, key=lambda item: item.seconds)
    ours = next((item for item in ordered if item.timing.backend == "vdbench"), None)
    dense = next((item for item in ordered if item.timing.backend in DENSE_BACKENDS), None)
    others = (item for item in ordered if item.timing.backend not in ("vdbench", *DENSE_BACKENDS))
    return ours, dense, next(others, None)


def _median(timing: BackendTiming) -> float:
    return float(np.median(timing.samples_s))


def _speedup(record: Record, timing: BackendTiming) -> Speedup:
    beside = [
        t
        for t in record.timing
        if (t.device, t.setting) == (timing.device, timing.setting) and t.backend in DENSE_BACKENDS
    ]
    best = min(beside, key=_median, default=None)
    torch = next((t for t in beside if t.backend == "torch_dense"), None)
    seconds = _median(timing)
    gflops = 2e-9 * record.work.multiply_adds * timing.examples / seconds if record.work else None
    peak = record.limits.get("fma")
    return Speedup(
        timing=timing,
        seconds=seconds,
        over_best=_ratio(record, timing, best),
        over_torch=_ratio(record, timing, torch),
        gflops=gflops,
        limit=gflops / (peak * timing.threads) if gflops is not None and peak else None,
    )


def _ratio(record: Record, timing: BackendTiming, reference: BackendTiming | None) -> Ratio | None:
    if reference is None:
        return None
    if reference is timing:
        return Ratio(reference.backend, ())
    if len(reference.samples_s) != len(timing.samples_s):
        raise ValueError(
            f"{'/'.join(map(str, record.run))}: {timing.backend} has {len(timing.samples_s)} samples and "
            f"{reference.backend} {len(reference.samples_s)}, so they were not interleaved; rerun its time job"
        )
    return Ratio(reference.backend, tuple(np.divide(reference.samples_s, timing.samples_s)))
