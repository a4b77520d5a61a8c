"""Kernels that bring examples into the engine's layouts and back."""

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
    """The transpose of a square of vectors, by interleaving the first half of the rows with the second, log2 times."""
    lanes = len(rows)
    low = ir.VectorType(I32, lanes)([k // 2 + (k % 2) * lanes for k in range(lanes)])
    high = ir.VectorType(I32, lanes)([lanes // 2 + k // 2 + (k % 2) * lanes for k in range(lanes)])
    for _ in range(lanes.bit_length() - 1):
        pairs = list(zip(rows[: lanes // 2], rows[lanes // 2 :], strict=True))
        rows = [code.b.shuffle_vector(a, c, order) for a, c in pairs for order in (low, high)]
    return rows


def build_transpose(code: Code, source: Value, destination: Value, tables: Value, kernel: Transpose) -> None:
    """Tables: squares, single features, then the addresses of the squares' first features (i64), the single features
    (i64) and every feature's place among the vectors (i64, bytes)."""
    b, lanes = code.b, kernel.lanes
    vector, row = ir.VectorType(FLOAT, lanes), kernel.features * FLOAT_BYTES
    squares, singles, *addresses = code.parameters(tables, 5)
    firsts, leftover, places = (code.pointer(address) for address in addresses)
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
    count, places = code.parameters(tables, 2)
    places = code.pointer(places)
    with code.loop(count) as r:
        src = code.at(source, code.element(places, b.mul(r, I64(2)), I64))
        dst = code.at(destination, code.element(places, b.add(b.mul(r, I64(2)), I64(1)), I64))
        code.intrinsic("memcpy.p0.p0.i64", ir.VoidType(), dst, src, I64(kernel.floats * FLOAT_BYTES), I1(0))
