"""Which of several ways is the fastest."""

import functools
import statistics
import time
from collections.abc import Sequence

import numpy as np

from vdbench.sparse.plan import CLEARLY

Way = functools.partial[np.ndarray]
ROUNDS, TRIAL_S = 5, 0.3  # every way once, then in turn for so many rounds or so long
RUN_IN_S = 0.01  # by then threads have spread over the cores: a system may leave those of an idle process on one


def quickest(ways: Sequence[Way], batch: np.ndarray) -> Way:
    """The way to the same result from a batch (N, ...) whose median is the least, timed as one call among many, in turn
    with the others."""
    samples: list[list[float]] = [[] for _ in ways]
    left, started = list(range(len(ways))), time.perf_counter()
    for _ in range(ROUNDS):
        if len(left) == 1 or (samples[0] and time.perf_counter() - started > TRIAL_S):
            break
        for number in left:
            samples[number].append(_among_many(ways[number], batch))
        medians = {number: statistics.median(samples[number]) for number in left}
        left = sorted((n for n in left if medians[n] <= CLEARLY * min(medians.values())), key=medians.__getitem__)
    return ways[left[0]]


def _among_many(way: Way, batch: np.ndarray) -> float:
    """Seconds of a call that follows others like it."""
    started = time.perf_counter()
    while True:
        way(batch)
        before = time.perf_counter()
        if before - started >= RUN_IN_S:
            break
    way(batch)
    return time.perf_counter() - before
