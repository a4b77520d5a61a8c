"""Running a plan: stretches of PyTorch and of native code, blocks of examples shared out among threads."""

import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from ctypes import memmove

import numpy as np

from vdbench.sparse.code import FLOAT_BYTES
from vdbench.sparse.graph import Shape
from vdbench.sparse.jit import COMPILING, vector_lanes
from vdbench.sparse.layout import address, aligned, array_shape
from vdbench.sparse.plan import BATCH_VECTORS, Item, Network, Plan, choose, operations, stretches
from vdbench.sparse.program import Bound, Program, Segment
from vdbench.sparse.threads import OfAThread, Pool, renewed_in_forks
from vdbench.sparse.torch_run import TorchRun

SMALL = 8192  # numbers that are moved as fast as it is found out where they best lie


def memory(count: int, shape: Shape) -> Callable[[], np.ndarray]:
    """Makes memory for so many results; what is small lies wherever it fits, since nothing is gained by asking."""
    full = count, *shape
    return functools.partial(np.empty if math.prod(full) < SMALL else aligned, full, np.float32)


class NativeRun:
    """A stretch of stencils on batches of any size, or on single examples one by one."""

    def __init__(self, segment: Segment, items: Sequence[Item], plan: Plan) -> None:
        self.segment, self.single = segment, plan.examples == 1
        self.inputs, self.outputs = segment.inputs, segment.outputs
        self.split = choose(items, segment)
        self.choices = {item.name: item.chosen for item in items}
        self.block = 1 if self.single else vector_lanes()
        self.example_s = sum(item.best(native=True) for item in items) / plan.examples
        self._shapes = [segment.array_shape(name) for name in (*segment.inputs, *segment.outputs)]
        self._bytes = [FLOAT_BYTES * math.prod(shape) for shape in self._shapes]  # of an example
        self._programs: dict[tuple[int, int], Program] = {}
        self._groups = functools.lru_cache(self._groups_of)
        self.alone = functools.lru_cache(self._alone_of)
        self._local, self._kept = OfAThread(), OfAThread()

    def _bound(self, vectors: int, threads: int) -> Bound:
        """This thread's program for so many vectors of examples, compiled on first use."""
        mine: dict[tuple[int, int], Bound] = self._local.made
        key = vectors, threads
        if key not in mine:
            with COMPILING:
                if key not in self._programs:
                    program = Program(self.segment, self.choices, vectors=vectors, split=self.split, threads=threads)
                    self._programs[key] = program
            mine[key] = Bound(self._programs[key])
        return mine[key]

    def _groups_of(self, blocks: int) -> list[tuple[int, int, int]]:
        """(blocks before it, vectors of examples in a group, groups) of what makes up so many blocks."""
        if self.single:
            return [(0, 0, blocks)]
        if self.split == len(self.segment.stencils):
            return [(0, 1, blocks)]
        found, vectors, before = [], BATCH_VECTORS, 0
        while before < blocks:
            groups = (blocks - before) // vectors
            if groups:
                found.append((before, vectors, groups))
            before, vectors = before + groups * vectors, vectors // 2
        return found

    def _compute(self, addresses: Sequence[int], count: int, pool: Pool | None = None) -> None:
        """So many examples, whose inputs and outputs lie one behind the other at `addresses`: on the calling thread, or
        on all of the pool's together."""
        blocks, rest = divmod(count, self.block)
        self._blocks(addresses, blocks, pool)
        if rest and blocks:  # the last block begins inside the one before, whose outputs it computes once more
            self._blocks(self._from(count - self.block, addresses), 1, pool)
        elif rest:
            self._padded(addresses, rest, functools.partial(self._blocks, pool=pool))

    def _blocks(self, addresses: Sequence[int], blocks: int, pool: Pool | None = None) -> None:
        """`_compute`, whole blocks of examples."""
        for before, vectors, groups in self._groups(blocks):
            places = self._from(before * self.block, addresses) if before else addresses
            if pool is None:
                self._bound(vectors, 1)(places, groups)
            else:
                bound = self._bound(vectors, pool.threads)
                bound.point_to(places, groups)
                pool.run_together(bound)

    def _padded(self, addresses: Sequence[int], count: int, compute: Callable[[Sequence[int], int], None]) -> None:
        """Less than a block, by way of a whole one of this thread's, which `compute` gets. Behind the examples lie
        those of earlier calls: no lane sees another."""
        mine, inputs = self._kept.made, len(self.inputs)
        if not mine:
            mine["arrays"] = [np.zeros((self.block, *shape), np.float32) for shape in self._shapes]
            mine["addresses"] = [address(array) for array in mine["arrays"]]
        whole = mine["addresses"]
        moves = [*zip(whole, addresses, self._bytes, strict=True)]
        for kept, given, size in moves[:inputs]:
            memmove(kept, given, count * size)
        compute(whole, 1)
        for kept, made, size in moves[inputs:]:
            memmove(made, kept, count * size)

    def _alone_of(self, count: int, shape: Shape) -> Callable[[np.ndarray], np.ndarray]:
        """From the only input, so many examples, to outputs (count, *shape): `_compute`, on the calling thread, with as
        little around the native calls as there can be."""
        make, (given, made), block = memory(count, shape), self._bytes, self.block
        blocks, rest = divmod(count, block)
        pieces = [(k * block, vectors, groups) for k, vectors, groups in self._groups(blocks)]
        if rest:
            pieces.append((count - block, 1, 1))
        places = [(given * first, made * first, vectors, groups) for first, vectors, groups in pieces]

        def run(batch: np.ndarray) -> np.ndarray:
            out = make()
            source, destination = address(batch), address(out)
            for before, behind, vectors, groups in places:
                self._bound(vectors, 1)((source + before, destination + behind), groups)
            return out

        def run_padded(batch: np.ndarray) -> np.ndarray:
            out = make()
            self._padded((address(batch), address(out)), count, self._bound(1, 1))
            return out

        return run if blocks else run_padded

    def shares(self, pool: Pool) -> bool:
        """Whether so much is done to a block that several threads may have it done sooner together."""
        return pool.worth(self.block * self.example_s) > 1

    def _apart(self, addresses: Sequence[int], count: int, pool: Pool) -> None:
        """`_compute`, with blocks of its own for every thread that they are worth."""
        blocks = -(-count // self.block)
        threads = pool.worth(blocks * self.block * self.example_s)
        share, left = divmod(blocks, threads)
        ends = [min((k * share + min(k, left)) * self.block, count) for k in range(min(threads, blocks) + 1)]
        pool.run(
            [functools.partial(self._compute, self._from(a, addresses), b - a) for a, b in itertools.pairwise(ends)]
        )

    def __call__(self, arrays: Sequence[np.ndarray], pool: Pool, together: bool) -> list[np.ndarray]:
        """Inputs (N, ...) float32; outputs alike, contiguous. `together`: threads share the channels of every block
        and have none of their own."""
        arrays, count = [np.ascontiguousarray(array) for array in arrays], len(arrays[0])
        outputs = [memory(count, shape)() for shape in self._shapes[len(arrays) :]]
        addresses = [address(array) for array in (*arrays, *outputs)]
        if together and self.shares(pool):
            self._compute(addresses, count, pool)
        else:
            self._apart(addresses, count, pool)
        return outputs

    def _from(self, example: int, addresses: Sequence[int]) -> list[int]:
        return [a + example * bytes for a, bytes in zip(addresses, self._bytes, strict=True)]


class OneExample:
    """A stretch on one small example, with as little around the native call as there can be: a small net takes two
    microseconds, of which finding out where two arrays lie is a quarter. So it goes through buffers."""

    def __init__(self, run: NativeRun, given: Shape, shape: Shape) -> None:
        self._given, self._made = np.zeros(given, np.float32), np.zeros(shape, np.float32)
        self._bound = Bound(Program(run.segment, run.choices, vectors=0))
        self._bound.point_to((address(self._given), address(self._made)), 1)
        self._call, self._meanwhile = self._bound.again, run.alone(1, shape)
        renewed_in_forks(self)

    def renew(self) -> None:
        """For a fork, which may have been made in the middle of another thread's call."""
        self._lock = threading.Lock()

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Outputs (1, ...) for inputs (1, ...), contiguous."""
        if not self._lock.acquire(blocking=False):
            return self._meanwhile(batch)  # another thread has the buffers
        try:
            self._given[...] = batch[0]
            self._call()
            return self._made[None].copy()
        finally:
            self._lock.release()


class Runner:
    """A whole network under one plan, from arrays (N, ...) to arrays."""

    def __init__(self, network: Network, plan: Plan) -> None:
        self.network, self.plan, self.shape = network, plan, network.graph.output.shape
        self.stretches: list[NativeRun | TorchRun] = []
        for run, items, segment in stretches(network, plan):
            if segment.stencils:
                self.stretches.append(NativeRun(segment, items, plan))
            else:
                ops = [op for item in run for op in operations(item)]
                self.stretches.append(
                    TorchRun(
                        ops,
                        network.views,
                        segment.inputs,
                        segment.outputs,
                        behind=network.channels_last,
                        channels_last=plan.channels_last,
                    )
                )
        only = self.stretches[0] if len(self.stretches) == 1 else None
        self._alone = only if isinstance(only, NativeRun) else None
        given = network.graph.input.example
        small = math.prod(given) + math.prod(self.shape) < SMALL
        self._one = OneExample(self._alone, given, self.shape) if self._alone and network.single and small else None

    def shortest(self, count: int, pool: Pool) -> Callable[[np.ndarray], np.ndarray] | None:
        """A way with little around it, where the plan has one and other threads are not worth waking."""
        run = self._alone
        if run is None or pool.worth(count * run.example_s) > 1:
            return None
        return self._one if self._one and count == 1 else run.alone(count, self.shape)

    def shares(self, pool: Pool) -> bool:
        """Whether threads that compute together may gain anything."""
        return any(isinstance(stretch, NativeRun) and stretch.shares(pool) for stretch in self.stretches)

    def __call__(self, batch: np.ndarray, pool: Pool, together: bool = False) -> np.ndarray:
        """Outputs (N, ...) for inputs (N, ...). `together`: threads share the channels of every block and have none of
        their own."""
        if short := self.shortest(len(batch), pool):
            return short(batch)
        given = self.network.graph.input
        shape = array_shape(given.shape, given.name in self.network.channels_last)
        values: dict[str, np.ndarray] = {given.name: batch.reshape(len(batch), *shape)}
        for stretch in self.stretches:
            given = [values[name] for name in stretch.inputs]
            made = stretch(given) if isinstance(stretch, TorchRun) else stretch(given, pool, together)
            values |= zip(stretch.outputs, made, strict=True)
        out = values[self.network.output].reshape(len(batch), *self.shape)
        return np.ascontiguousarray(out)  # PyTorch may have its channels last
