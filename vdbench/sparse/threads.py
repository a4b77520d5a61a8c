"""Threads of the engine's own: how many, what is shared out to them, and what each keeps to itself."""

import operator
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from vdbench.sparse.program import Bound

WORTH_A_THREAD_S = 1e-4  # less work than this stays on the calling thread


class Renewable(Protocol):
    """What makes its locks anew when told to."""

    def renew(self) -> None: ...


_WITH_LOCKS: weakref.WeakSet[Renewable] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [one.renew() for one in _WITH_LOCKS])


def renewed_in_forks(one: Renewable) -> None:
    """`renew` it now, and in every fork."""
    one.renew()
    _WITH_LOCKS.add(one)


def checked_threads(threads: int | None) -> int:
    """How many threads that means; None is as many as PyTorch uses.

    Raises:
        TypeError: not a whole number of threads. ValueError: less than one.
    """
    found = torch.get_num_threads() if threads is None else operator.index(threads)
    if found < 1:
        raise ValueError(f"threads: {found}, where it takes one at least")
    return found


class OfAThread(threading.local):
    """What every thread has made for itself."""

    def __init__(self) -> None:
        self.made: dict[Any, Any] = {}


class Pool:
    """Threads that work is shared out to; the calling one takes part.

    Args:
        threads: how many; see `checked_threads`, which raises what is wrong with them.

    Attributes:
        trial: held by the caller whose ways are timed.
    """

    def __init__(self, threads: int | None) -> None:
        self.threads = checked_threads(threads)
        renewed_in_forks(self)

    def __reduce__(self) -> tuple[type["Pool"], tuple[int]]:
        """Copies have threads of their own."""
        return Pool, (self.threads,)

    def renew(self) -> None:
        """For a process of its own: a fork has neither the threads nor those who held the locks."""
        self._executor: ThreadPoolExecutor | None = None
        self._together, self.trial = threading.Lock(), threading.Lock()

    def worth(self, seconds: float) -> int:
        """Threads that so much work is worth waking."""
        return max(1, min(self.threads, int(seconds / WORTH_A_THREAD_S)))

    def run(self, jobs: Sequence[Callable[[], None]], give_up: Callable[[], None] = lambda: None) -> None:
        """Run all jobs at the same time, as many as there are threads at most. When not all can be started, or the
        caller is interrupted, `give_up` makes an end of those that were."""
        if len(jobs) > 1 and self._executor is None:
            self._executor = self._started()
        waiting: list[Future[None]] = []
        try:
            for job in jobs[1:]:  # one by one, for those that were started are waited for in any case
                waiting.append(self._executor.submit(job))  # type: ignore[union-attr]
            for job in jobs[:1]:
                job()
        except BaseException:
            give_up()
            raise
        finally:
            for job in waiting:
                job.result()

    def _started(self) -> ThreadPoolExecutor:
        """All threads but the caller's, each of them there already: some jobs wait for one another."""
        executor = ThreadPoolExecutor(self.threads - 1, thread_name_prefix="vdbench")
        met = threading.Barrier(self.threads)
        try:
            for _ in range(self.threads - 1):
                executor.submit(met.wait)
            met.wait()
        except BaseException:
            met.abort()
            raise
        return executor

    def run_together(self, bound: Bound) -> None:
        """Run a program of as many threads. One caller at a time does: two could each hold threads that the other waits
        for."""
        with self._together:
            self.run(bound.members, bound.release)
