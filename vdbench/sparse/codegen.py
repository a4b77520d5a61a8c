"""Kernels as LLVM IR, compiled for the processor at hand.

Everything the engine runs natively is one of four shapes of code:

- `Tile`: a few vectors of one output row are held in registers while the row's nonzero weights pass by; each is
  spread over a vector and multiplied with as many vectors of the input. Lanes are examples or neighbouring pixels.
- `Slices`: lanes are output units, so the weights are the vectors and the inputs are gathered: for single vectors.
- `Transpose`: batches of examples to vectors of lanes and back.
- `Copy`: rows of one example into or out of a padded plane.

Weights and positions are data, not code: one kernel serves every layer of the same geometry.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

FLOAT, I1, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
POINTER = ir.PointerType()
SIGNATURE = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, POINTER])  # source, destination, tables
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Tile:
    """What the tile kernel holds in registers, all in bytes from the tile's place in its source and destination.

    `loads`: of every accumulator, its operand. `stores`: (place, accumulators whose maximum goes there), so that
    pooling costs no pass of its own. `chains`: independent sums a row is split into, to hide the latency of a
    multiply-add where there are few accumulators. `stride`: floats between lanes. `maximum`: of the operands, not
    their weighted sum. `low`, `high`: the result is clipped to; `slope`: factor of what is below zero.
    `place_bias`: a bias for every accumulator of every tile (of every lane, if `masked`), not one a row. `masked`:
    lanes not in the tile's mask are stored as zeros.
    """

    lanes: int
    loads: tuple[int, ...]
    stores: tuple[tuple[int, tuple[int, ...]], ...]
    chains: int = 1
    stride: int = 1
    maximum: bool = False
    low: float | None = None
    high: float | None = None
    slope: float | None = None
    place_bias: bool = False
    masked: bool = False


@dataclass(frozen=True)
class Slices:
    """`lanes` output units at a time; see `Tile` for the rest."""

    lanes: int
    low: float | None = None
    high: float | None = None
    slope: float | None = None


@dataclass(frozen=True)
class Transpose:
    """`lanes` examples of `features` floats each to vectors with one lane an example, or back."""

    lanes: int
    features: int
    back: bool = False


@dataclass(frozen=True)
class Copy:
    """Rows of `floats` numbers from place to place."""

    floats: int


Kernel = Tile | Slices | Transpose | Copy


class Code:
    """A function under construction: LLVM's builder with the few idioms that the kernels are written in."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.b: Any = ir.IRBuilder(function.append_basic_block())
        self._entry = self.b.block

    def variable(self, kind: ir.Type, value: ir.Value) -> "Variable":
        with self.b.goto_block(self._entry):
            slot = self.b.alloca(kind)
        self.b.store(value, slot)
        return Variable(self, kind, slot)

    @contextlib.contextmanager
    def loop(self, stop: ir.Value, start: ir.Value | int = 0, step: int = 1) -> Iterator[ir.Value]:
        """The body runs for i = start, start + step, ... below stop."""
        b, i = self.b, self.variable(I64, I64(start) if isinstance(start, int) else start)
        head, body, done = (self.function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        b.cbranch(b.icmp_signed("<", i.get(), stop), body, done)
        b.position_at_end(body)
        yield i.get()
        i.set(b.add(i.get(), I64(step)))
        b.branch(head)
        b.position_at_end(done)

    def at(self, pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
        """The address some bytes further on."""
        return self.b.gep(pointer, [I64(offset) if isinstance(offset, int) else offset], source_etype=I8)

    def element(self, pointer: ir.Value, index: ir.Value | int, kind: ir.Type) -> ir.Value:
        """Element `index` of an array; integers come back as 64-bit ones."""
        place = self.b.gep(pointer, [I64(index) if isinstance(index, int) else index], source_etype=kind)
        value = self.load(place, kind)
        return self.b.sext(value, I64) if isinstance(kind, ir.IntType) and kind.width < 64 else value

    def load(self, pointer: ir.Value, kind: ir.Type) -> ir.Value:
        return self.b.load(pointer, align=4 if kind != I16 else 2, typ=kind)

    def store(self, value: ir.Value, pointer: ir.Value) -> None:
        self.b.store(value, pointer, align=4)

    def splat(self, scalar: ir.Value, lanes: int) -> ir.Value:
        kind = ir.VectorType(FLOAT, lanes)
        one = self.b.insert_element(kind(ir.Undefined), scalar, I32(0))
        return self.b.shuffle_vector(one, kind(ir.Undefined), ir.VectorType(I32, lanes)([0] * lanes))

    def intrinsic(self, name: str, kind: ir.Type, *args: ir.Value) -> ir.Value:
        """A call of `llvm.<name>`, declared in the module on first use."""
        module: Any = self.function.module
        known = module.globals.get(f"llvm.{name}")
        callee = known or ir.Function(module, ir.FunctionType(kind, [a.type for a in args]), f"llvm.{name}")
        return self.b.call(callee, args)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c of vectors, rounded once."""
        return self.intrinsic(f"fma.v{a.type.count}f32", a.type, a, b, c)

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger of vectors, NaN where either is NaN."""
        return self.intrinsic(f"maximum.v{a.type.count}f32", a.type, a, b)

    def activation(self, value: ir.Value, kernel: Tile | Slices) -> ir.Value:
        """Clip and slope; written so that a NaN stays one."""
        b, kind = self.b, value.type
        if kernel.slope is not None:
            scaled = b.fmul(value, kind([kernel.slope] * kind.count))
            value = b.select(b.fcmp_ordered("<", value, kind([0.0] * kind.count)), scaled, value)
        for bound, below in ((kernel.low, "<"), (kernel.high, ">")):
            if bound is not None:
                limit = kind([bound] * kind.count)
                value = b.select(b.fcmp_ordered(below, value, limit), limit, value)
        return value


class Variable:
    def __init__(self, code: Code, kind: ir.Type, slot: ir.Value) -> None:
        self.code, self.kind, self.slot = code, kind, slot

    def get(self) -> ir.Value:
        return self.code.b.load(self.slot, typ=self.kind)

    def set(self, value: ir.Value) -> None:
        self.code.b.store(value, self.slot)


def _tables(code: Code, tables: ir.Value, count: int) -> list[ir.Value]:
    """The kernel's parameters, 64 bits each; addresses among them become pointers where they are used as such."""
    return [code.element(tables, k, I64) for k in range(count)]


def _pointer(code: Code, address: ir.Value) -> ir.Value:
    return code.b.inttoptr(address, POINTER)


def build_tile(code: Code, source: ir.Value, destination: ir.Value, tables: ir.Value, tile: Tile) -> None:
    """Tables: tiles, rows, then the addresses of tile places (source, destination: i64), rows (last entry, place: i32),
    entries (weight: float, place: i32), biases (float), masks (i16, one a store)."""
    b, lanes = code.b, tile.lanes
    vector = ir.VectorType(FLOAT, lanes)
    count, rows, *addresses = _tables(code, tables, 7)
    places, row_table, entries, biases, masks = (_pointer(code, address) for address in addresses)
    width, width_bytes = len(tile.loads), lanes * FLOAT_BYTES

    def operand(base: ir.Value, offset: int) -> ir.Value:
        first = code.load(code.at(base, offset), vector)
        if tile.stride == 1:
            return first
        second = code.load(code.at(base, offset + width_bytes), vector)
        even = ir.VectorType(I32, lanes)([2 * k for k in range(lanes)])
        return b.shuffle_vector(first, second, even)

    with code.loop(count) as t:
        src = code.at(source, code.element(places, b.mul(t, I64(2)), I64))
        dst = code.at(destination, code.element(places, b.add(b.mul(t, I64(2)), I64(1)), I64))
        entry = code.variable(I64, I64(0))
        keep = []
        if tile.masked:
            first = b.mul(t, I64(len(tile.stores)))
            bits = [
                code.load(b.gep(masks, [b.add(first, I64(k))], source_etype=I16), I16) for k in range(len(tile.stores))
            ]
            keep = [
                b.bitcast(x if lanes == 16 else b.trunc(x, ir.IntType(lanes)), ir.VectorType(I1, lanes)) for x in bits
            ]
        with code.loop(rows) as r:
            stop = code.element(row_table, b.mul(r, I64(2)), I32)
            place = code.element(row_table, b.add(b.mul(r, I64(2)), I64(1)), I32)
            if tile.maximum:
                start = [vector([float("-inf")] * lanes)] * width
            elif tile.place_bias:
                first = b.mul(b.add(b.mul(t, rows), r), I64(width))
                kind = vector if tile.masked else FLOAT
                start = [code.element(biases, b.add(first, I64(k)), kind) for k in range(width)]
                start = start if tile.masked else [code.splat(value, lanes) for value in start]
            else:
                start = [code.splat(code.element(biases, r, FLOAT), lanes)] * width
            zero = vector([0.0] * lanes)
            sums = [
                [code.variable(vector, start[k] if c == 0 else zero) for k in range(width)] for c in range(tile.chains)
            ]

            def step(index: ir.Value, chain: list[Variable]) -> None:
                position = b.mul(index, I64(2))
                base = code.at(src, code.element(entries, b.add(position, I64(1)), I32))
                if tile.maximum:
                    for acc, offset in zip(chain, tile.loads, strict=True):
                        acc.set(code.maximum(acc.get(), operand(base, offset)))
                    return
                weight = code.splat(code.element(entries, position, FLOAT), lanes)
                for acc, offset in zip(chain, tile.loads, strict=True):
                    acc.set(code.fma(weight, operand(base, offset), acc.get()))

            if tile.chains > 1:
                whole = b.sub(stop, I64(tile.chains - 1))
                with code.loop(whole, entry.get(), tile.chains) as e:
                    for c, chain in enumerate(sums):
                        step(b.add(e, I64(c)), chain)
                    entry.set(b.add(e, I64(tile.chains)))
            with code.loop(stop, entry.get()) as e:
                step(e, sums[0])
            entry.set(stop)
            totals = [column[0].get() for column in zip(*sums, strict=True)]
            for chain in sums[1:]:
                totals = [b.fadd(total, acc.get()) for total, acc in zip(totals, chain, strict=True)]
            out = code.at(dst, place)
            for k, (offset, members) in enumerate(tile.stores):
                value = totals[members[0]]
                for m in members[1:]:
                    value = code.maximum(value, totals[m])
                value = code.activation(value, tile)
                if tile.masked:
                    value = b.select(keep[k], value, zero)
                code.store(value, code.at(out, offset))


def build_slices(code: Code, source: ir.Value, destination: ir.Value, tables: ir.Value, kernel: Slices) -> None:
    """Tables: slices, then the addresses of slice ends (in vectors: i64), weights (vectors of float), places (vectors
    of i32, bytes), biases (vectors of float) and the outputs' places (vectors of i32, bytes)."""
    b, lanes = code.b, kernel.lanes
    vector, positions = ir.VectorType(FLOAT, lanes), ir.VectorType(I32, lanes)
    pointers, bits = ir.VectorType(POINTER, lanes), ir.VectorType(I1, lanes)
    count, *addresses = _tables(code, tables, 6)
    ends, weights, places, biases, outputs = (_pointer(code, address) for address in addresses)
    every, kinds = bits([1] * lanes), f"v{lanes}f32.v{lanes}p0"

    def addresses_of(base: ir.Value, table: ir.Value, index: ir.Value) -> ir.Value:
        found = b.gep(base, [code.element(table, index, positions)], source_etype=I8)
        found.type = pointers  # llvmlite knows no vectors of addresses
        return found

    entry = code.variable(I64, I64(0))
    with code.loop(count) as s:
        stop = code.element(ends, s, I64)
        total = code.variable(vector, code.element(biases, s, vector))
        with code.loop(stop, entry.get()) as e:
            where = addresses_of(source, places, e)
            values = code.intrinsic(f"masked.gather.{kinds}", vector, where, I32(4), every, vector(ir.Undefined))
            total.set(code.fma(code.element(weights, e, vector), values, total.get()))
        entry.set(stop)
        result = code.activation(total.get(), kernel)
        where = addresses_of(destination, outputs, s)
        code.intrinsic(f"masked.scatter.{kinds}", ir.VoidType(), result, where, I32(4), every)


def _transposed(code: Code, rows: list[ir.Value]) -> list[ir.Value]:
    """The transpose of a square of vectors, by interleaving the first half of the rows with the second, log2 times."""
    lanes = len(rows)
    low = ir.VectorType(I32, lanes)([k // 2 + (k % 2) * lanes for k in range(lanes)])
    high = ir.VectorType(I32, lanes)([lanes // 2 + k // 2 + (k % 2) * lanes for k in range(lanes)])
    for _ in range(lanes.bit_length() - 1):
        pairs = list(zip(rows[: lanes // 2], rows[lanes // 2 :], strict=True))
        rows = [code.b.shuffle_vector(a, c, order) for a, c in pairs for order in (low, high)]
    return rows


def build_transpose(code: Code, source: ir.Value, destination: ir.Value, tables: ir.Value, kernel: Transpose) -> None:
    """Tables: squares, single features, then the addresses of the squares' first features (i64), the single features
    (i64) and every feature's place among the vectors (i64, bytes)."""
    b, lanes = code.b, kernel.lanes
    vector, row = ir.VectorType(FLOAT, lanes), kernel.features * FLOAT_BYTES
    squares, singles, *addresses = _tables(code, tables, 5)
    firsts, leftover, places = (_pointer(code, address) for address in addresses)
    examples, vectors = (destination, source) if kernel.back else (source, destination)
    with code.loop(squares) as s:
        first = code.element(firsts, s, I64)
        begin = code.at(examples, b.mul(first, I64(FLOAT_BYTES)))
        here = [code.at(begin, k * row) for k in range(lanes)]
        there = [code.at(vectors, code.element(places, b.add(first, I64(k)), I64)) for k in range(lanes)]
        if kernel.back:
            here, there = there, here
        for value, pointer in zip(_transposed(code, [code.load(p, vector) for p in here]), there, strict=True):
            code.store(value, pointer)
    with code.loop(singles) as s:
        feature = code.element(leftover, s, I64)
        begin = code.at(examples, b.mul(feature, I64(FLOAT_BYTES)))
        place = code.at(vectors, code.element(places, feature, I64))
        for k in range(lanes):
            one, other = code.at(begin, k * row), code.at(place, k * FLOAT_BYTES)
            one, other = (other, one) if kernel.back else (one, other)
            code.store(code.load(one, FLOAT), other)


def build_copy(code: Code, source: ir.Value, destination: ir.Value, tables: ir.Value, kernel: Copy) -> None:
    """Tables: rows, then the address of their places (source, destination: i64)."""
    b = code.b
    count, places = _tables(code, tables, 2)
    places = _pointer(code, places)
    with code.loop(count) as r:
        src = code.at(source, code.element(places, b.mul(r, I64(2)), I64))
        dst = code.at(destination, code.element(places, b.add(b.mul(r, I64(2)), I64(1)), I64))
        with code.loop(I64(kernel.floats)) as k:
            at = b.mul(k, I64(FLOAT_BYTES))
            code.store(code.load(code.at(src, at), FLOAT), code.at(dst, at))


BUILDERS: dict[type, Callable[..., None]] = {
    Tile: build_tile,
    Slices: build_slices,
    Transpose: build_transpose,
    Copy: build_copy,
}


def build_driver(code: Code, stages: ir.Value, bases: ir.Value, counts: ir.Value) -> None:
    """Runs a program for one group of examples after the other.

    stages: for each the address of its steps, how many they are and how often they are repeated (i64 all). A step: the
    addresses of its code and tables, then which base its source and its destination start from and by how many bytes
    either moves with every repetition (i64 all). bases: addresses, then by how many bytes each moves with every group
    (i64). counts: stages, groups, bases.
    """
    b = code.b
    stage_count, groups, base_count = (code.element(counts, k, I64) for k in range(3))

    def base(index: ir.Value, group: ir.Value) -> ir.Value:
        move = b.mul(group, code.element(bases, b.add(base_count, index), I64))
        return code.at(code.element(bases, index, POINTER), move)

    with code.loop(groups) as g, code.loop(stage_count) as s:
        first = b.mul(s, I64(3))
        steps, count, repeats = (code.element(stages, b.add(first, I64(k)), I64) for k in range(3))
        steps = _pointer(code, steps)
        with code.loop(repeats) as n, code.loop(count) as k:
            place = b.mul(k, I64(6))
            function, tables, src, src_move, dst, dst_move = (
                code.element(steps, b.add(place, I64(k)), I64) for k in range(6)
            )
            source = code.at(base(src, g), b.mul(n, src_move))
            destination = code.at(base(dst, g), b.mul(n, dst_move))
            b.call(b.inttoptr(function, SIGNATURE.as_pointer()), [source, destination, _pointer(code, tables)])
