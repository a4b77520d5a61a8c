"""From a stencil to the kernels that can compute it, and the tables they read."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from vdbench.sparse.code import FLOAT_BYTES
from vdbench.sparse.codegen import PICKS, Slices, Tile
from vdbench.sparse.jit import Kernel, supports, vector_lanes
from vdbench.sparse.layout import TRASH, ZEROS, Place
from vdbench.sparse.moving import Copy, Transpose
from vdbench.sparse.stencil import Stencil
from vdbench.sparse.tiles import batch_tiles, block_of, blocks_pay, flat_tiles, row_tiles, tile_shape, visits

REGISTERS = (8, 12, 16, 24)  # accumulators; the rest of 32 vector registers are for weights and operands
HIDING = 8  # multiply-adds that have to be under way at a time to hide their latency
UNROLLED_PIXELS = 16  # maps up to this size may be computed as if by a linear layer


@dataclass(frozen=True)
class Step:
    """A kernel and its tables: numbers, or arrays whose addresses it is given."""

    kernel: Kernel
    tables: list[int | np.ndarray] = field(repr=False)


NOTHING = Step(Copy(1), [0, np.zeros((0, 2), np.int64)])  # for a thread that has no part in a step


@dataclass(frozen=True)
class Candidate:
    """One way to compute a stencil; `label` names it for people and for the plan that is stored."""

    label: str
    lower: Callable[[Stencil, Mapping[str, Place], Place], Step]


def candidates(stencil: Stencil, examples: int) -> list[Candidate]:
    """The ways that may be worth measuring, for pixels of `examples` numbers (1: single examples)."""
    height, width = stencil.computed()
    single, widest = examples == 1, vector_lanes()
    found = []
    apart = stencil.stride[1] if single else 1  # numbers from lane to lane
    if apart <= 2 and not (single and height * width == 1 and stencil.combine == "sum"):
        # pixels of one map fill narrow vectors better than wide ones, and some processors add them no slower
        for lanes in (widest, widest // 2) if single else (widest,):
            shapes = {tile_shape(stencil, examples, size, lanes): size for size in reversed(REGISTERS)}
            for size in sorted(shapes.values()):
                found.append(_tile_candidate(size, lanes))
                if not single and blocks_pay(stencil, examples, size):
                    found.append(_tile_candidate(size, lanes, blocked=True))
    small = height * width <= UNROLLED_PIXELS and stencil.pool == (1, 1) and stencil.combine == "sum"
    if single and small:
        found.append(Candidate("slices", functools.partial(slices_step, windows=False)))
        if _window_vectors():
            found.append(Candidate("windows", functools.partial(slices_step, windows=True)))
    elif small and height * width > 1:
        found.append(Candidate("unrolled", unrolled_step))
    return found


def _tile_candidate(registers: int, lanes: int, *, blocked: bool = False) -> Candidate:
    label = f"tile {registers}x{lanes}{' blocked' if blocked else ''}"
    return Candidate(label, functools.partial(tile_step, registers=registers, lanes=lanes, blocked=blocked))


def _operands(stencil: Stencil, places: Mapping[str, Place]) -> np.ndarray:
    """Byte offset from the start of the arena of every entry's operand for the output pixel (0, 0)."""
    e = stencil.entries
    found = np.zeros(len(e.row), np.int64)
    for k, name in enumerate(stencil.inputs):
        place, mine = places[name], e.source == k
        g = place.geometry
        channel, y, x = (column[mine].astype(np.int64) for column in (e.channel, e.y, e.x))
        found[mine] = place.first + channel * g.plane + y * g.pitch + x * g.pixel
    return found


def _packed(weights: np.ndarray, places: np.ndarray) -> np.ndarray:
    entries = np.zeros(len(weights), [("weight", np.float32), ("place", np.int32)])
    entries["weight"], entries["place"] = weights, places
    return entries


