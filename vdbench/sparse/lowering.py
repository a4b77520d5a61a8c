"""From a stencil to the kernels that can compute it, and the tables they read."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from vdbench.sparse.codegen import FLOAT_BYTES, Copy, Kernel, Slices, Tile, Transpose
from vdbench.sparse.jit import vector_lanes
from vdbench.sparse.layout import Geometry, Place
from vdbench.sparse.stencil import Stencil

# Two places at the start of every arena: zeros that nobody writes, and a place for what nobody reads.
ZEROS, TRASH, RESERVED = 0, 256, 512
REGISTERS = (8, 12, 16, 24)  # accumulators; the rest of 32 vector registers are for weights and operands
HIDING = 8  # multiply-adds that have to be under way at a time to hide their latency
UNROLLED_PIXELS = 16  # maps up to this size may be computed as if by a linear layer


@dataclass(frozen=True)
class Step:
    """A kernel and its tables: numbers, or arrays whose addresses it is given."""

    kernel: Kernel
    tables: list[int | np.ndarray] = field(repr=False)


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
    if not (single and height * width == 1 and not stencil.maximum):
        # pixels of one map fill narrow vectors better than wide ones, and some processors add them no slower
        for lanes in (widest, widest // 2) if single else (widest,):
            shapes = {_tile_shape(stencil, examples, size, lanes): size for size in reversed(REGISTERS)}
            for size in sorted(shapes.values()):
                found.append(_tile_candidate(size, lanes))
    small = height * width <= UNROLLED_PIXELS and stencil.pool == (1, 1) and not stencil.maximum
    if single and small:
        found.append(Candidate("slices", slices_step))
    elif small and height * width > 1:
        found.append(Candidate("unrolled", unrolled_step))
    return found


def _tile_candidate(registers: int, lanes: int) -> Candidate:
    return Candidate(f"tile {registers}x{lanes}", lambda *args: tile_step(*args, registers, lanes))


def _tile_shape(stencil: Stencil, examples: int, registers: int, lanes: int) -> tuple[int, int]:
    """Rows and columns of output pixels of a tile, or of vectors where lanes are pixels."""
    (height, width), (ph, pw) = stencil.computed(), stencil.pool
    if examples == 1:
        width = -(-width // lanes)
    budget = max(registers // max(1, examples // lanes), ph * pw)
    columns = min(width, budget // ph)
    columns = -(-width // -(-width // columns))  # as few tiles a row, as equal as they get
    columns = min(width, -(-columns // pw) * pw) if examples > 1 else columns
    rows = min(height, max(budget // columns // ph, 1) * ph)
    return rows, columns


def _covering(total: int, size: int) -> list[int]:
    """Where tiles of `size` begin to cover `total`; the last one may overlap the one before."""
    return [*range(0, total - size, size), total - size]


def _operands(stencil: Stencil, places: Mapping[str, Place]) -> np.ndarray:
    """Byte offset from the start of the arena of every entry's operand for the output pixel (0, 0)."""
    e = stencil.entries
    found = np.zeros(len(e.row), np.int64)
    for k, name in enumerate(stencil.inputs):
        place, mine = places[name], e.source == k
        g = place.geometry
        found[mine] = place.first + e.channel[mine] * g.plane + e.y[mine] * g.pitch + e.x[mine] * g.pixel
    return found


def _packed(weights: np.ndarray, places: np.ndarray) -> np.ndarray:
    entries = np.zeros(len(weights), [("weight", np.float32), ("place", np.int32)])
    entries["weight"], entries["place"] = weights, places
    return entries


def _activation(stencil: Stencil) -> dict[str, float | None]:
    return {"low": stencil.low, "high": stencil.high, "slope": stencil.slope}


