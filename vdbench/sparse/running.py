"""Running a plan: stretches of PyTorch and of native code, blocks of examples shared out among threads."""

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vdbench.sparse.graph import Shape
from vdbench.sparse.jit import vector_lanes
from vdbench.sparse.plan import BATCH_VECTORS, Item, Network, Plan, choose, operations, stretches
from vdbench.sparse.program import Bound, Program, Segment
from vdbench.sparse.torch_run import TorchRun

SMALL = 8192  # numbers that are copied faster than their place is found
WORTH_A_THREAD_S = 1e-4  # less work than this stays on the calling thread


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
        self._programs: dict[int, Program] = {}
        self._local = threading.local()
        self._lock = threading.Lock()

    def _bound(self, vectors: int) -> Bound:
        """This thread's program for so many vectors of examples, compiled on first use."""
        mine: dict[int, Bound] = self._local.__dict__.setdefault("bounds", {})
        if vectors not in mine:
            with self._lock:
                if vectors not in self._programs:
                    program = Program(self.segment, self.choices, vectors=vectors, split=self.split)
                    self._programs[vectors] = program
            mine[vectors] = Bound(self._programs[vectors])
        return mine[vectors]

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

    def __call__(self, arrays: Sequence[np.ndarray], pool: "Pool") -> list[np.ndarray]:
        """Inputs (N, ...) float32; outputs alike, contiguous."""
        arrays, count = [np.ascontiguousarray(array) for array in arrays], len(arrays[0])
        outputs = [np.empty((count, *shape), np.float32) for shape in self._shapes[len(arrays) :]]
        everything = [*arrays, *outputs]
        addresses = [a.ctypes.data for a in everything]
        blocks, rest = divmod(count, self.block)
        shares = pool.shares(blocks, self.example_s * self.block)
        if len(shares) == 1:
            self.compute(addresses, blocks)
        else:
            firsts = itertools.accumulate(shares[:-1], initial=0)
            pool.run([self._share(addresses, first, share) for first, share in zip(firsts, shares, strict=True)])
        if rest:  # a block that is not full: computed on a copy that is
            padded = [np.zeros((self.block, *a.shape[1:]), np.float32) for a in everything]
            for copy, array in zip(padded, arrays, strict=False):
                copy[:rest] = array[count - rest :]
            self.compute([a.ctypes.data for a in padded], 1)
            for copy, array in zip(padded[len(arrays) :], outputs, strict=True):
                array[count - rest :] = copy[:rest]
        return outputs

    def _share(self, addresses: Sequence[int], first: int, blocks: int) -> Callable[[], None]:
        start = [a + first * bytes for a, bytes in zip(addresses, self._block_bytes, strict=True)]
        return functools.partial(self.compute, start, blocks)


class OneExample:
    """A stretch on single examples, with as little around the native call as there can be: a small net takes two
    microseconds, and finding out where an array lies takes as long. So small ones go through buffers."""

    def __init__(self, run: NativeRun, shape: Shape) -> None:
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


class Pool:
    """Threads that work is shared out to; the calling one takes part."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._executor: ThreadPoolExecutor | None = None

    def shares(self, blocks: int, block_s: float) -> list[int]:
        """How many of the blocks each thread takes: as equal as they get, and only threads that are worth waking."""
        threads = max(1, min(self.threads, blocks, int(blocks * block_s / WORTH_A_THREAD_S)))
        return [blocks // threads + (k < blocks % threads) for k in range(threads)]

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.threads - 1, thread_name_prefix="vdbench")
        waiting = [self._executor.submit(job) for job in jobs[1:]]
        jobs[0]()
        for job in waiting:
            job.result()


class Runner:
    """A whole network under one plan, from arrays (N, ...) to arrays.

    Attributes:
        one: the shortest way for single examples, where there is one.
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

    def __call__(self, batch: np.ndarray, pool: "Pool") -> np.ndarray:
        if self.one and (len(batch) == 1 or pool.threads == 1):
            return self.one(batch)
        values: dict[str, np.ndarray] = {self.network.input: batch}
        for stretch in self.stretches:
            given = [values[name] for name in stretch.inputs]
            made = stretch(given) if isinstance(stretch, TorchRun) else stretch(given, pool)
            values |= zip(stretch.outputs, made, strict=True)
        return values[self.network.output].reshape(len(batch), *self.network.graph.output.shape)
