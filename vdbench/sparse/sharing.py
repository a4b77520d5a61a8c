"""One example shared out among threads: everyone computes some rows of every step, then waits for the others."""

import ctypes
import itertools
import os
from dataclasses import replace
from typing import Any, cast

import numpy as np

from vdbench.sparse.code import FLOAT_BYTES
from vdbench.sparse.codegen import Slices, Tile
from vdbench.sparse.copies import Copy
from vdbench.sparse.driver import Barrier
from vdbench.sparse.lowering import Step

ROW_TERMS = 4  # what a row costs beside its terms, in terms


def shares(step: Step, threads: int) -> list[Step]:
    """A step on a single example, cut into one of about the same work for every thread.

    Rows are whole output channels: tiles of one channel may write over each other's ends.
    """
    if threads == 1:
        return [step]
    kernel = step.kernel
    if isinstance(kernel, Tile):
        return _tile_shares(step, kernel, threads)
    if isinstance(kernel, Slices):
        return _slice_shares(step, kernel.lanes, threads)
    if isinstance(kernel, Copy):
        return [replace(step, tables=[len(part), part]) for part in np.array_split(step.tables[1], threads)]
    raise TypeError(f"no single example runs through {kernel}")


def _cuts(stops: np.ndarray, threads: int) -> list[tuple[int, int]]:
    """First row and the one after the last for every thread, rows costing their terms, whose ends are `stops`."""
    cost = stops + ROW_TERMS * np.arange(1, len(stops) + 1)
    inner = np.searchsorted(cost, cost[-1] * np.arange(1, threads) / threads)
    bounds = [0, *map(int, inner), len(stops)]
    return list(itertools.pairwise(bounds))


def _tile_shares(step: Step, kernel: Tile, threads: int) -> list[Step]:
    count, _, places, rows, entries, bias, masks = cast(list[Any], step.tables)
    found = []
    reach = places[:, 1].max() + max(place for place, _ in kernel.stores) + kernel.lanes * FLOAT_BYTES
    if reach > np.diff(rows[:, 1]).min(initial=reach):  # zeros behind a row, where the next one is stored later
        cuts = [(0, len(rows)), *[(len(rows), len(rows))] * (threads - 1)]
    else:
        cuts = _cuts(rows[:, 0], threads)
    for first, stop in cuts:
        before, own = int(rows[first - 1, 0]) if first else 0, rows[first:stop].copy()
        own[:, 0] -= before
        own_bias = bias[:, first:stop] if kernel.place_bias else bias[first:stop]
        tables = [count, len(own), places, own, entries[before:], own_bias, masks]
        found.append(replace(step, tables=tables))
    return found


def _slice_shares(step: Step, lanes: int, threads: int) -> list[Step]:
    _, ends, weights, operands, bias, outputs = cast(list[Any], step.tables)
    found = []
    for first, stop in _cuts(ends, threads):
        before, units = int(ends[first - 1]) if first else 0, slice(first * lanes, stop * lanes)
        own = [ends[first:stop] - before, weights[before:], operands[before:], bias[units], outputs[units]]
        found.append(replace(step, tables=[stop - first, *own]))
    return found


def barrier(counter: np.ndarray, threads: int) -> Step:
    """Where everyone waits for everyone; all barriers of a program share one counter (i64)."""
    return Step(Barrier(threads), [counter, _YIELD])


def _address_of_yield() -> int:
    """Of the operating system's function that lets another thread work, both of which take no arguments."""
    library = ctypes.windll.kernel32.SwitchToThread if os.name == "nt" else ctypes.CDLL(None).sched_yield  # type: ignore[attr-defined]
    return ctypes.cast(library, ctypes.c_void_p).value or 0


_YIELD = _address_of_yield()
