"""The kernels that move numbers, as LLVM IR: examples into lanes of vectors and rows into padded planes, and back."""

import itertools
from dataclasses import dataclass

from llvmlite import ir

from vdbench.sparse.code import FLOAT, FLOAT_BYTES, I1, I32, I64, Code, Value


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


def _transposed(code: Code, rows: list[Value]) -> list[Value]:
    """The transpose of a square of vectors: first of the squares of four numbers, which need not leave their 128 bits
    and so move fastest, then of those as wholes."""
    lanes = len(rows)

    def exchanged(rows: list[Value], unit: int, reach: int) -> list[Value]:
        """The transpose of as many rows as there are units in each stretch of `reach` numbers: of neighbours, even
        units and odd ones, log2 times."""
        for _ in range(len(rows).bit_length() - 1):
            rows = [
                code.b.shuffle_vector(first, second, order(unit, reach, odd))
                for odd in (0, 1)
                for first, second in zip(rows[::2], rows[1::2], strict=True)
            ]
        return rows

    def order(unit: int, reach: int, odd: int) -> Value:
        starts = itertools.product(range(0, lanes, reach), (0, lanes), range(odd * unit, reach, 2 * unit), range(unit))
        return ir.VectorType(I32, lanes)([sum(parts) for parts in starts])

    squares = [exchanged(rows[k : k + 4], 1, 4) for k in range(0, lanes, 4)]
    columns = [exchanged(list(alike), 4, lanes) for alike in zip(*squares, strict=True)]
    return [column for four in zip(*columns, strict=True) for column in four]


def build_transpose(code: Code, source: Value, destination: Value, tables: Value, kernel: Transpose) -> None:
    """Tables: squares, single features, then the addresses of the squares' first features (i64), the single features
    (i64) and every feature's place among the vectors (i64, bytes)."""
    b, lanes = code.b, kernel.lanes
    vector, row = ir.VectorType(FLOAT, lanes), kernel.features * FLOAT_BYTES
    (squares, singles), (firsts, leftover, places) = code.parameters(tables, 2, 3)
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


def build_copy(code: Code, source: Value, destination: Value, tables: Value, kernel: Copy) -> None:
    """Tables: rows, then the address of their places (source, destination: i64)."""
    b = code.b
    (count,), (places,) = code.parameters(tables, 1, 1)
    with code.loop(count) as r:
        src = code.at(source, code.element(places, b.mul(r, I64(2)), I64))
        dst = code.at(destination, code.element(places, b.add(b.mul(r, I64(2)), I64(1)), I64))
        code.intrinsic("memcpy.p0.p0.i64", ir.VoidType(), dst, src, I64(kernel.floats * FLOAT_BYTES), I1(0))
