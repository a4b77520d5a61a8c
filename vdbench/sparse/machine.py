"""What this processor could do at best: multiply-adds from registers, and with an operand from each level of memory.

A sparse kernel multiplies every weight with vectors that it loads, so the rates with an operand from memory are its
limits, not the one from registers.
"""

import time
from functools import cache

import numpy as np
from llvmlite import ir

from vdbench.sparse.code import FLOAT, FLOAT_BYTES, I64, Code
from vdbench.sparse.jit import native_function, vector_lanes
from vdbench.sparse.layout import address, aligned

ACCUMULATORS = 16
# bytes read over and over: well inside the first- and second-level caches, inside the third, and larger than any
LEVELS = {"fma": 0, "load_l1": 24 << 10, "load_l2": 384 << 10, "load_l3": 6 << 20, "load_memory": 256 << 20}
SAMPLES, SAMPLES_BEYOND_CACHES = 20, 3


def _registers(code: Code, source: ir.Value, destination: ir.Value, counts: ir.Value) -> None:
    """counts[0] rounds of independent multiply-adds."""
    _accumulate(code, source, destination, code.element(counts, 0, I64), None)


def _memory(code: Code, source: ir.Value, destination: ir.Value, counts: ir.Value) -> None:
    """counts[0] passes over counts[1] bytes, a multiply-add for every vector."""
    _accumulate(code, source, destination, code.element(counts, 0, I64), code.element(counts, 1, I64))


def _accumulate(code: Code, source: ir.Value, destination: ir.Value, rounds: ir.Value, size: ir.Value | None) -> None:
    lanes = vector_lanes()
    vector, stride = ir.VectorType(FLOAT, lanes), ACCUMULATORS * lanes * FLOAT_BYTES
    weight = code.load(source, vector)
    sums = [code.variable(vector, code.load(code.at(source, k * lanes * 4), vector)) for k in range(ACCUMULATORS)]
    with code.loop(rounds):
        if size is None:
            for total in sums:
                total.set(code.fma(weight, weight, total.get()))
        else:
            with code.loop(size, step=stride) as offset:
                for k, total in enumerate(sums):
                    operand = code.load(code.at(source, code.b.add(offset, I64(k * lanes * FLOAT_BYTES))), vector)
                    total.set(code.fma(weight, operand, total.get()))
    for k, total in enumerate(sums):
        code.store(total.get(), code.at(destination, k * lanes * FLOAT_BYTES))


@cache
def rate(level: str) -> float:
    """GFLOP/s of one thread, at best over a few milliseconds: `fma` from registers; `load_l1`, `load_l2`, `load_l3`,
    `load_memory` with one operand of every multiply-add read from that level of memory. Measured once a process."""
    lanes, size = vector_lanes(), LEVELS[level]
    memory = aligned((max(size // FLOAT_BYTES, ACCUMULATORS * lanes),))
    memory[:] = 1  # zeros that were never written would all be one page
    out = np.zeros(ACCUMULATORS * lanes, np.float32)
    run = native_function(_memory if size else _registers)
    rounds = max(1, (8 << 20) // size) if size else 50_000
    flops = 2 * rounds * (size // FLOAT_BYTES if size else ACCUMULATORS * lanes)
    counts, best = np.array([rounds, size], np.int64), float("inf")
    for _ in range(SAMPLES if size < LEVELS["load_memory"] else SAMPLES_BEYOND_CACHES):
        started = time.perf_counter()
        run(address(memory), address(out), address(counts))
        best = min(best, time.perf_counter() - started)
    return round(flops / best / 1e9, 1)


def calibrate() -> dict[str, float]:
    """The rate of every level, as `rate` measures it."""
    return {level: rate(level) for level in LEVELS}
