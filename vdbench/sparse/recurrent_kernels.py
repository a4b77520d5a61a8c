"""Recurrent layers with sparse weights, as float32 loops that numba compiles.

What comes in and goes out is (T * N, units), a row a timestep and sequence. Within one a value is (units, N), the
sequences side by side: a weight is loaded once for all of them. A sparse matrix is (starts, places, values): by rows,
as in CSR, but where it is multiplied with a single column by columns, as in CSC: the terms of a row wait for each
other.
"""

# numba infers what Python leaves open
# pyright: reportCallIssue=false

import numpy as np
from numba import njit

from vdbench.kernels import JIT, clip, exp

f32 = np.float32
_LIMIT = f32(80.0)


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
def add_product(starts, places, values, x, out):
    """out += W x, with W by columns if x is one, else by rows."""
    if x.shape[1] == 1:
        for place in range(len(starts) - 1):
            factor = x[place, 0]
            for k in range(starts[place], starts[place + 1]):
                out[places[k], 0] += values[k] * factor
    else:
        for row in range(len(starts) - 1):
            for k in range(starts[row], starts[row + 1]):
                value, place = values[k], places[k]
                for column in range(x.shape[1]):
                    out[row, column] += value * x[place, column]


@njit(**JIT)
def look_up(starts, places, values, words, out):
    """out += the sparse rows of `words`."""
    for row in range(len(words)):
        for k in range(starts[words[row]], starts[words[row] + 1]):
            out[row, places[k]] += values[k]


@njit(**JIT)
def run_tanh(starts, places, values, gates, hidden, outputs):
    """A layer of tanh units over all timesteps. `gates` (T * N, units) holds what inputs and biases add up to; `hidden`
    (units, N) is the state before and after; `outputs` (T * N, units)."""
    units, sequences = hidden.shape
    gate = np.empty((units, sequences), np.float32)
    for start in range(0, gates.shape[0], max(1, sequences)):
        gate[:] = gates[start : start + sequences].T
        add_product(starts, places, values, hidden, gate)
        flat, after = gate.reshape(-1), hidden.reshape(-1)
        for n in range(len(after)):
            after[n] = _tanh(flat[n])
        outputs[start : start + sequences] = hidden.T


@njit(**JIT)
def run_lstm(starts, places, values, gates, hidden, cell, outputs):
    """As `run_tanh`, with an LSTM's four gates one after the other, (T * N, 4 * units), and its `cell` (units, N)."""
    units, sequences = hidden.shape
    gate = np.empty((4 * units, sequences), np.float32)
    for start in range(0, gates.shape[0], max(1, sequences)):
        gate[:] = gates[start : start + sequences].T
        add_product(starts, places, values, hidden, gate)
        flat, memory, after = gate.reshape(4, units * sequences), cell.reshape(-1), hidden.reshape(-1)
        for n in range(len(after)):  # one loop, so that vectors of it are computed at once
            inlet, keep, new, outlet = (
                _sigmoid(flat[0, n]),
                _sigmoid(flat[1, n]),
                _tanh(flat[2, n]),
                _sigmoid(flat[3, n]),
            )
            memory[n] = keep * memory[n] + inlet * new
            after[n] = outlet * _tanh(memory[n])
        outputs[start : start + sequences] = hidden.T