def _chains(stencil: Stencil, accumulators: int) -> int:
    """Chains, where a row has enough terms for them to matter."""
    terms = len(stencil.entries.row) / max(1, stencil.shape[0])
    return 1 if stencil.maximum or terms < 4 else max(1, min(4, HIDING // accumulators))


@dataclass(frozen=True)
class _Tiles:
    """Tiles that cover a plane: where they are (source, destination: bytes), what one of them holds, and which pixel
    every accumulator (of every lane, where lanes are pixels) is in every tile, -1 for none."""

    places: np.ndarray
    loads: list[int]
    stores: list[tuple[int, tuple[int, ...]]]
    pixels: np.ndarray

    def masks(self) -> np.ndarray:
        """Bit k set where lane k is a pixel, for every vector of every tile."""
        return np.ascontiguousarray(((self.pixels >= 0) << np.arange(self.pixels.shape[2])).sum(2).astype(np.uint16))


def _batch_tiles(stencil: Stencil, source: Geometry, target: Geometry, registers: int) -> _Tiles:
    """Tiles of rows and columns of pixels, every pixel a few vectors of examples."""
    (height, width), (ph, pw), (sy, sx) = stencil.computed(), stencil.pool, stencil.stride
    rows, columns = _tile_shape(stencil, source.examples, registers, vector_lanes())
    vectors, vector = source.examples // vector_lanes(), vector_lanes() * FLOAT_BYTES
    accumulators = list(itertools.product(range(rows), range(columns), range(vectors)))
    loads = [r * sy * source.pitch + c * sx * source.pixel + v * vector for r, c, v in accumulators]
    windows: dict[int, list[int]] = {}
    for k, (r, c, v) in enumerate(accumulators):
        windows.setdefault(r // ph * target.pitch + c // pw * target.pixel + v * vector, []).append(k)
    corners = list(itertools.product(_covering(height, rows), _covering(width, columns)))
    places = [
        (y * sy * source.pitch + x * sx * source.pixel, y // ph * target.pitch + x // pw * target.pixel)
        for y, x in corners
    ]
    pixels = [[(y + r) * width + x + c for r, c, _ in accumulators] for y, x in corners]
    stores = [(place, tuple(members)) for place, members in windows.items()]
    return _Tiles(np.array(places, np.int64), loads, stores, np.array(pixels))


def _row_tiles(stencil: Stencil, source: Geometry, target: Geometry, registers: int, lanes: int) -> _Tiles:
    """Tiles of whole vectors of pixels of one row or several. A vector that reaches over the end of its row stores
    zeros there; what they hit is stored later."""
    (height, width), (sy, sx) = stencil.computed(), stencil.stride
    rows, vectors = _tile_shape(stencil, 1, registers, lanes)
    accumulators = list(itertools.product(range(rows), range(vectors)))
    loads = [r * sy * source.pitch + v * lanes * sx * FLOAT_BYTES for r, v in accumulators]
    stores = [(r * target.pitch + v * lanes * FLOAT_BYTES, (k,)) for k, (r, v) in enumerate(accumulators)]
    corners = list(itertools.product(_covering(height, rows), _covering(-(-width // lanes), vectors)))
    places = [
        (y * sy * source.pitch + v * lanes * sx * FLOAT_BYTES, y * target.pitch + v * lanes * FLOAT_BYTES)
        for y, v in corners
    ]
    y = np.array([[[y + r] for r, _ in accumulators] for y, _ in corners])
    x = np.array([[[(v + k) * lanes] for _, k in accumulators] for _, v in corners]) + np.arange(lanes)
    return _Tiles(np.array(places, np.int64), loads, stores, np.where(x < width, y * width + x, -1))


def _flat_tiles(stencil: Stencil, geometry: Geometry, registers: int, lanes: int) -> _Tiles:
    """Tiles of vectors that run on from row to row, halo included, where input and output lie alike."""
    height, width = stencil.computed()
    pitch = geometry.pitch // FLOAT_BYTES
    vectors = -(-((height - 1) * pitch + width) // lanes)
    size = -(-vectors // -(-vectors // registers))
    starts = np.array(_covering(vectors, size))
    offsets = [k * lanes * FLOAT_BYTES for k in range(size)]
    position = (starts[:, None, None] + np.arange(size)[:, None]) * lanes + np.arange(lanes)
    y, x = np.divmod(position, pitch)
    return _Tiles(
        np.repeat(starts[:, None] * lanes * FLOAT_BYTES, 2, axis=1).astype(np.int64),
        offsets,
        [(offset, (k,)) for k, offset in enumerate(offsets)],
        np.where((y < height) & (x < width), y * width + x, -1),
    )


def tile_step(stencil: Stencil, places: Mapping[str, Place], out: Place, registers: int, lanes: int) -> Step:
    """One pass over a row's weights for every tile of output pixels."""
    source, target = places[stencil.inputs[0]].geometry, out.geometry
    single, channels, (height, width) = source.examples == 1, stencil.shape[0], stencil.computed()
    if not single:
        tiles = _batch_tiles(stencil, source, target, registers)
    elif stencil.stride == (1, 1) and source.pitch == target.pitch:
        tiles = _flat_tiles(stencil, source, registers, lanes)
    else:
        tiles = _row_tiles(stencil, source, target, registers, lanes)
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
        maximum=stencil.maximum,
        place_bias=stencil.bias.ndim > 1,
        masked=single,
        **_activation(stencil),
    )
    ends = np.cumsum(np.bincount(stencil.entries.row, minlength=channels))
    rows = np.stack([ends, out.first + np.arange(channels) * target.plane], axis=1).astype(np.int32)
    entries = _packed(stencil.entries.weight, _operands(stencil, places))
    masks = tiles.masks() if single else np.zeros(1, np.uint16)
    tables = [len(tiles.places), channels, tiles.places, rows, entries, np.ascontiguousarray(bias, np.float32), masks]
    return Step(kernel, tables)


def _unrolled(stencil: Stencil, places: Mapping[str, Place], out: Place) -> "_Unrolled":
    """The stencil with every output pixel a row of its own, terms that fall into the halo left out."""
    height, width = stencil.computed()
    e, pixels = stencil.entries, height * width
    y, x = np.divmod(np.arange(pixels), width)
    y, x = y[:, None] * stencil.stride[0], x[:, None] * stencil.stride[1]
    sizes = np.array([(g.height, g.width) for g in (places[name].geometry for name in stencil.inputs)])
    inside = (y + e.y >= 0) & (y + e.y < sizes[e.source, 0]) & (x + e.x >= 0) & (x + e.x < sizes[e.source, 1])
    pixel, term = np.nonzero(inside)
    row = e.row[term] * pixels + pixel
    order = np.argsort(row, kind="stable")
    pixel, term = pixel[order], term[order]
    geometries = [places[name].geometry for name in stencil.inputs]
    pitch, size = (np.array([getattr(g, key) for g in geometries])[e.source[term]] for key in ("pitch", "pixel"))
    operands = _operands(stencil, places)[term] + y[pixel, 0] * pitch + x[pixel, 0] * size
    bias = stencil.bias if stencil.bias.ndim > 1 else np.repeat(stencil.bias, pixels)
    bias = bias[:, :height, :width] if bias.ndim > 1 else bias
    outputs = out.start + out.geometry.places(stencil.shape[0])
    return _Unrolled(row[order], operands, e.weight[term], bias.ravel().astype(np.float32), outputs.ravel())


@dataclass(frozen=True)
class _Unrolled:
    """Sorted rows and their terms' operands and weights; every row's bias and place."""

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
        **_activation(stencil),
    )
    rows = np.stack([np.cumsum(terms.counts), terms.place], axis=1).astype(np.int32)
    entries = _packed(terms.weight, terms.operand)
    tables = [1, len(rows), np.zeros(2, np.int64), rows, entries, terms.bias, np.zeros(1, np.uint16)]
    return Step(kernel, tables)


def slices_step(stencil: Stencil, places: Mapping[str, Place], out: Place) -> Step:
    """Single vectors and small maps: lanes are output units. Units with like numbers of terms share a slice; the
    shorter ones are filled up with zeros times zero."""
    terms, lanes = _unrolled(stencil, places, out), vector_lanes()
    counts = terms.counts
    slices = -(-len(counts) // lanes)
    order = np.argsort(-counts, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    lengths = np.append(counts[order], np.zeros(slices * lanes - len(order), np.int64)).reshape(slices, lanes).max(1)
    ends = np.cumsum(lengths)
    nth = np.arange(len(terms.row)) - np.repeat(np.cumsum(counts) - counts, counts)
    vector, lane = np.divmod(rank[terms.row], lanes)
    vector = (ends - lengths)[vector] + nth
    weights = np.zeros((ends[-1], lanes), np.float32)
    operands = np.full((ends[-1], lanes), ZEROS, np.int32)
    weights[vector, lane], operands[vector, lane] = terms.weight, terms.operand
    bias, outputs = np.zeros(slices * lanes, np.float32), np.full(slices * lanes, TRASH, np.int32)
    bias[: len(order)], outputs[: len(order)] = terms.bias[order], terms.place[order]
    return Step(Slices(lanes, **_activation(stencil)), [slices, ends, weights, operands, bias, outputs])


def batch_copy_step(place: Place, used: np.ndarray, *, back: bool) -> Step:
    """Examples, one behind the other, to lanes of vectors, or back; of all numbers at least those that are `used`."""
    lanes, places = vector_lanes(), place.places().ravel()
    blocks = len(places) // lanes
    needed = np.flatnonzero(used[: blocks * lanes].reshape(blocks, lanes).any(1)) * lanes
    singles = np.arange(blocks * lanes, len(places))
    tables = [len(needed), len(singles), needed.astype(np.int64), singles.astype(np.int64), places.astype(np.int64)]
    return Step(Transpose(lanes, len(places), back), tables)


def single_copy_step(place: Place, *, back: bool) -> Step:
    """Rows of one example into their place, or back; a vector is one row."""
    places, width = place.places(), place.geometry.width
    contiguous = place.geometry.plane == width * FLOAT_BYTES
    inside = places.ravel()[:1] if contiguous else places[:, :, 0].ravel()
    floats = places.size if contiguous else width
    outside = np.arange(len(inside)) * floats * FLOAT_BYTES
    pairs = np.stack([inside, outside] if back else [outside, inside], axis=1).astype(np.int64)
    return Step(Copy(floats), [len(inside), pairs])
