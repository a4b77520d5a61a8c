"""Running a plan: stretches of PyTorch and of native code, blocks of examples shared out among threads."""

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vdbench.sparse.code import FLOAT_BYTES
from vdbench.sparse.graph import Shape
from vdbench.sparse.jit import COMPILING, vector_lanes
from vdbench.sparse.layout import address, aligned
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
        self._shapes = [segment.shapes[name] for name in (*segment.inputs, *segment.outputs)]
        self._block_bytes = [FLOAT_BYTES * self.block * math.prod(shape) for shape in self._shapes]
        self._programs: dict[tuple[int, int], Program] = {}
        self._groups = functools.lru_cache(self._groups_of)
        self._local = OfAThread()

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

    def _pieces(
        self, addresses: Sequence[int], blocks: int, threads: int = 1
    ) -> Iterator[tuple[Bound, Sequence[int], int]]:
        """Programs that make up so many blocks, where each finds its inputs and outputs, and its groups."""
        for before, vectors, groups in self._groups(blocks):
            places = self._from(before, addresses) if before else addresses
            yield self._bound(vectors, threads), places, groups

    def compute(self, addresses: Sequence[int], blocks: int) -> None:
        """`blocks` whole blocks of examples, whose inputs and outputs lie one behind the other at `addresses`."""
        for bound, places, groups in self._pieces(addresses, blocks):
            bound(places, groups)

    def alone(self, count: int, shape: Shape) -> Callable[[np.ndarray], np.ndarray]:
        """From the only input, so many examples in whole blocks, to outputs (count, *shape): on the calling thread,
        with as little around the native calls as there can be."""
        make, (given, made) = memory(count, shape), self._block_bytes
        pieces = [(given * k, made * k, vectors, n) for k, vectors, n in self._groups(count // self.block)]

        def run(batch: np.ndarray) -> np.ndarray:
            out = make()
            source, destination = address(batch), address(out)
            for before, behind, vectors, groups in pieces:
                self._bound(vectors, 1)((source + before, destination + behind), groups)
            return out

        return run

    def shares(self, pool: Pool) -> bool:
        """Whether so much is done to a block that several threads may have it done sooner together."""
        return pool.worth(self.block * self.example_s) > 1

    def _together(self, addresses: Sequence[int], blocks: int, pool: Pool) -> None:
        """`compute`, on all threads together, each some of the channels."""
        for bound, places, groups in self._pieces(addresses, blocks, pool.threads):
            bound.point_to(places, groups)
            pool.run_together(bound)

    def _apart(self, addresses: Sequence[int], blocks: int, pool: Pool) -> None:
        """`compute`, with blocks of its own for every thread that they are worth."""
        threads = pool.worth(blocks * self.block * self.example_s)
        share, left = divmod(blocks, threads)
        ends = [k * share + min(k, left) for k in range(min(threads, blocks) + 1)]
        pool.run(
            [functools.partial(self.compute, self._from(a, addresses), b - a) for a, b in itertools.pairwise(ends)]
        )

    def __call__(self, arrays: Sequence[np.ndarray], pool: Pool, together: bool) -> list[np.ndarray]:
        """Inputs (N, ...) float32; outputs alike, contiguous. `together`: threads share the channels of every block
        and have none of their own."""
        arrays, count = [np.ascontiguousarray(array) for array in arrays], len(arrays[0])
        outputs = [memory(count, shape)() for shape in self._shapes[len(arrays) :]]
        everything = [*arrays, *outputs]
        blocks, rest = divmod(count, self.block)
        self._share_out([*map(address, everything)], blocks, pool, together)
        if rest:  # a block that is not full: computed on a copy that is
            padded = [np.zeros((self.block, *a.shape[1:]), np.float32) for a in everything]
            for copy, array in zip(padded, arrays, strict=False):
                copy[:rest] = array[count - rest :]
            self._share_out([*map(address, padded)], 1, pool, together)
            for copy, array in zip(padded[len(arrays) :], outputs, strict=True):
                array[count - rest :] = copy[:rest]
        return outputs

    def _share_out(self, addresses: Sequence[int], blocks: int, pool: Pool, together: bool) -> None:
        share_out = self._together if together and self.shares(pool) else self._apart
        share_out(addresses, blocks, pool)

    def _from(self, block: int, addresses: Sequence[int]) -> list[int]:
        return [a + block * bytes for a, bytes in zip(addresses, self._block_bytes, strict=True)]


class OneExample:
    """A stretch on one small example, with as little around the native call as there can be: a small net takes two
    microseconds, of which finding out where two arrays lie is a quarter. So it goes through buffers."""

    def __init__(self, run: NativeRun, shape: Shape) -> None:
        (given,), (made,) = run.segment.inputs, run.segment.outputs
        self._given, self._made = (np.zeros(run.segment.shapes[name], np.float32) for name in (given, made))
        self._result = self._made.reshape(shape)
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
            return self._result[None].copy()
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
                names = segment.inputs, segment.outputs
                self.stretches.append(TorchRun(ops, network.views, *names, channels_last=plan.channels_last))
        only = self.stretches[0] if len(self.stretches) == 1 else None
        self._alone = only if isinstance(only, NativeRun) else None
        small = math.prod(network.graph.input.shape) + math.prod(self.shape) < SMALL
        self._one = OneExample(self._alone, self.shape) if self._alone and network.single and small else None

    def shortest(self, count: int, pool: Pool) -> Callable[[np.ndarray], np.ndarray] | None:
        """A way with little around it, where so many examples have one and other threads are not worth waking."""
        run = self._alone
        if run is None or count % run.block or pool.worth(count * run.example_s) > 1:
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
        values: dict[str, np.ndarray] = {self.network.input: batch}
        for stretch in self.stretches:
            given = [values[name] for name in stretch.inputs]
            made = stretch(given) if isinstance(stretch, TorchRun) else stretch(given, pool, together)
            values |= zip(stretch.outputs, made, strict=True)
        out = values[self.network.output].reshape(len(batch), *self.shape)
        return np.ascontiguousarray(out)  # PyTorch may have its channels last
