"""A run of operations as one native call: places in an arena, kernels in order, batches cut into groups of lanes."""

import ctypes
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdbench.sparse.code import FLOAT_BYTES
from vdbench.sparse.driver import RELEASED, build_driver, giving_way
from vdbench.sparse.graph import Shape
from vdbench.sparse.jit import compile_kernel, native_function, vector_lanes
from vdbench.sparse.layout import Arena, Geometry, Place, address, aligned, array_shape, geometries, maps
from vdbench.sparse.lowering import NOTHING, Step, batch_copy_step, candidates, single_copy_step
from vdbench.sparse.stencil import Stencil

FARTHEST = 2**31 - 1  # bytes that a place in the arena can be counted in
ARENA = 0  # the first base address; those of the inputs and outputs follow
REACH = 128  # bytes behind what is used that vectors may reach into
ROW_TERMS = 4  # about what a row of sums costs besides its terms, in terms


class TooLarge(ValueError):
    """Values that take more memory than a kernel's tables can count."""


@dataclass(frozen=True)
class Segment:
    """Stencils in order, the values they start from and those that are needed afterwards; shapes of all values. Of
    those in `channels_last` arrays have their channels behind."""

    stencils: tuple[Stencil, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: Mapping[str, Shape]
    channels_last: frozenset[str] = frozenset()

    def array_shape(self, value: str) -> Shape:
        """Of the array that a value is read from or written to, for one example."""
        return array_shape(self.shapes[value], value in self.channels_last)

    def halos(self) -> dict[tuple[int, int], tuple[int, int, int, int]]:
        """For every map size, the widest halo that any sum over such maps reaches into."""
        found = {maps(shape): (0, 0, 0, 0) for shape in self.shapes.values()}
        for stencil in self.stencils:
            for name in stencil.inputs:
                size = maps(self.shapes[name])
                found[size] = tuple(map(max, found[size], stencil.halo(size)))  # type: ignore[assignment]
        return found

    def used(self, value: str) -> np.ndarray:
        """Which numbers of a value any sum reads, flat, in the order of its array."""
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
        return (np.moveaxis(found, 0, -1) if value in self.channels_last else found).ravel()

    def crossing(self, split: int) -> set[str] | None:
        """The values made before stencil `split` and read after it; None if one of them is read before it too."""
        before, after = self.stencils[:split], self.stencils[split:]
        made = {*self.inputs, *(s.name for s in before)}
        crossing = made & {*self.outputs, *(name for s in after for name in s.inputs)}
        early = {name for s in before for name in s.inputs}
        return None if crossing & early else crossing


@dataclass(frozen=True)
class _Call:
    """A step for every thread, the bases its source and destination start from, and how either moves when it is
    repeated."""

    steps: Sequence[Step]
    source: int = ARENA
    source_move: int = 0
    destination: int = ARENA
    destination_move: int = 0


_Stage = tuple[int, list[_Call]]  # how often its calls are repeated, one round after the other


class Program:
    """A segment compiled for one way of running it.

    Args:
        choices: the candidate of every stencil, by its output's name; the first where there is none such for so many
            examples.
        vectors: 0 for single examples, else vectors of examples that are computed together from stencil `split` on;
            the stencils before it see one vector of examples at a time, which keeps large maps in the cache.
        threads: how many compute every stencil together, each some of its output channels.

    Attributes:
        examples: how many a group has; inputs and outputs are those of whole groups.
        stages: of every thread, the driver's table of what it has to do.
        places: where in the arena every value lies.
    """

    def __init__(
        self, segment: Segment, choices: Mapping[str, str], *, vectors: int = 0, split: int = 0, threads: int = 1
    ) -> None:
        self.segment, self.choices, self.threads = segment, choices, threads
        self.examples = vectors * vector_lanes() if vectors else 1
        self.group_bytes = [self.examples * _bytes(segment, name) for name in (*segment.inputs, *segment.outputs)]
        arena = Arena(threads)
        stages = self._batch(arena, vectors, split) if vectors else self._single(arena)
        self.arena_bytes = arena.size
        self._kept: list[np.ndarray] = []  # native code knows their addresses
        stages = [stage for stage in stages if stage[1]]
        self.stages = [
            self._keep(np.array([(self._linked(calls, thread), len(calls), n) for n, calls in stages], np.int64))
            for thread in range(threads)
        ]

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
            take(stencil.name)
            done = {name for name in stencil.inputs if last[name] == k and name not in segment.inputs}
            arena.give_back(places[name] for name in done)
        if arena.size > FARTHEST:
            raise TooLarge(f"the values of this network take {arena.size:,} bytes; kernels reach {FARTHEST:,}")
        self.places = {name: Place(p.geometry, segment.shapes[name][0], p.start) for name, p in places.items()}
        return self.places

    def _lower(self, places: Mapping[str, Place], stencils: Sequence[Stencil]) -> list[list[Step]]:
        return [
            [
                self._step(stencil.part(first, stop), places, places[stencil.name].part(first, stop, thread))
                for thread, (first, stop) in enumerate(_shares(stencil, places[stencil.name], self.threads))
            ]
            for stencil in stencils
        ]

    def _step(self, stencil: Stencil, places: Mapping[str, Place], out: Place) -> Step:
        if not out.channels:
            return NOTHING
        ways = {way.label: way for way in candidates(stencil, places[stencil.inputs[0]].geometry.examples)}
        way = ways.get(self.choices.get(stencil.name, ""), next(iter(ways.values())))
        return way.lower(stencil, places, out)

    def _single(self, arena: Arena) -> list[_Stage]:
        segment = self.segment
        geometry = geometries(segment.halos(), 1, vector_lanes())
        places = self._places(arena, dict.fromkeys(segment.shapes, geometry))
        outputs = 1 + len(segment.inputs)

        def copy(name: str, *, back: bool) -> list[Step]:
            return [single_copy_step(places[name].places(name in segment.channels_last), back=back)]

        return [
            (1, [_Call(copy(name, back=False), 1 + k) for k, name in enumerate(segment.inputs)]),
            (1, [_Call(steps) for steps in self._lower(places, segment.stencils)]),
            (1, [_Call(copy(name, back=True), destination=outputs + k) for k, name in enumerate(segment.outputs)]),
        ]

    def _batch(self, arena: Arena, vectors: int, split: int) -> list[_Stage]:
        segment, lanes = self.segment, vector_lanes()
        one, many = (geometries(segment.halos(), n * lanes, lanes) for n in (1, vectors))
        late = {s.name for s in segment.stencils[split:]} | (segment.crossing(split) or set())
        if not split:
            late = set(segment.shapes)
        places = self._places(arena, {n: many if n in late else one for n in segment.shapes})
        vector, outputs = lanes * FLOAT_BYTES, 1 + len(segment.inputs)

        def copy(name: str, *, back: bool) -> list[Step]:
            inside = places[name].places(name in segment.channels_last)
            return [batch_copy_step(inside, segment.used(name), back=back)]

        move = {name: vector if name in late else 0 for name in segment.shapes}
        pack = [
            _Call(
                copy(name, back=False),
                source=1 + k,
                source_move=lanes * _bytes(segment, name),
                destination_move=move[name],
            )
            for k, name in enumerate(segment.inputs)
        ]
        unpack = [
            _Call(
                copy(name, back=True),
                source_move=move[name],
                destination=outputs + k,
                destination_move=lanes * _bytes(segment, name),
            )
            for k, name in enumerate(segment.outputs)
        ]
        before, after = segment.stencils[:split], segment.stencils[split:]
        early = [
            _Call(steps, destination_move=move[stencil.name])
            for stencil, steps in zip(before, self._lower(places, before), strict=True)
        ]
        together = [_Call(steps) for steps in self._lower(places, after)]
        if not together:
            return [(vectors, [*pack, *early, *unpack])]
        return [(vectors, [*pack, *early]), (1, together), (vectors, unpack)]

    def _keep(self, array: np.ndarray) -> np.ndarray:
        kept = aligned(array.shape, array.dtype)
        kept[...] = array
        self._kept.append(kept)
        return kept

    def _linked(self, calls: Sequence[_Call], thread: int) -> int:
        """The address of the driver's list of a thread's steps. The first one copies, alone."""
        rows = []
        for call in calls:
            step = call.steps[thread] if thread < len(call.steps) else NOTHING
            tables = [address(self._keep(t)) if isinstance(t, np.ndarray) else t for t in step.tables]
            code, place = compile_kernel(step.kernel), address(self._keep(np.array(tables, np.int64)))
            rows.append([code, place, call.source, call.source_move, call.destination, call.destination_move])
        return address(self._keep(np.array(rows, np.int64)))


def _bytes(segment: Segment, value: str) -> int:
    """Of one example's value."""
    return FLOAT_BYTES * int(np.prod(segment.shapes[value]))


def _shares(stencil: Stencil, out: Place, threads: int) -> list[tuple[int, int]]:
    """(first, stop) of the output channels that each thread computes: about as much work for one as for another."""
    channels = stencil.shape[0]
    if stencil.combine != "sum" and out.geometry.examples == 1 and not out.geometry.slack:
        return [(0, channels)]  # one vector covers several channels, which have to be stored in their order
    work = np.bincount(stencil.entries.row, minlength=channels) + ROW_TERMS
    middles = np.cumsum(work) - work / 2
    cuts = np.searchsorted(middles, work.sum() * np.arange(1, threads) / threads)
    return list(itertools.pairwise([0, *map(int, cuts), channels]))


def _numbers(values: Sequence[int]) -> Any:
    """What native code reads and Python writes, which takes NumPy three times as long."""
    return (ctypes.c_int64 * len(values))(*values)


class Bound:
    """A program with memory of its own to compute in, which it does once at a time.

    Attributes:
        members: what every thread of the program has to call, all at the same time: each waits for the others.
        call: the address of the function and those of its three arguments, for native code to call the first member.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._arena = aligned((program.arena_bytes + REACH,), np.uint8)
        self._arena[:] = 0
        moves = program.group_bytes
        self._bases = _numbers([address(self._arena), *moves, 0, *moves])
        self._counts = _numbers([len(program.stages[0]), 0, 1 + len(moves), program.threads, giving_way(), 0])
        driver, bases, counts = native_function(build_driver), *map(ctypes.addressof, (self._bases, self._counts))
        arguments = [(address(stages), bases, counts) for stages in program.stages]
        self.members: list[Callable[[], None]] = [
            functools.partial(driver, *map(ctypes.c_void_p, given)) for given in arguments
        ]
        self.again = self.members[0]
        where = ctypes.cast(driver, ctypes.c_void_p).value
        assert where
        self.call = where, *arguments[0]

    def __call__(self, addresses: Sequence[int], groups: int) -> None:
        """Run, on one thread, on so many groups of `program.examples` examples, whose inputs and outputs lie one behind
        the other at these addresses; `again` runs on the same ones once more."""
        if self.program.threads > 1:
            raise ValueError("a program of several threads: each of them has to call its member")
        self.point_to(addresses, groups)
        self.again()

    def point_to(self, addresses: Sequence[int], groups: int) -> None:
        """What `again`, or all `members`, will run on."""
        self._bases[1 : 1 + len(addresses)] = addresses
        self._counts[1], self._counts[5] = groups, 0

    def value(self, name: str) -> np.ndarray:
        """Where a value of one pixel a channel lies, (channels, examples) float32."""
        place = self.program.places[name]
        return np.ndarray((place.channels, place.geometry.examples), np.float32, self._arena, place.first)

    def release(self) -> None:
        """Let members go that wait for one that will not come; what they compute is of no use."""
        self._counts[5] = RELEASED
