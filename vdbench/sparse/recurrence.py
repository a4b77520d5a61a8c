"""A recurrent layer with sparse weights, all products of a timestep one native call."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdbench.sparse import recurrent_kernels as kernels
from vdbench.sparse.engine import planned
from vdbench.sparse.graph import Graph, Input, Linear
from vdbench.sparse.jit import COMPILING, vector_lanes
from vdbench.sparse.plan import Network, Plan
from vdbench.sparse.program import Bound, Program, Segment
from vdbench.sparse.stencil import Stencil
from vdbench.sparse.threads import OfAThread
from vdbench.structure import GATES

Table = tuple[np.ndarray, np.ndarray, np.ndarray]  # sparse rows: where each starts, places and values
States = tuple[np.ndarray, ...]  # (N, units) each: h, and of an LSTM c
NO_TABLE: Table = np.zeros(1, np.int64), np.zeros(0, np.uint32), np.zeros(0, np.float32)


@dataclass(frozen=True)
class Memory:
    """Where one caller computes: `given` (inputs + units, columns), what comes in above the state; `sums` (gates *
    units, columns), weights times that plus biases; `call`, what makes the one of the other: the address of a function
    and its arguments."""

    given: np.ndarray
    sums: np.ndarray
    call: tuple[int, ...]
    bound: Bound  # whose memory it is


class SparseRecurrence:
    """An LSTM or tanh layer over texts; may be called by several threads at a time.

    Args:
        inputs, units, bias: weights (gates, units, inputs) and (gates, units, units), and biases (gates, units).
        kept: int64 (units,), which units of the states they are.
        table: what every one-hot word adds to the gates, a sparse row a word.
    """

    def __init__(self, inputs: Tensor, units: Tensor, bias: Tensor, kept: np.ndarray, table: Table = NO_TABLE) -> None:
        weight = torch.cat([inputs, units], dim=2).flatten(0, 1).numpy()
        given, sums = ((length,) for length in weight.shape[::-1])
        product = Linear(name="sums", inputs=("given",), shape=sums, weight=weight, bias=bias.flatten().numpy())
        self._graph = Graph((Input(name="given", shape=given), product))
        self.kept, self.table, self.gates = kept, table, len(units)
        self._programs: dict[int, Program] = {}
        self._local = OfAThread()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles compile anew: machine code and memory belong to one process."""
        return {k: v for k, v in self.__dict__.items() if k != "_local"} | {"_programs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=OfAThread())

    def prepare(self, columns: int) -> None:
        """Compile what computes so many columns, before threads are at work: ways are timed."""
        with COMPILING:
            if len(self.kept) and columns not in self._programs:
                self._programs[columns] = self._compiled(columns)

    def _compiled(self, columns: int) -> Program:
        """One column is a single example to the engine, more are vectors of them."""
        single, vectors = columns == 1, 0 if columns == 1 else columns // vector_lanes()
        plan = self._plans["single" if single else "batch"][0]
        (stencil,), (item,) = Network(self._graph, single=single).items, plan.items
        assert isinstance(stencil, Stencil)
        segment = Segment((stencil,), (), (), {op.name: op.shape for op in self._graph.ops})
        return Program(segment, {stencil.name: item.kernel(late=vectors > 1)[1]}, vectors=vectors)

    @functools.cached_property
    def _plans(self) -> dict[str, list[Plan]]:
        return planned(self._graph)

    def _memory(self, columns: int) -> Memory:
        mine: dict[int, Memory] = self._local.made
        if columns not in mine:
            bound = Bound(self._programs[columns])
            bound.point_to((), 1)
            mine[columns] = Memory(bound.value("given"), bound.value("sums"), bound.call, bound)
        return mine[columns]

    def __call__(self, inputs: np.ndarray, words: np.ndarray, first: int, before: States, after: States) -> np.ndarray:
        """Outputs (T, kept, columns) for inputs (T, inputs, columns), or one-hot words (T, N), of the texts from
        `first` on; the states of all texts are read from `before` and written to `after`. Columns are 1, or as many as
        whole vectors have lanes, and prepared for."""
        steps, _, columns = inputs.shape
        outputs = np.empty((steps, len(self.kept), columns), np.float32)
        if len(self.kept):
            m = self._memory(columns)
            words = words if len(self.table[1]) else words[:, :0]
            run: Any = kernels.run_lstm if self.gates == GATES["LSTM"] else kernels.run_tanh
            run(m.call, m.given, m.sums, inputs, self.table, words, self.kept, first, before, after, outputs)
        return outputs
