"""Where the numbers of a value lie in memory.

A channel is a padded plane: rows of pixels with a halo of zeros around them, so that a convolution never asks whether
it is at an edge. A pixel is one number when single examples are computed, and `examples` numbers, lanes of vectors,
when batches are:

    single:  [channel][row][column]                 lanes are neighbouring pixels
    batch:   [channel][row][column][example]        lanes are examples

Values of one map size share one halo, so that a position in one is the same position in another.
"""

import ctypes
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdbench.sparse.code import FLOAT_BYTES
from vdbench.sparse.graph import Padding, Shape

# At the start of every arena: zeros that nobody writes, a place for what nobody reads, and one for the partial sums of
# every thread.
ZEROS, TRASH, PARTIAL, PARTIAL_BYTES = 0, 256, 512, 32 << 10
LINE = 64  # bytes of a cache line: a vector that lies in two takes twice as long


def address(array: np.ndarray) -> int:
    """Where a contiguous array starts; asking `array.ctypes` takes as long as running a small net."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # nothing may be written to it, or nothing is in it
        return array.ctypes.data


def aligned(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """An array, its content arbitrary, that starts where a cache line does."""
    raw = np.empty(math.prod(shape) * np.dtype(dtype).itemsize + LINE, np.uint8)
    return np.ndarray(shape, dtype, raw, -address(raw) % LINE)


@dataclass(frozen=True)
class Geometry:
    """How the planes of values of one map size lie: `examples` numbers a pixel, 1 for single examples."""

    height: int
    width: int
    halo: Padding
    examples: int
    slack: int  # floats behind a plane that a vector may reach into

    @property
    def pixel(self) -> int:
        return self.examples * FLOAT_BYTES

    @property
    def pitch(self) -> int:
        """Bytes from row to row."""
        return (self.width + self.halo[2] + self.halo[3]) * self.pixel

    @property
    def plane(self) -> int:
        """Bytes from channel to channel."""
        return (self.height + self.halo[0] + self.halo[1]) * self.pitch + self.slack * FLOAT_BYTES

    @property
    def first(self) -> int:
        """Bytes from the start of a plane to its first pixel inside the halo."""
        return self.halo[0] * self.pitch + self.halo[2] * self.pixel

    def places(self, channels: int) -> np.ndarray:
        """Byte offsets (channels, height, width) of every pixel from the start of the first plane."""
        c, y, x = np.ogrid[:channels, : self.height, : self.width]
        return self.first + c * self.plane + y * self.pitch + x * self.pixel


def maps(shape: Shape) -> tuple[int, int]:
    """Height and width; a vector has maps of one pixel."""
    return (shape[1], shape[2]) if len(shape) == 3 else (1, 1)


def array_shape(shape: Shape, channels_last: bool) -> Shape:
    """Of the array that a value is read from or written to, for one example."""
    return (*shape[1:], shape[0]) if channels_last else shape


@dataclass(frozen=True)
class Place:
    """A value in memory: its planes' geometry and where the first one starts, in bytes; and where whoever computes it
    keeps partial sums."""

    geometry: Geometry
    channels: int
    start: int
    partial: int = PARTIAL

    def places(self, channels_last: bool = False) -> np.ndarray:
        """Byte offsets (channels, height, width) of every pixel; (height, width, channels) if `channels_last`."""
        found = self.start + self.geometry.places(self.channels)
        return np.moveaxis(found, 0, -1) if channels_last else found

    @property
    def first(self) -> int:
        return self.start + self.geometry.first

    def part(self, first: int, stop: int, thread: int) -> "Place":
        """Some of the channels, for one of several threads to compute."""
        start, partial = self.start + first * self.geometry.plane, PARTIAL + thread * PARTIAL_BYTES
        return Place(self.geometry, stop - first, start, partial)


def geometries(halos: Mapping[tuple[int, int], Padding], examples: int, lanes: int) -> dict[tuple[int, int], Geometry]:
    """The geometry of every map size in `halos`."""
    slack = 2 * lanes if examples == 1 else 0
    return {
        size: Geometry(*size, halo, examples, 0 if size == (1, 1) and not any(halo) else slack)
        for size, halo in halos.items()
    }


class Arena:
    """Hands out memory for values; a place that was given back is only reused for planes of the same geometry, whose
    halo is zero already. So many threads compute in it."""

    def __init__(self, threads: int = 1) -> None:
        self.size = PARTIAL + threads * PARTIAL_BYTES
        self._free: list[Place] = []

    def take(self, geometry: Geometry, channels: int) -> Place:
        fitting = [p for p in self._free if p.geometry == geometry and p.channels >= channels]
        if fitting:
            best = min(fitting, key=lambda place: place.channels)
            self._free.remove(best)
            return best
        start = -(-self.size // LINE) * LINE
        self.size = start + channels * geometry.plane + 4 * geometry.slack * FLOAT_BYTES + LINE
        return Place(geometry, channels, start)

    def give_back(self, places: Iterable[Place]) -> None:
        self._free.extend(places)
