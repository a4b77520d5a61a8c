"""Functions of every number by itself, as kernels compute them on vectors: within some units of the last place, where
PyTorch calls a library. A NaN stays one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

Value = Any  # llvmlite's own type of values does not tell their types
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # the first without rounding errors in its products


@dataclass(frozen=True)
class Numbers:
    """A vector of float32 in an expression; `code` is the function under construction."""

    code: Any
    value: Value

    def _with(self, operation: Callable[..., Value], *operands: "Numbers | float") -> "Numbers":
        return Numbers(self.code, operation(*(self.constant(x).value for x in operands)))

    def constant(self, x: "Numbers | float") -> "Numbers":
        return x if isinstance(x, Numbers) else Numbers(self.code, self.value.type([x] * self.value.type.count))

    def __add__(self, x: "Numbers | float") -> "Numbers":
        return self._with(self.code.b.fadd, self, x)

    def __sub__(self, x: "Numbers | float") -> "Numbers":
        return self._with(self.code.b.fsub, self, x)

    def __mul__(self, x: "Numbers | float") -> "Numbers":
        return self._with(self.code.b.fmul, self, x)

    def __rtruediv__(self, x: float) -> "Numbers":
        return self._with(self.code.b.fdiv, x, self)

    def __neg__(self) -> "Numbers":
        return self * -1.0

    def plus_product(self, a: "Numbers | float", b: "Numbers | float") -> "Numbers":
        """self + a * b, rounded once."""
        return self._with(self.code.fma, a, b, self)

    def chosen(self, test: str, bound: float, these: "Numbers | float", others: "Numbers | float") -> "Numbers":
        """`these` where the numbers are less ("<") or more (">") than the bound, `others` elsewhere and where they are
        NaN."""
        b = self.code.b
        compared = b.fcmp_ordered(test, self.value, self.constant(bound).value)
        return self._with(lambda x, y: b.select(compared, x, y), these, others)

    def clipped(self, low: float | None, high: float | None) -> "Numbers":
        """None is no bound."""
        x = self if low is None else self.chosen("<", low, low, self)
        return x if high is None else x.chosen(">", high, high, x)

    def polynomial(self, *coefficients: float) -> "Numbers":
        """The first is that of the highest power."""
        total = self.constant(coefficients[0])
        for c in coefficients[1:]:
            total = self.constant(c).plus_product(total, self)
        return total


def _power_and_rest(x: Numbers) -> tuple[Numbers, Numbers]:
    """2^n and exp(r) - 1 with exp(x) = 2^n exp(r), |r| <= log(2) / 2, for |x| < 87 (Cephes, single precision)."""
    code, b, count = x.code, x.code.b, x.value.type.count
    whole = code.intrinsic(f"floor.v{count}f32", x.value.type, (x.constant(0.5).plus_product(x, 1.44269504)).value)
    n, integers = Numbers(code, whole), ir.VectorType(ir.IntType(32), count)
    r = x.plus_product(n, -LN2_HIGH).plus_product(n, -LN2_LOW)
    p = r.polynomial(
        *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    )
    exponent = code.intrinsic(f"fptosi.sat.v{count}i32.v{count}f32", integers, whole)
    bits = b.shl(b.add(exponent, integers([127] * count)), integers([23] * count))
    return Numbers(code, b.bitcast(bits, x.value.type)), r.plus_product(p * r, r)


def _exp(x: Numbers) -> Numbers:
    power, rest = _power_and_rest(x.clipped(-87.0, 87.0))
    return power.plus_product(power, rest)


def _sigmoid(x: Numbers) -> Numbers:
    return 1.0 / (_exp(-x) + 1.0)


def _tanh(x: Numbers) -> Numbers:
    """Near 0, where the difference would cancel, an odd polynomial (Cephes, single precision)."""
    z = x * x
    p = z.polynomial(-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
    return z.chosen("<", 0.39, x.plus_product(x * z, p), _sigmoid(x * 2.0) * 2.0 - 1.0)


def _elu(x: Numbers) -> Numbers:
    power, rest = _power_and_rest(x.clipped(-87.0, 0.0))
    return x.chosen("<", 0.0, (power - 1.0).plus_product(power, rest), x)


def _erf(x: Numbers) -> Numbers:
    """Within 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
    size = x.chosen("<", 0.0, -x, x)
    t = 1.0 / (size.constant(1.0).plus_product(size, 0.3275911))
    tail = t * t.polynomial(1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    value = -(tail * _exp(-(size * size))) + 1.0
    return x.chosen("<", 0.0, -value, value)


def _gelu(x: Numbers) -> Numbers:
    half = x * 0.5
    return half.plus_product(half, _erf(x * 0.7071067811865476))


def _gelu_tanh(x: Numbers) -> Numbers:
    half = x * 0.5
    return half.plus_product(half, _tanh(x.plus_product(x * x * x, 0.044715) * 0.7978845608028654))


def _hardsigmoid(x: Numbers) -> Numbers:
    return (x + 3.0).clipped(0.0, 6.0) * (1 / 6)


# those of `graph.FUNCTIONS`
ON_VECTORS: dict[str, Callable[[Numbers], Numbers]] = {
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "elu": _elu,
    "hardsigmoid": _hardsigmoid,
    "hardswish": lambda x: x * _hardsigmoid(x),
}