def _chains(stencil: Stencil, accumulators: int) -> int:
    """Chains, where a row has enough terms for them to matter."""
    terms = len(stencil.entries.row) / max(1, stencil.shape[0])
    return 1 if stencil.combine != "sum" or terms < 4 else max(1, min(4, HIDING // accumulators))


def tile_step(
    stencil: Stencil, places: Mapping[str, Place], out: Place, *, registers: int, lanes: int, blocked: bool
) -> Step:
    """One pass over a row's weights for every tile of output pixels; if `blocked`, a visit of the row for every block
    of inputs, which stay in the first-level cache while a group of rows goes over them."""
    source, target = places[stencil.inputs[0]].geometry, out.geometry
    single, channels, (height, width) = source.examples == 1, stencil.shape[0], stencil.computed()
    assert height * width == 1 or all(places[name].geometry.pitch == source.pitch for name in stencil.inputs)
    if not single:
        tiles = batch_tiles(stencil, source, target, registers)
    elif stencil.stride == (1, 1) and source.pitch == target.pitch:
        tiles = flat_tiles(stencil, source, registers, lanes)
    else:
        tiles = row_tiles(stencil, source, target, registers, lanes)
    bias = stencil.bias
    if bias.ndim > 1:
        flat = np.append(bias[:, :height, :width].reshape(channels, -1), np.zeros((channels, 1)), axis=1)
        bias = np.moveaxis(flat[:, tiles.pixels], 0, 1)  # [tile][channel][accumulator], and [lane] if those are pixels
    kernel = Tile(
        lanes,
        tuple(tiles.loads),
        tuple(tiles.stores),
        chains=_chains(stencil, len(tiles.loads)),
        stride=stencil.stride[1] if single else 1,
        combine=stencil.combine,
        place_bias=stencil.bias.ndim > 1,
        masked=single,
        blocked=blocked,
        activation=stencil.activation,
    )
    entries = _packed(stencil.entries.weight, _operands(stencil, places))
    place = out.first + np.arange(channels) * target.plane
    if blocked:
        partial_bytes = len(tiles.loads) * lanes * FLOAT_BYTES
        order, (stop, partial, kind), row = visits(
            stencil, block_of(stencil, source.examples, registers), partial_bytes
        )
        entries, bias = entries[order], bias[row]
        rows = np.stack([stop, place[row], out.partial + partial, kind], axis=1)
    else:
        rows = np.stack([np.cumsum(np.bincount(stencil.entries.row, minlength=channels)), place], axis=1)
    masks = tiles.masks() if single else np.zeros(1, np.uint16)
    counts = [len(tiles.places), len(rows), tiles.places, rows.astype(np.int32)]
    return Step(kernel, [*counts, entries, np.ascontiguousarray(bias, np.float32), masks])


def _unrolled(stencil: Stencil, places: Mapping[str, Place], out: Place) -> "_Unrolled":
    """The stencil with every output pixel a row of its own, terms that fall into the halo left out."""
    height, width = stencil.computed()
    e, pixels = stencil.entries, height * width
    y, x = np.divmod(np.arange(pixels), width)
    y, x = y[:, None] * stencil.stride[0], x[:, None] * stencil.stride[1]
    geometries = [places[name].geometry for name in stencil.inputs]
    row, operand, weight = e.row, _operands(stencil, places), e.weight
    if pixels > 1 or e.y.any() or e.x.any():  # else nothing lies in a halo
        height_of, width_of, pitch, size = (
            np.array([getattr(g, key) for g in geometries])[e.source] for key in ("height", "width", "pitch", "pixel")
        )
        inside = (y + e.y >= 0) & (y + e.y < height_of) & (x + e.x >= 0) & (x + e.x < width_of)
        pixel, term = np.nonzero(inside)
        operand = operand[term] + y[pixel, 0] * pitch[term] + x[pixel, 0] * size[term]
        row, weight = e.row[term] * pixels + pixel, weight[term]
    if np.any((row[1:] < row[:-1]) | ((row[1:] == row[:-1]) & (operand[1:] < operand[:-1]))):
        order = np.lexsort((operand, row))
        row, operand, weight = row[order], operand[order], weight[order]
    bias = stencil.bias if stencil.bias.ndim > 1 else np.repeat(stencil.bias, pixels)
    bias = bias[:, :height, :width] if bias.ndim > 1 else bias
    outputs = out.start + out.geometry.places(stencil.shape[0])
    return _Unrolled(row, operand, weight, bias.ravel().astype(np.float32), outputs.ravel())


@dataclass(frozen=True)
class _Unrolled:
    """Terms sorted by row and operand, with their weights; every row's bias and place."""

    row: np.ndarray
    operand: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    place: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        return np.bincount(self.row, minlength=len(self.bias))


def unrolled_step(stencil: Stencil, places: Mapping[str, Place], out: Place) -> Step:
    """Small maps of a batch: no multiplication with the halo, one accumulator a vector of examples."""
    terms, vector = _unrolled(stencil, places, out), vector_lanes() * FLOAT_BYTES
    offsets = [v * vector for v in range(places[stencil.inputs[0]].geometry.examples // vector_lanes())]
    kernel = Tile(
        vector_lanes(),
        tuple(offsets),
        tuple((offset, (k,)) for k, offset in enumerate(offsets)),
        chains=_chains(stencil, len(offsets)),
        activation=stencil.activation,
    )
    rows = np.stack([np.cumsum(terms.counts), terms.place], axis=1).astype(np.int32)
    entries = _packed(terms.weight, terms.operand)
    tables = [1, len(rows), np.zeros(2, np.int64), rows, entries, terms.bias, np.zeros(1, np.uint16)]
    return Step(kernel, tables)


def slices_step(stencil: Stencil, places: Mapping[str, Place], out: Place, *, windows: bool) -> Step:
    """Single vectors and small maps: lanes are output units. Units with like numbers of terms share a slice; a lane
    that has no term in a step adds zero times zero. With `windows`, a step's terms lie near one another."""
    terms, lanes = _unrolled(stencil, places, out), vector_lanes()
    counts = terms.counts
    order = np.argsort(-counts, kind="stable")
    slices = -(-len(order) // lanes)

    def by_lane(values: np.ndarray, filler: int = 0) -> np.ndarray:
        return np.append(values[order], np.full(slices * lanes - len(order), filler, values.dtype))

    ends = by_lane(np.cumsum(counts)).reshape(slices, lanes)
    share_out = _in_windows if windows else _one_by_one
    step, starts, lengths = share_out(terms, ends - by_lane(counts).reshape(slices, lanes), ends)
    stops = np.cumsum(lengths)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    slice_of, lane = np.divmod(rank[terms.row], lanes)
    step += (stops - lengths)[slice_of]
    weights = np.zeros((stops[-1], lanes), np.float32)
    weights[step, lane] = terms.weight
    nothing, kind = (-1, np.int8) if windows else (ZEROS, np.int32)
    inputs = np.full(weights.shape, nothing, kind)
    inputs[step, lane] = (terms.operand - starts[step]) // FLOAT_BYTES if windows else terms.operand
    kernel = Slices(lanes, windows, stencil.activation)
    outputs = by_lane(terms.place.astype(np.int32), TRASH)
    return Step(kernel, [slices, stops, weights, inputs, by_lane(terms.bias), outputs, starts.astype(np.int32)])


def _window_vectors() -> int:
    """Vectors that inputs can be picked out of at a time; 0 where this processor cannot."""
    feature, _, vectors = PICKS.get(vector_lanes(), ("", "", 0))
    return vectors if supports(feature) else 0


Shares = tuple[np.ndarray, np.ndarray, np.ndarray]  # every term's step in its slice, steps' windows, steps of slices


def _one_by_one(terms: _Unrolled, firsts: np.ndarray, ends: np.ndarray) -> Shares:
    """A term of every lane in every step; `firsts` and `ends` (slices, lanes) of every lane's terms."""
    begin = np.cumsum(terms.counts) - terms.counts
    return np.arange(len(terms.row)) - begin[terms.row], np.zeros(0, np.int64), (ends - firsts).max(1)


def _in_windows(terms: _Unrolled, firsts: np.ndarray, ends: np.ndarray) -> Shares:
    """In every step the next term of those lanes where it lies in the window of the foremost one, which begins at a
    multiple of a vector."""
    vector = vector_lanes() * FLOAT_BYTES
    span, upcoming = _window_vectors() * vector, np.append(terms.operand, np.iinfo(np.int64).max)
    step, lengths = np.zeros(len(terms.row), np.int64), np.zeros(len(ends), np.int64)
    position, going = firsts.copy(), np.arange(len(ends))
    starts, slices = [np.zeros(0, np.int64)], [going[:0]]
    while len(going := going[(position[going] < ends[going]).any(1)]):
        here = position[going]
        operand = np.where(here < ends[going], upcoming[here], upcoming[-1])
        start = operand.min(1) // vector * vector
        taken = operand < (start + span)[:, None]
        step[here[taken]] = np.broadcast_to(lengths[going, None], taken.shape)[taken]
        position[going] += taken
        lengths[going] += 1
        starts.append(start)
        slices.append(going)
    order = np.argsort(np.concatenate(slices), kind="stable")
    return step, np.concatenate(starts)[order], lengths


def batch_copy_step(places: np.ndarray, used: np.ndarray, *, back: bool) -> Step:
    """Examples, one behind the other, to lanes of vectors at `places`, or back; of all numbers those that are `used`.
    Others in a square with them go where they disturb nothing in the cache."""
    lanes, places = vector_lanes(), places.ravel()
    if not back:
        places = np.where(used, places, TRASH)
    blocks = len(places) // lanes
    needed = np.flatnonzero(used[: blocks * lanes].reshape(blocks, lanes).any(1)) * lanes
    singles = blocks * lanes + np.flatnonzero(used[blocks * lanes :])
    tables = [len(needed), len(singles), needed.astype(np.int64), singles.astype(np.int64), places.astype(np.int64)]
    return Step(Transpose(lanes, len(places), back), tables)


def single_copy_step(places: np.ndarray, *, back: bool) -> Step:
    """One example's numbers to their `places`, or back: all at once or row by row where they lie side by side, else one
    by one."""
    flat, width = places.ravel(), places.shape[-1]
    if flat[-1] - flat[0] == (len(flat) - 1) * FLOAT_BYTES:
        floats = len(flat)
    else:
        floats = width if flat[width - 1] - flat[0] == (width - 1) * FLOAT_BYTES else 1
    inside = flat[::floats]
    outside = np.arange(len(inside)) * floats * FLOAT_BYTES
    pairs = np.stack([inside, outside] if back else [outside, inside], axis=1).astype(np.int64)
    return Step(Copy(floats), [len(inside), pairs])
