"""Running a plan: stretches of PyTorch and of native code, blocks of examples shared out among threads."""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from vdbench.sparse.graph import Shape
from vdbench.sparse.jit import vector_lanes
from vdbench.sparse.plan import BATCH_VECTORS, Item, Network, Plan, choose, operations, stretches
from vdbench.sparse.program import Bound, Program, Segment
from vdbench.sparse.torch_run import TorchRun

SMALL = 8192  # numbers that are copied faster than their place is found
WORTH_A_THREAD_S = 1e-4  # less work than this stays on the calling thread
CACHE_NUMBERS = 1 << 20  # more float32 than a core's own cache holds


class NativeRun:
    """A stretch of stencils on batches of any size, or on single examples one by one."""

    def __init__(self, segment: Segment, items: Sequence[Item], plan: Plan) -> None:
        self.segment, self.single = segment, plan.examples == 1
        self.inputs, self.outputs = segment.inputs, segment.outputs
        self.split = choose(items, segment)
        self.choices = {item.name: item.chosen for item in items}
        self.block = 1 if self.single else vector_lanes()
        self.example_s = sum(item.best(native=True) for item in items) / plan.examples
        self._shapes = [segment.shapes[name] for name in (*segment.inputs, *segment.outputs)]
        self._block_bytes = [4 * self.block * int(np.prod(shape)) for shape in self._shapes]
        self._programs: dict[tuple[int, int], Program] = {}
        self._local = threading.local()
        self._lock = threading.Lock()

    def _bound(self, vectors: int, threads: int = 1) -> Bound:
        """This thread's program for so many vectors of examples, compiled on first use."""
        mine: dict[tuple[int, int], Bound] = self._local.__dict__.setdefault("bounds", {})
        key = vectors, threads
        if key not in mine:
            with self._lock:
                if key not in self._programs:
                    program = Program(self.segment, self.choices, vectors=vectors, split=self.split, threads=threads)
                    self._programs[key] = program
            mine[key] = Bound(self._programs[key])
        return mine[key]

    def _groups(self, blocks: int) -> list[tuple[int, int]]:
        """(vectors of examples in a group, groups) that make up so many blocks."""
        if self.single:
            return [(0, blocks)]
        if self.split == len(self.segment.stencils):
            return [(1, blocks)]
        found, vectors = [], BATCH_VECTORS
        while blocks:
            found.append((vectors, blocks // vectors))
            blocks, vectors = blocks % vectors, vectors // 2
        return [(vectors, groups) for vectors, groups in found if groups]

    def compute(self, addresses: Sequence[int], blocks: int) -> None:
        """`blocks` whole blocks of examples, whose inputs and outputs lie one behind the other at `addresses`."""
        for vectors, groups in self._groups(blocks):
            bound = self._bound(vectors)
            bound(addresses, groups)
            moves = bound.program.group_bytes
            addresses = [address + groups * move for address, move in zip(addresses, moves, strict=True)]

    def shares(self, pool: "Pool") -> bool:
        """Whether so much is done to a block that several threads may have it done sooner together."""
        return pool.worth(self.block * self.example_s) > 1

    def _compute_few(self, addresses: Sequence[int], blocks: int, pool: "Pool", together: bool) -> None:
        """`compute`, for fewer blocks than threads: each block on a thread of its own, or one after the other on all of
        them together, each thread some of the channels."""
        if not (together and blocks and self.shares(pool) and self._run_together(addresses, blocks, pool)):
            pool.run([functools.partial(self.compute, self._from(k, addresses), 1) for k in range(blocks)])

    def _run_together(self, addresses: Sequence[int], blocks: int, pool: "Pool") -> bool:
        bound = self._bound(0 if self.single else 1, pool.threads)
        bound.point_to(addresses, blocks)
        return pool.run_together(bound)

    def __call__(self, arrays: Sequence[np.ndarray], pool: "Pool", together: bool) -> list[np.ndarray]:
        """Inputs (N, ...) float32; outputs alike, contiguous. `together`: threads share what is left when every one has
        had as many blocks as the others."""
        arrays, count = [np.ascontiguousarray(array) for array in arrays], len(arrays[0])
        outputs = [np.empty((count, *shape), np.float32) for shape in self._shapes[len(arrays) :]]
        everything = [*arrays, *outputs]
        addresses = [a.ctypes.data for a in everything]
        blocks, rest = divmod(count, self.block)
        threads = pool.worth(blocks * self.block * self.example_s)
        if threads == 1:
            self.compute(addresses, blocks)
        else:
            share, left = divmod(blocks, threads)
            starts = [self._from(k * share, addresses) for k in range(threads if share else 0)]
            pool.run([functools.partial(self.compute, start, share) for start in starts])
            self._compute_few(self._from(blocks - left, addresses), left, pool, together)
        if rest:  # a block that is not full: computed on a copy that is
            padded = [np.zeros((self.block, *a.shape[1:]), np.float32) for a in everything]
            for copy, array in zip(padded, arrays, strict=False):
                copy[:rest] = array[count - rest :]
            self._compute_few([a.ctypes.data for a in padded], 1, pool, together)
            for copy, array in zip(padded[len(arrays) :], outputs, strict=True):
                array[count - rest :] = copy[:rest]
        return outputs

    def _from(self, block: int, addresses: Sequence[int]) -> list[int]:
        return [a + block * bytes for a, bytes in zip(addresses, self._block_bytes, strict=True)]


class OneExample:
    """A stretch on single examples, with as little around the native call as there can be: a small net takes two
    microseconds, and finding out where an array lies takes as long. So small ones go through buffers."""

    def __init__(self, run: NativeRun, shape: Shape) -> None:
        self.example_s = run.example_s
        (given,), (made,) = run.segment.inputs, run.segment.outputs
        self._given, self._made = (np.zeros(run.segment.shapes[name], np.float32) for name in (given, made))
        self._result = self._made.reshape(shape)
        program = Program(run.segment, run.choices, vectors=0)
        self._bound = Bound(program)
        self._bound((self._given.ctypes.data, self._made.ctypes.data), 1)
        self._call, self._lock = self._bound.again, threading.Lock()
        self._small = self._given.size + self._made.size < SMALL
        self._buffers = (self._given.ctypes.data, self._made.ctypes.data)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Outputs (N, ...) for inputs (N, ...), contiguous."""
        with self._lock:
            if self._small and len(batch) == 1:
                self._given[...] = batch[0]
                self._call()
                return self._result[None].copy()
            out = np.empty((len(batch), *self._result.shape), np.float32)
            self._bound((batch.ctypes.data, out.ctypes.data), len(batch))
            self._bound.point_to(self._buffers, 1)
            return out


def _fill_cache() -> None:
    np.ones(CACHE_NUMBERS, np.float32)


class Pool:
    """Threads that work is shared out to; the calling one takes part."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._executor: ThreadPoolExecutor | None = None
        self._process = 0
        self._together = threading.Lock()

    def worth(self, seconds: float) -> int:
        """Threads that so much work is worth waking."""
        return max(1, min(self.threads, int(seconds / WORTH_A_THREAD_S)))

    def run(self, jobs: Sequence[Callable[[], None]], give_up: Callable[[], None] = lambda: None) -> None:
        """Run all jobs at the same time, as many as there are threads at most. When not all can be started, or the
        caller is interrupted, `give_up` makes an end of those that were."""
        if len(jobs) > 1 and (self._executor is None or self._process != os.getpid()):  # a fork has no threads
            self._executor, self._process = self._started(), os.getpid()
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

    def forget(self) -> None:
        """Fill the caches of all threads' cores with something else."""
        self.run([_fill_cache] * self.threads)

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

    def run_together(self, bound: Bound) -> bool:
        """Run a program of as many threads. False, and nothing was run, where another caller does so just now: each
        could hold threads that the other waits for."""
        if not self._together.acquire(blocking=False):
            return False
        try:
            self.run(bound.members, bound.release)
        finally:
            self._together.release()
        return True


class Runner:
    """A whole network under one plan, from arrays (N, ...) to arrays.

    Attributes:
        one: a way for single examples with little around it, where there is one.
    """

    def __init__(self, network: Network, plan: Plan) -> None:
        self.network, self.plan = network, plan
        self.stretches: list[NativeRun | TorchRun] = []
        for run, items, segment in stretches(network, plan):
            if segment.stencils:
                self.stretches.append(NativeRun(segment, items, plan))
            else:
                ops = [op for item in run for op in operations(item)]
                names = segment.inputs, segment.outputs
                self.stretches.append(TorchRun(ops, network.views, *names, channels_last=plan.channels_last))
        self.one: OneExample | None = None
        if network.single and len(self.stretches) == 1 and isinstance(self.stretches[0], NativeRun):
            self.one = OneExample(self.stretches[0], network.graph.output.shape)

    def shortest(self, count: int, pool: "Pool") -> OneExample | None:
        """The shortest way for so many single examples, where there is one and other threads are not worth waking."""
        return self.one if self.one and pool.worth(count * self.one.example_s) == 1 else None

    def shares(self, pool: "Pool") -> bool:
        """Whether `together` may gain anything."""
        return any(isinstance(stretch, NativeRun) and stretch.shares(pool) for stretch in self.stretches)

    def __call__(self, batch: np.ndarray, pool: "Pool", together: bool = False) -> np.ndarray:
        """Outputs (N, ...) for inputs (N, ...). `together`: threads share the channels of blocks that are fewer than
        they."""
        if one := self.shortest(len(batch), pool):
            return one(batch)
        values: dict[str, np.ndarray] = {self.network.input: batch}
        for stretch in self.stretches:
            given = [values[name] for name in stretch.inputs]
            made = stretch(given) if isinstance(stretch, TorchRun) else stretch(given, pool, together)
            values |= zip(stretch.outputs, made, strict=True)
        return values[self.network.output].reshape(len(batch), *self.network.graph.output.shape)
