"""How a plane of output pixels is cut into tiles, and the inputs of a tile into blocks that stay in the cache."""

import itertools
from dataclasses import dataclass

import numpy as np

from vdbench.sparse.code import FLOAT_BYTES
from vdbench.sparse.jit import first_level_bytes, vector_lanes
from vdbench.sparse.layout import PARTIAL_BYTES, Geometry
from vdbench.sparse.stencil import Stencil

INPUTS_SHARE = 3 / 4  # of the first-level cache: a block of inputs stays there
WORTH_A_VISIT = 4  # terms that make up for keeping partial sums


def tile_shape(stencil: Stencil, examples: int, registers: int, lanes: int) -> tuple[int, int]:
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


@dataclass(frozen=True)
class Tiles:
    """Tiles that cover a plane: where they are (source, destination: bytes), what one of them holds, and which pixel
    every accumulator (of every lane, where lanes are pixels) is in every tile, -1 for none."""

    places: np.ndarray
    loads: list[int]
    stores: list[tuple[int, tuple[int, ...]]]
    pixels: np.ndarray

    def masks(self) -> np.ndarray:
        """Bit k set where lane k is a pixel, for every vector of every tile."""
        return np.ascontiguousarray(((self.pixels >= 0) << np.arange(self.pixels.shape[2])).sum(2).astype(np.uint16))


def batch_tiles(stencil: Stencil, source: Geometry, target: Geometry, registers: int) -> Tiles:
    """Tiles of rows and columns of pixels, every pixel a few vectors of examples."""
    (height, width), (ph, pw), (sy, sx) = stencil.computed(), stencil.pool, stencil.stride
    rows, columns = tile_shape(stencil, source.examples, registers, vector_lanes())
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
    return Tiles(np.array(places, np.int64), loads, stores, np.array(pixels))


def row_tiles(stencil: Stencil, source: Geometry, target: Geometry, registers: int, lanes: int) -> Tiles:
    """Tiles of whole vectors of pixels of one row or several. A vector that reaches over the end of its row stores
    zeros there; what they hit is stored later."""
    (height, width), (sy, sx) = stencil.computed(), stencil.stride
    rows, vectors = tile_shape(stencil, 1, registers, lanes)
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
    return Tiles(np.array(places, np.int64), loads, stores, np.where(x < width, y * width + x, -1))


def flat_tiles(stencil: Stencil, geometry: Geometry, registers: int, lanes: int) -> Tiles:
    """Tiles of vectors that run on from row to row, halo included, where input and output lie alike."""
    height, width = stencil.computed()
    pitch = geometry.pitch // FLOAT_BYTES
    vectors = -(-((height - 1) * pitch + width) // lanes)
    size = -(-vectors // -(-vectors // registers))
    starts = np.array(_covering(vectors, size))
    offsets = [k * lanes * FLOAT_BYTES for k in range(size)]
    position = (starts[:, None, None] + np.arange(size)[:, None]) * lanes + np.arange(lanes)
    y, x = np.divmod(position, pitch)
    return Tiles(
        np.repeat(starts[:, None] * lanes * FLOAT_BYTES, 2, axis=1).astype(np.int64),
        offsets,
        [(offset, (k,)) for k, offset in enumerate(offsets)],
        np.where((y < height) & (x < width), y * width + x, -1),
    )


def _covering(total: int, size: int) -> list[int]:
    """Where tiles of `size` begin to cover `total`; the last one may overlap the one before."""
    return [*range(0, total - size, size), total - size]


def block_of(stencil: Stencil, examples: int, registers: int) -> np.ndarray:
    """Of every entry, the block of input channels it reads: as many as a tile can read from the first-level cache."""
    e, (sy, sx) = stencil.entries, stencil.stride
    rows, columns = tile_shape(stencil, examples, registers, vector_lanes())
    window = ((rows - 1) * sy + np.ptp(e.y) + 1) * ((columns - 1) * sx + np.ptp(e.x) + 1)
    channels = max(1, int(INPUTS_SHARE * first_level_bytes() / (window * examples * FLOAT_BYTES)))
    return e.source * (int(e.channel.max()) // channels + 1) + e.channel // channels


def blocks_pay(stencil: Stencil, examples: int, registers: int) -> bool:
    """Whether a row's visit of a block of inputs has, on average, enough terms to be worth partial sums."""
    if stencil.combine != "sum" or stencil.bias.ndim > 1 or not len(stencil.entries.row):
        return False
    block, row = block_of(stencil, examples, registers), stencil.entries.row
    visits = 1 + np.count_nonzero((row[1:] != row[:-1]) | (block[1:] != block[:-1]))
    return bool(block.any() and len(row) >= WORTH_A_VISIT * visits)


def visits(stencil: Stencil, block: np.ndarray, partial_bytes: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Groups of rows whose partial sums fit into their place go through one block of inputs after the other.

    Returns the entries' new order; of every visit its last entry, the place of its partial sums among those, and
    whether it is its row's first (1) and last (2); and its row.
    """
    row, channels, blocks = stencil.entries.row.astype(np.int64), stencil.shape[0], int(block.max(initial=0)) + 1
    together = max(1, PARTIAL_BYTES // partial_bytes)
    keys = (row // together * blocks + block) * channels + row
    empty = np.setdiff1d(np.arange(channels), row)
    visits = np.unique(np.concatenate([keys, empty // together * blocks * channels + empty]))
    visited = visits % channels
    counts = np.bincount(np.searchsorted(visits, keys), minlength=len(visits))
    first, last = np.zeros(len(visits), int), np.zeros(len(visits), int)
    first[np.unique(visited, return_index=True)[1]] = 1
    last[len(visits) - 1 - np.unique(visited[::-1], return_index=True)[1]] = 2
    partial = visited % together * partial_bytes
    return np.argsort(keys, kind="stable"), [np.cumsum(counts), partial, first + last], visited
