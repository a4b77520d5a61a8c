"""A function of LLVM IR under construction: LLVM's builder with the few idioms that the kernels are written in."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from llvmlite import ir

from vdbench.sparse.pointwise import ON_VECTORS, Numbers

FLOAT, I1, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
POINTER = ir.PointerType()
SIGNATURE = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, POINTER])  # source, destination, tables
FLOAT_BYTES = 4
Value = Any  # llvmlite's own type of values does not tell their types


@dataclass(frozen=True)
class Activation:
    """What is below zero times `slope`, then clipped to what is given of `low` and `high`; or else `function`, one of
    `pointwise.ON_VECTORS`."""

    low: float | None = None
    high: float | None = None
    slope: float | None = None
    function: str | None = None

    @property
    def rises(self) -> bool:
        """Whether a larger number never becomes the smaller one, so that a maximum may be taken before or after."""
        falls_somewhere = ("silu", "gelu", "gelu_tanh", "hardswish")
        return (self.slope or 0) >= 0 and self.function not in falls_somewhere


IDENTITY = Activation()
Combine = Literal["sum", "maximum", "product"]  # what is made of the terms of an output


class Code:
    """A function under construction; `b` is LLVM's builder."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.b: Any = ir.IRBuilder(function.append_basic_block())
        self._entry = self.b.block

    def variable(self, kind: ir.Type, value: Value) -> "Variable":
        with self.b.goto_block(self._entry):
            slot = self.b.alloca(kind)
        self.b.store(value, slot)
        return Variable(self, kind, slot)

    @contextlib.contextmanager
    def loop(self, stop: Value, start: Value | int = 0, step: int = 1) -> Iterator[Value]:
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

    def at(self, pointer: Value, offset: Value | int) -> Value:
        """The address some bytes further on."""
        return self.b.gep(pointer, [I64(offset) if isinstance(offset, int) else offset], source_etype=I8)

    def element(self, pointer: Value, index: Value | int, kind: ir.Type) -> Value:
        """Element `index` of an array; integers come back as 64-bit ones."""
        place = self.b.gep(pointer, [I64(index) if isinstance(index, int) else index], source_etype=kind)
        value = self.load(place, kind)
        return self.b.sext(value, I64) if isinstance(kind, ir.IntType) and kind.width < 64 else value

    def pointer(self, address: Value) -> Value:
        """What an address of 64 bits points to."""
        return self.b.inttoptr(address, POINTER)

    def parameters(self, tables: Value, numbers: int, addresses: int) -> tuple[list[Value], list[Value]]:
        """What a kernel is given, 64 bits each: so many numbers, then so many addresses."""
        found = [self.element(tables, k, I64) for k in range(numbers + addresses)]
        return found[:numbers], [self.pointer(address) for address in found[numbers:]]

    def load(self, pointer: Value, kind: ir.Type) -> Value:
        number = kind.element if isinstance(kind, ir.VectorType) else kind
        size = number.width // 8 if isinstance(number, ir.IntType) else FLOAT_BYTES
        return self.b.load(pointer, align=min(4, size), typ=kind)

    def store(self, value: Value, pointer: Value) -> None:
        self.b.store(value, pointer, align=4)

    def splat(self, scalar: Value, lanes: int) -> Value:
        kind = ir.VectorType(FLOAT, lanes)
        one = self.b.insert_element(kind(ir.Undefined), scalar, I32(0))
        return self.b.shuffle_vector(one, kind(ir.Undefined), ir.VectorType(I32, lanes)([0] * lanes))

    def intrinsic(self, name: str, kind: ir.Type, *args: Value) -> Value:
        """A call of `llvm.<name>`, declared in the module on first use."""
        module: Any = self.function.module
        known = module.globals.get(f"llvm.{name}")
        callee = known or ir.Function(module, ir.FunctionType(kind, [a.type for a in args]), f"llvm.{name}")
        return self.b.call(callee, args)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c of vectors, rounded once."""
        return self.intrinsic(f"fma.v{a.type.count}f32", a.type, a, b, c)

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger of vectors, NaN where either is NaN."""
        return self.intrinsic(f"maximum.v{a.type.count}f32", a.type, a, b)

    def activated(self, value: Value, activation: Activation) -> Value:
        """Written so that a NaN stays one."""
        x = Numbers(self, value)
        if activation.function is not None:
            return ON_VECTORS[activation.function](x).value
        if activation.slope is not None:
            x = x.chosen("<", 0.0, x * activation.slope, x)
        return x.clipped(activation.low, activation.high).value


class Variable:
    def __init__(self, code: Code, kind: ir.Type, slot: Value) -> None:
        self.code, self.kind, self.slot = code, kind, slot

    def get(self) -> Value:
        return self.code.b.load(self.slot, typ=self.kind)

    def set(self, value: Value) -> None:
        self.code.b.store(value, self.slot)
