"""Recurrent layers with sparse weights: loops over timesteps that numba compiles, around native products.

Within them a value is (units, columns), texts side by side as the engine has examples. `given`, `sums` and `call` are
those of `recurrence.Memory`.
"""

# numba calls an intrinsic without the typing context it is defined with, and infers what Python leaves open
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from vdbench.kernels import JIT, clip, exp

f32 = np.float32
_LIMIT = f32(80.0)
_BYTE = ir.IntType(8).as_pointer()
_FUNCTION = ir.FunctionType(ir.VoidType(), [_BYTE, _BYTE, _BYTE])


@intrinsic
def _run(typing, call):
    """Call a native function of three addresses; all four are given as numbers."""

    def build(context, builder, signature, args):
        function, *addresses = cgutils.unpack_tuple(builder, args[0])
        pointers = [builder.inttoptr(address, _BYTE) for address in addresses]
        builder.call(builder.inttoptr(function, _FUNCTION.as_pointer()), pointers)
        return context.get_dummy_value()

    return types.void(call), build


@njit(inline="always")
def _sigmoid(x):
    return f32(1.0) / (f32(1.0) + exp(-clip(x, _LIMIT)))


@njit(inline="always")
def _tanh(x):
    """tanh(x); near 0, where the difference below would cancel, an odd polynomial (Cephes single precision)."""
    z = x * x
    p = f32(-5.70498872745e-3)
    p = p * z + f32(2.06390887954e-2)
    p = p * z - f32(5.37397155531e-2)
    p = p * z + f32(1.33314422036e-1)
    p = p * z - f32(3.33332819422e-1)
    return x + x * z * p if z < f32(0.39) else f32(2.0) * _sigmoid(f32(2.0) * x) - f32(1.0)


@njit(**JIT)
def look_up(table, words, out):
    """Add the sparse rows (starts, places, values) of `words` to the columns of `out` (places, columns)."""
    starts, places, values = table
    for column in range(len(words)):
        for k in range(starts[words[column]], starts[words[column] + 1]):
            out[places[k], column] += values[k]


@njit(**JIT)
def look_up_all(table, words, out):
    """`look_up` of every timestep: words (T, N), out (T, places, columns)."""
    for step in range(len(words)):
        look_up(table, words[step], out[step])


@njit(**JIT)
def _load(state, first, kept, value):
    """value (kept, columns) = the units of `state` (N, units) that are kept, from text `first` on, and zeros."""
    texts = min(value.shape[1], len(state) - first)
    for unit in range(len(kept)):
        for column in range(texts):
            value[unit, column] = state[first + column, kept[unit]]
        value[unit, texts:] = 0


@njit(**JIT)
def _store(value, first, kept, state):
    for column in range(min(value.shape[1], len(state) - first)):
        for unit in range(len(kept)):
            state[first + column, kept[unit]] = value[unit, column]


@njit(**JIT)
def run_tanh(call, given, sums, inputs, table, words, kept, first, before, after, outputs):
    """A layer of tanh units over all timesteps, for as many texts as there are columns, from text `first` on.

    inputs (T, inputs, columns); `table` and words (T, N) are what one-hot words add to the sums, if any. before, after:
    tuples of states (N, units), of which `kept` are computed. outputs (T, kept, columns).
    """
    hidden = given[len(given) - len(kept) :]
    _load(before[0], first, kept, hidden)
    now, total = hidden.reshape(-1), sums.reshape(-1)
    for step in range(len(inputs)):
        given[: inputs.shape[1]] = inputs[step]
        _run(call)
        look_up(table, words[step], sums)
        for n in range(len(now)):
            now[n] = _tanh(total[n])
        outputs[step] = hidden
    _store(hidden, first, kept, after[0])


@njit(**JIT)
def run_lstm(call, given, sums, inputs, table, words, kept, first, before, after, outputs):
    """As `run_tanh`, with the four gates of an LSTM one after the other in `sums`, and its cell in the states."""
    hidden = given[len(given) - len(kept) :]
    cell = np.zeros_like(hidden)
    _load(before[0], first, kept, hidden)
    _load(before[1], first, kept, cell)
    now, memory, total = hidden.reshape(-1), cell.reshape(-1), sums.reshape(4, hidden.size)
    for step in range(len(inputs)):
        given[: inputs.shape[1]] = inputs[step]
        _run(call)
        look_up(table, words[step], sums)
        for n in range(len(now)):  # one loop, so that vectors of it are computed at once
            inlet, keep, new, outlet = (
                _sigmoid(total[0, n]),
                _sigmoid(total[1, n]),
                _tanh(total[2, n]),
                _sigmoid(total[3, n]),
            )
            memory[n] = keep * memory[n] + inlet * new
            now[n] = outlet * _tanh(memory[n])
        outputs[step] = hidden
    _store(hidden, first, kept, after[0])
    _store(cell, first, kept, after[1])
