"""The kernels that compute, as LLVM IR: two shapes of code.

- `Tile`: a few vectors of one output row are held in registers while the row's nonzero weights pass by; each is
  spread over a vector and multiplied with as many vectors of the input. Lanes are examples or neighbouring pixels.
- `Slices`: lanes are output units, so the weights are the vectors and the inputs are gathered, or picked out of a
  window of inputs in registers: for single vectors.

Weights and positions are data, not code: one kernel serves every layer of the same geometry.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from vdbench.sparse.code import (
    FLOAT,
    FLOAT_BYTES,
    I1,
    I8,
    I16,
    I32,
    I64,
    IDENTITY,
    POINTER,
    Activation,
    Code,
    Combine,
    Value,
    Variable,
)


@dataclass(frozen=True)
class Tile:
    """What the tile kernel holds in registers, all in bytes from the tile's place in its source and destination.

    `loads`: of every accumulator, its operand. `stores`: (place, accumulators whose maximum goes there), so that
    pooling costs no pass of its own. `chains`: independent sums a row is split into, to hide the latency of a
    multiply-add where there are few accumulators. `stride`: floats between lanes, 0, 1 or 2. `combine`: the weighted
    sum of the operands, or their maximum or product, which take no weights.
    `place_bias`: a bias for every accumulator of every tile (of every lane, if `masked`), not one a row. `masked`:
    lanes not in the tile's mask are stored as zeros. `blocked`: a row is visited once for every block of its inputs,
    its sums kept at a place in the source's memory meanwhile.
    """

    lanes: int
    loads: tuple[int, ...]
    stores: tuple[tuple[int, tuple[int, ...]], ...]
    chains: int = 1
    stride: int = 1
    combine: Combine = "sum"
    activation: Activation = IDENTITY
    place_bias: bool = False
    masked: bool = False
    blocked: bool = False


@dataclass(frozen=True)
class Slices:
    """`lanes` output units at a time. `windows`: the inputs of a step lie in as few vectors as `PICKS` picks from."""

    lanes: int
    windows: bool = False
    activation: Activation = IDENTITY


CHAINS = 4  # sums that a slice is split into where its inputs take no longer than a multiply-add
# What picks numbers out of vectors in registers, by lanes: the feature it comes with, its name and how many vectors.
PICKS = {16: ("avx512f", "x86.avx512.vpermi2var.ps.512", 2), 8: ("avx2", "x86.avx2.permps", 1)}


def _in_chains(code: Code, chains: list[Any], entry: Variable, stop: Value, add: Callable[[Any, Value], None]) -> None:
    """Add the terms from `entry` to `stop` to the chains in turn; `entry` is at `stop` then."""
    count = len(chains)
    if count > 1:
        with code.loop(code.b.sub(stop, I64(count - 1)), entry.get(), count) as e:
            for c, chain in enumerate(chains):
                add(chain, code.b.add(e, I64(c)))
            entry.set(code.b.add(e, I64(count)))
    with code.loop(stop, entry.get()) as e:
        add(chains[0], e)
    entry.set(stop)


def build_tile(code: Code, source: Value, destination: Value, tables: Value, tile: Tile) -> None:
    """Tables: tiles, rows, then the addresses of tile places (source, destination: i64), rows (last entry, place and,
    if `blocked`, the place of partial sums and 1 for the first visit + 2 for the last: i32 all), entries (weight:
    float, place: i32), biases (float), masks (i16, one a store)."""
    b, lanes = code.b, tile.lanes
    vector = ir.VectorType(FLOAT, lanes)
    (count, rows), (places, row_table, entries, biases, masks) = code.parameters(tables, 2, 5)
    width, width_bytes, zero = len(tile.loads), lanes * FLOAT_BYTES, vector([0.0] * lanes)

    def operand(base: Value, offset: int) -> Value:
        if tile.stride == 0:
            return code.splat(code.load(code.at(base, offset), FLOAT), lanes)
        first = code.load(code.at(base, offset), vector)
        if tile.stride == 1:
            return first
        second = code.load(code.at(base, offset + width_bytes), vector)
        even = ir.VectorType(I32, lanes)([2 * k for k in range(lanes)])
        return b.shuffle_vector(first, second, even)

    columns = 4 if tile.blocked else 2

    def start(t: Value, r: Value) -> list[Value]:
        if tile.combine != "sum":
            return [vector([float("-inf") if tile.combine == "maximum" else 1.0] * lanes)] * width
        if not tile.place_bias:
            return [code.splat(code.element(biases, r, FLOAT), lanes)] * width
        first = b.mul(b.add(b.mul(t, rows), r), I64(width))
        found = [code.element(biases, b.add(first, I64(k)), vector if tile.masked else FLOAT) for k in range(width)]
        return found if tile.masked else [code.splat(value, lanes) for value in found]

    def add(chain: list[Variable], index: Value, src: Value) -> None:
        position = b.mul(index, I64(2))
        base = code.at(src, code.element(entries, b.add(position, I64(1)), I32))
        operands = [operand(base, offset) for offset in tile.loads]
        if tile.combine != "sum":
            together = code.maximum if tile.combine == "maximum" else b.fmul
            for acc, value in zip(chain, operands, strict=True):
                acc.set(together(acc.get(), value))
            return
        weight = code.splat(code.element(entries, position, FLOAT), lanes)
        for acc, value in zip(chain, operands, strict=True):
            acc.set(code.fma(weight, value, acc.get()))

    def finish(totals: list[Value], out: Value, keep: list[Value]) -> None:
        for k, (offset, members) in enumerate(tile.stores):
            value = code.activated(functools.reduce(code.maximum, (totals[m] for m in members)), tile.activation)
            code.store(b.select(keep[k], value, zero) if tile.masked else value, code.at(out, offset))

    with code.loop(count) as t:
        src = code.at(source, code.element(places, b.mul(t, I64(2)), I64))
        dst = code.at(destination, code.element(places, b.add(b.mul(t, I64(2)), I64(1)), I64))
        entry, keep = code.variable(I64, I64(0)), []
        if tile.masked:
            first = b.mul(t, I64(len(tile.stores)))
            places_of = [b.gep(masks, [b.add(first, I64(k))], source_etype=I16) for k in range(len(tile.stores))]
            bits = [b.trunc(b.zext(code.load(place, I16), I32), ir.IntType(lanes)) for place in places_of]
            keep = [b.bitcast(x, ir.VectorType(I1, lanes)) for x in bits]
        with code.loop(rows) as r:
            first = b.mul(r, I64(columns))
            stop, place, *visit = (code.element(row_table, b.add(first, I64(k)), I32) for k in range(columns))
            sums = [[code.variable(vector, zero) for _ in range(width)] for _ in range(tile.chains)]
            if tile.blocked:
                partial, kind = code.at(source, visit[0]), visit[1]
                with b.if_else(b.trunc(kind, I1)) as (begins, goes_on):
                    with begins:
                        for acc, value in zip(sums[0], start(t, r), strict=True):
                            acc.set(value)
                    with goes_on:
                        for k, acc in enumerate(sums[0]):
                            acc.set(code.load(code.at(partial, k * width_bytes), vector))
            else:
                for acc, value in zip(sums[0], start(t, r), strict=True):
                    acc.set(value)
            _in_chains(code, sums, entry, stop, lambda chain, index, src=src: add(chain, index, src))
            totals = [functools.reduce(b.fadd, (acc.get() for acc in column)) for column in zip(*sums, strict=True)]
            if tile.blocked:
                with b.if_else(b.trunc(b.lshr(kind, I64(1)), I1)) as (ends, goes_on):
                    with ends:
                        finish(totals, code.at(dst, place), keep)
                    with goes_on:
                        for k, total in enumerate(totals):
                            code.store(total, code.at(partial, k * width_bytes))
            else:
                finish(totals, code.at(dst, place), keep)


def build_slices(code: Code, source: Value, destination: Value, tables: Value, kernel: Slices) -> None:
    """Tables: slices, then the addresses of slice ends (in steps: i64), weights (vectors of float), places (vectors of
    i32, bytes; with windows of i8, numbers from the window's start, -1 for none), biases (vectors of float), the
    outputs' places (vectors of i32, bytes) and where the windows start (i32, bytes)."""
    b, lanes = code.b, kernel.lanes
    vector, positions = ir.VectorType(FLOAT, lanes), ir.VectorType(I32, lanes)
    pointers, bits = ir.VectorType(POINTER, lanes), ir.VectorType(I1, lanes)
    (count,), (ends, weights, places, biases, outputs, windows) = code.parameters(tables, 1, 6)
    every, zero, kinds = bits([1] * lanes), vector([0.0] * lanes), f"v{lanes}f32.v{lanes}p0"

    def addresses_of(base: Value, table: Value, index: Value) -> Value:
        found = b.gep(base, [code.element(table, index, positions)], source_etype=I8)
        found.type = pointers  # llvmlite knows no vectors of addresses
        return found

    def gathered(index: Value) -> Value:
        where = addresses_of(source, places, index)
        return code.intrinsic(f"masked.gather.{kinds}", vector, where, I32(4), every, vector(ir.Undefined))

    def picked(index: Value) -> Value:
        _, operation, vectors = PICKS[lanes]
        begin = code.at(source, code.element(windows, index, I32))
        numbers = [code.load(code.at(begin, k * lanes * FLOAT_BYTES), vector) for k in range(vectors)]
        which = code.load(b.gep(places, [index], source_etype=ir.VectorType(I8, lanes)), ir.VectorType(I8, lanes))
        found = code.intrinsic(operation, vector, numbers[0], b.sext(which, positions), *numbers[1:])
        # what else is in the window may be NaN
        return b.select(b.icmp_signed("<", which, which.type([0] * lanes)), zero, found)

    def add(total: Variable, index: Value) -> None:
        value = picked(index) if kernel.windows else gathered(index)
        total.set(code.fma(code.element(weights, index, vector), value, total.get()))

    entry = code.variable(I64, I64(0))
    with code.loop(count) as s:
        stop = code.element(ends, s, I64)
        chains = [code.variable(vector, zero) for _ in range(CHAINS if kernel.windows else 1)]
        chains[0].set(code.element(biases, s, vector))
        _in_chains(code, chains, entry, stop, add)
        total = functools.reduce(b.fadd, (chain.get() for chain in chains))
        result = code.activated(total, kernel.activation)
        where = addresses_of(destination, outputs, s)
        code.intrinsic(f"masked.scatter.{kinds}", ir.VoidType(), result, where, I32(4), every)
