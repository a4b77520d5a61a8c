"""A run of operations as one native call: places in an arena, kernels in order, batches cut into blocks of lanes."""

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vdbench.sparse.codegen import build_driver
from vdbench.sparse.graph import Shape
from vdbench.sparse.jit import compile_kernels, native_function, vector_lanes
from vdbench.sparse.layout import Arena, Geometry, Place, geometries, maps
from vdbench.sparse.lowering import RESERVED, Step, batch_copy_step, candidates, single_copy_step
from vdbench.sparse.stencil import Stencil

ARENA = 0  # the first base address; those of the inputs and outputs follow


@dataclass(frozen=True)
class Segment:
    """Stencils in order, the values they start from and those that are needed afterwards; shapes of all values."""

    stencils: tuple[Stencil, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: Mapping[str, Shape]

    def halos(self) -> dict[tuple[int, int], tuple[int, int, int, int]]:
        """For every map size, the widest halo that any sum over such maps reaches into."""
        found = {maps(shape): (0, 0, 0, 0) for shape in self.shapes.values()}
        for stencil in self.stencils:
            for name in stencil.inputs:
                size = maps(self.shapes[name])
                found[size] = tuple(map(max, found[size], stencil.halo(size)))  # type: ignore[assignment]
        return found

    def used(self, value: str) -> np.ndarray:
        """Which numbers of a value any sum reads, flat."""
        height, width = maps(self.shapes[value])
        found = np.zeros((self.shapes[value][0], height, width), bool)
        if value in self.outputs:
            found[:] = True
        for stencil in self.stencils:
            for k, name in enumerate(stencil.inputs):
                if name == value:
                    mine = stencil.entries.source == k
                    if stencil.computed() == (1, 1):
                        e = stencil.entries
                        inside = mine & (e.y >= 0) & (e.x >= 0) & (e.y < height) & (e.x < width)
                        found[e.channel[inside], e.y[inside], e.x[inside]] = True
                    else:
                        found[np.unique(stencil.entries.channel[mine])] = True
        return found.ravel()

    def crossing(self, split: int) -> set[str] | None:
        """The values made before stencil `split` and read after it; None if one of them is read before it too."""
        before, after = self.stencils[:split], self.stencils[split:]
        made = {*self.inputs, *(s.output for s in before)} if split else set(self.inputs)
        read = {name for s in after for name in s.inputs} | set(self.outputs)
        crossing = made & read
        early = {name for s in before for name in s.inputs}
        return None if crossing & early else crossing


class Program:
    """A segment compiled for one way of running it.

    Args:
        choices: the candidate of every stencil, by its output's name.
        vectors: 0 for single examples, else vectors of examples that are computed together from stencil `split` on;
            the stencils before it see one vector of examples at a time, which keeps large maps in the cache.
    """

    def __init__(self, segment: Segment, choices: Mapping[str, str], *, vectors: int = 0, split: int = 0) -> None:
        self.segment, self.vectors, self.split, self.choices = segment, vectors, split, dict(choices)
        self.examples = vectors * vector_lanes() if vectors else 1
        stages = self._single() if not vectors else self._batch()
        self._tables: list[np.ndarray] = []  # kept alive: kernels know their addresses
        self._stages = [(repeat, self._linked(steps)) for repeat, steps in stages if steps]
        self._bases_count = 1 + len(segment.inputs) + len(segment.outputs)

    def _places(self, arena: Arena, geometry: Mapping[str, Mapping[tuple[int, int], Geometry]]) -> dict[str, Place]:
        """A place for every value, given back once nothing reads it any more."""
        segment = self.segment
        last = {name: k for k, stencil in enumerate(segment.stencils) for name in stencil.inputs}
        last |= dict.fromkeys(segment.outputs, len(segment.stencils))
        places: dict[str, Place] = {}

        def take(name: str) -> None:
            shape = segment.shapes[name]
            places[name] = arena.take(geometry[name][maps(shape)], shape[0])

        for name in segment.inputs:
            take(name)
        for k, stencil in enumerate(segment.stencils):
            for name in stencil.inputs:
                if name not in places:  # neither given nor made: only the time matters
                    take(name)
            take(stencil.output)
            done = [name for name in stencil.inputs if last[name] == k]
            # what a repeated stage starts from must survive to its next repetition
            arena.give_back(places[name] for name in dict.fromkeys(done) if name not in segment.inputs)
        return {n: Place(p.geometry, segment.shapes[n][0], p.start) for n, p in places.items()}

    def _lower(self, places: Mapping[str, Place], stencils: Sequence[Stencil]) -> list[Step]:
        steps = []
        for stencil in stencils:
            examples = places[stencil.inputs[0]].geometry.examples if stencil.inputs else self.examples
            ways = {c.label: c for c in candidates(stencil, examples)}
            way = ways.get(self.choices.get(stencil.output, "")) or next(iter(ways.values()))
            steps.append(way.lower(stencil, places, places[stencil.output]))
        return steps

    def _single(self) -> list[tuple[int, list[tuple[Step, int, int, int, int]]]]:
        segment, arena = self.segment, Arena(RESERVED)
        geometry = geometries(segment.halos(), 1, vector_lanes())
        places = self._places(arena, dict.fromkeys(segment.shapes, geometry))
        self.arena_bytes = arena.size
        steps = [
            (single_copy_step(places[name], back=False), 1 + k, 4 * places[name].places().size, ARENA, 0)
            for k, name in enumerate(segment.inputs)
        ]
        steps += [(step, ARENA, 0, ARENA, 0) for step in self._lower(places, segment.stencils)]
        first = 1 + len(segment.inputs)
        steps += [
            (single_copy_step(places[name], back=True), ARENA, 0, first + k, 4 * places[name].places().size)
            for k, name in enumerate(segment.outputs)
        ]
        return [(0, steps)]

    def _batch(self) -> list[tuple[int, list[tuple[Step, int, int, int, int]]]]:
        segment, lanes, arena = self.segment, vector_lanes(), Arena(RESERVED)
        one, many = (geometries(segment.halos(), n * lanes, lanes) for n in (1, self.vectors))
        late = {s.output for s in segment.stencils[self.split :]} | (segment.crossing(self.split) or set())
        late |= set(segment.outputs) if self.split < len(segment.stencils) else set()
        late = late if self.split < len(segment.stencils) else set()
        places = self._places(arena, {n: many if n in late else one for n in segment.shapes})
        self.arena_bytes = arena.size
        vector = 4 * lanes

        def move(name: str) -> int:
            return vector if name in late else 0

        first = 1 + len(segment.inputs)
        pack = [
            (
                batch_copy_step(places[name], segment.used(name), back=False),
                *(1 + k, vector * places[name].places().size, ARENA, move(name)),
            )
            for k, name in enumerate(segment.inputs)
        ]
        unpack = [
            (
                batch_copy_step(places[name], np.ones(places[name].places().size, bool), back=True),
                *(ARENA, move(name), first + k, vector * places[name].places().size),
            )
            for k, name in enumerate(segment.outputs)
        ]
        early = [
            (step, ARENA, 0, ARENA, move(stencil.output))
            for stencil, step in zip(
                segment.stencils[: self.split], self._lower(places, segment.stencils[: self.split]), strict=True
            )
        ]
        together = [(step, ARENA, 0, ARENA, 0) for step in self._lower(places, segment.stencils[self.split :])]
        if not together:
            return [(0, [*pack, *early, *unpack])]
        return [(self.vectors, [*pack, *early]), (1, together), (self.vectors, unpack)]

    def _linked(self, steps: Sequence[tuple[Step, int, int, int, int]]) -> np.ndarray:
        """The driver's list of steps: addresses of code and tables, bases, moves."""
        addresses = compile_kernels([step.kernel for step, *_ in steps])
        rows = []
        for (step, *rest), code in zip(steps, addresses, strict=True):
            values = []
            for table in step.tables:
                if isinstance(table, np.ndarray):
                    self._tables.append(np.ascontiguousarray(table))
                    values.append(self._tables[-1].ctypes.data)
                else:
                    values.append(table)
            self._tables.append(np.array(values, np.int64))
            rows.append([code, self._tables[-1].ctypes.data, *rest])
        return np.array(rows, np.int64)

    def new_arena(self) -> np.ndarray:
        """Zeroed memory to compute in, one for every thread at work."""
        raw = np.zeros(self.arena_bytes + 128, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + self.arena_bytes + 64]

    def bind(self, arena: np.ndarray) -> "Bound":
        return Bound(self, arena)


class Bound:
    """A program with memory of its own. Not for two threads at a time."""

    def __init__(self, program: Program, arena: np.ndarray) -> None:
        self.program, self.arena = program, arena
        self._bases = np.zeros(program._bases_count, np.int64)
        self._bases[0] = arena.ctypes.data
        self._calls = []
        for repeat, steps in program._stages:
            counts = np.array([len(steps), repeat], np.int64)
            pointers = [ctypes.c_void_p(a.ctypes.data) for a in (steps, self._bases, counts)]
            self._calls.append((counts, pointers))
        self._run = native_function(build_driver)

    def __call__(self, addresses: Sequence[int], blocks: int) -> None:
        """Run on `blocks` blocks of `program.examples` examples (or single examples), whose inputs and outputs are at
        these addresses."""
        self._bases[1:] = addresses
        for (repeat, _), (counts, pointers) in zip(self.program._stages, self._calls, strict=True):
            if not repeat:
                counts[1] = blocks
            self._run(*pointers)

    def again(self) -> Callable[[], None]:
        """The last call once more, for a program of one stage."""
        ((_, pointers),) = self._calls
        return functools.partial(self._run, *pointers)
