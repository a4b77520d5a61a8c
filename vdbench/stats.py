"""What a handful of seeds says: mean, sample standard deviation, bootstrap interval, paired differences and ratios."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vdbench.records import Record, Timing

LEVEL = 0.95
RESAMPLES = 10_000
REFERENCE_BACKEND = "torch_dense"


@dataclass(frozen=True)
class Summary:
    """`n` values: `std` is the sample standard deviation (n - 1); it and `interval`, for the mean, need n >= 2."""

    n: int
    mean: float
    std: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Speedup:
    """One backend at one batch size and thread count against dense torch: `ratio` is None where that was not timed.

    Dense torch itself has ratio 1 and no interval.
    """

    timing: Timing
    seconds: float
    ratio: float | None
    interval: tuple[float, float] | None


def summarise(values: Sequence[float]) -> Summary | None:
    """None for no values."""
    if not len(values):
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(np.mean(values)), std, bootstrap_interval(values))


def bootstrap_interval(
    values: Sequence[float], statistic: Callable[..., np.ndarray] = np.mean, *, level: float = LEVEL, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval (Efron 1979) of a statistic that takes `axis`; None for fewer than two values.

    With three to five values it covers less than `level`: quote n with it.
    """
    if len(values) < 2:
        return None
    resampled = np.random.default_rng(seed).choice(np.asarray(values, dtype=float), size=(RESAMPLES, len(values)))
    low, high = np.quantile(statistic(resampled, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """ours - theirs for every seed that both have, in order of seeds."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def speedups(record: Record) -> list[Speedup]:
    """Median of the ratios dense torch / backend, sample by interleaved sample, at equal batch size and threads.

    Raises ValueError when the two have different numbers of samples, and so were not interleaved.
    """
    dense = {_setting(t): t for t in record.timing if t.backend == REFERENCE_BACKEND}
    return [_speedup(record, timing, dense.get(_setting(timing))) for timing in record.timing]


def _setting(timing: Timing) -> tuple[str, int, int]:
    return timing.device, timing.threads, timing.batch_size


def _speedup(record: Record, timing: Timing, dense: Timing | None) -> Speedup:
    seconds = float(np.median(timing.samples_s))
    if dense is None or dense is timing:
        return Speedup(timing, seconds, None if dense is None else 1.0, None)
    if len(dense.samples_s) != len(timing.samples_s):
        raise ValueError(
            f"{'/'.join(map(str, record.run))}: {timing.backend} has {len(timing.samples_s)} samples and "
            f"{dense.backend} {len(dense.samples_s)}, so they were not interleaved; rerun its time job"
        )
    ratios = np.divide(dense.samples_s, timing.samples_s)
    return Speedup(timing, seconds, float(np.median(ratios)), bootstrap_interval(list(ratios), np.median))
