"""Running a plan: stretches of PyTorch and of native code, blocks of examples shared out among threads."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from vdbench.sparse.graph import Conv2d, Graph, Op
from vdbench.sparse.jit import vector_lanes
from vdbench.sparse.plan import PYTORCH, Item, Plan, TorchRun, choose, fused, operations, segments, value_of
from vdbench.sparse.program import Bound, Program, Segment

WORTH_A_THREAD_S = 1e-4  # less work than this stays on the calling thread


class NativeRun:
    """A stretch of stencils on batches of any size, or on single examples one by one."""

    def __init__(self, segment: Segment, items: Sequence[Item], plan: Plan) -> None:
        self.segment, self.single = segment, plan.examples == 1
        self.split = choose(items, segment)
        self._choices = {item.name: item.chosen for item in items}
        self._largest = plan.vectors
        self.block = 1 if self.single else vector_lanes()
        best = [min(s for way, s in item.seconds.items() if way != PYTORCH) for item in items]
        self.example_s = sum(best) / plan.examples
        self._sizes = [int(np.prod(segment.shapes[name])) for name in (*segment.inputs, *segment.outputs)]
        self._programs: dict[int, Program] = {}
        self._local = threading.local()
        self._lock = threading.Lock()

    def _bound(self, vectors: int) -> Bound:
        """This thread's program for so many vectors of examples, compiled on first use."""
        mine: dict[int, Bound] = self._local.__dict__
        if vectors not in mine:
            with self._lock:
                if vectors not in self._programs:
                    split = min(self.split, len(self.segment.stencils))
                    self._programs[vectors] = Program(self.segment, self._choices, vectors=vectors, split=split)
            program = self._programs[vectors]
            mine[vectors] = program.bind(program.new_arena())
        return mine[vectors]

    def _groups(self, blocks: int) -> list[tuple[int, int]]:
        """(vectors of examples computed together, how often) that make up so many blocks."""
        if self.single:
            return [(0, blocks)]
        if self.split == len(self.segment.stencils):
            return [(1, blocks)]
        found, vectors = [], self._largest
        while blocks:
            found.append((vectors, blocks // vectors))
            blocks, vectors = blocks % vectors, vectors // 2
        return [(vectors, times) for vectors, times in found if times]

    def compute(self, addresses: Sequence[int], blocks: int) -> None:
        """`blocks` whole blocks of examples, whose inputs and outputs lie one behind the other at `addresses`."""
        places = np.array(addresses, np.int64)
        step = 4 * self.block * np.array(self._sizes, np.int64)
        for vectors, times in self._groups(blocks):
            bound = self._bound(vectors)
            if vectors and bound.program.split < len(self.segment.stencils):
                for _ in range(times):
                    bound(places, vectors)
                    places = places + vectors * step
            else:
                bound(places, times)
                places = places + times * step

    def __call__(self, arrays: Sequence[np.ndarray], pool: "Pool") -> list[np.ndarray]:
        """Inputs (N, ...) float32, contiguous; outputs alike."""
        count = len(arrays[0])
        shapes = [self.segment.shapes[name] for name in self.segment.outputs]
        outputs = [np.empty((count, *shape), np.float32) for shape in shapes]
        everything = [*arrays, *outputs]
        blocks, rest = divmod(count, self.block)
        if blocks:
            shares = pool.shares(blocks, self.example_s * self.block)
            starts = np.cumsum([0, *shares])
            pool.run(
                [
                    lambda first=first, share=share: self.compute(
                        [
                            a.ctypes.data + 4 * size * self.block * first
                            for a, size in zip(everything, self._sizes, strict=True)
                        ],
                        share,
                    )
                    for first, share in zip(starts, shares, strict=False)
                ]
            )
        if rest:  # a block that is not full: computed on a copy that is
            padded = [np.zeros((self.block, *a.shape[1:]), np.float32) for a in everything]
            for copy, array in zip(padded, arrays, strict=False):
                copy[:rest] = array[count - rest :]
            self.compute([a.ctypes.data for a in padded], 1)
            for copy, array in zip(padded[len(arrays) :], outputs, strict=True):
                array[count - rest :] = copy[:rest]
        return outputs


class Pool:
    """Threads that work is shared out to; the calling one takes part."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._executor: ThreadPoolExecutor | None = None

    def shares(self, blocks: int, block_s: float) -> list[int]:
        """How many of the blocks each thread takes: as equal as they get, and only threads that are worth waking."""
        threads = max(1, min(self.threads, blocks, int(blocks * block_s / WORTH_A_THREAD_S)))
        return [blocks // threads + (k < blocks % threads) for k in range(threads)]

    def run(self, jobs: Sequence) -> None:  # type: ignore[type-arg]
        if len(jobs) == 1:
            jobs[0]()
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.threads - 1, thread_name_prefix="vdbench")
        waiting = [self._executor.submit(job) for job in jobs[1:]]
        jobs[0]()
        for job in waiting:
            job.result()


class Runner:
    """A whole network under one plan, from arrays (N, ...) to arrays."""

    def __init__(self, graph: Graph, plan: Plan) -> None:
        self.graph, self.plan = graph, plan
        items = {value_of(item): item for item in fused(graph, plan.examples == 1)}
        self.stretches: list[NativeRun | TorchRun] = []
        for native, chosen, segment in segments(graph, plan):
            if native:
                self.stretches.append(NativeRun(segment, chosen, plan))
            else:
                ops = [op for item in chosen for op in operations(items[item.name])]
                if plan.channels_last:
                    ops = [_channels_last(op) for op in ops]
                self.stretches.append(TorchRun(graph, ops, segment.inputs, segment.outputs))

    def __call__(self, batch: np.ndarray, pool: Pool) -> np.ndarray:
        values: dict[str, np.ndarray] = {self.graph.input.name: batch}
        for stretch in self.stretches:
            if isinstance(stretch, NativeRun):
                names = stretch.segment
                made = stretch([np.ascontiguousarray(values[name]) for name in names.inputs], pool)
                values |= zip(names.outputs, made, strict=True)
            else:
                given = [torch.from_numpy(values[name]) for name in stretch.inputs]
                if self.plan.channels_last:
                    given = [_last(v) for v in given]
                values |= zip(stretch.outputs, (v.numpy() for v in stretch(given)), strict=True)
        from vdbench.sparse.stencil import source

        out = values[source(self.graph.output.name, self.graph)]
        return out.reshape(len(batch), *self.graph.output.shape)


def _last(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def _channels_last(op: Op) -> Op:
    """A convolution with its weights in PyTorch's other memory format."""
    if not isinstance(op, Conv2d):
        return op
    return replace(op, weight=np.ascontiguousarray(op.weight.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2))
