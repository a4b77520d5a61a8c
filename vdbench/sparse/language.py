"""A pruned language model on a CPU: words and units that do not matter taken out, the rest in sparse matrices."""

from typing import Any

import numpy as np
import torch
from scipy.sparse import csc_array, csr_array
from torch import Tensor, nn

from vdbench.language import State
from vdbench.sparse import recurrent_kernels as kernels
from vdbench.structure import structure

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # starts, places and values


def _parts(kind: type[csr_array] | type[csc_array], matrix: Tensor) -> Parts:
    found: Any = kind(matrix.numpy())
    # numba asks of every signed index whether it counts from the end
    return found.indptr.astype(np.int64), found.indices.astype(np.uint32), found.data.astype(np.float32)


class _Sparse:
    """A matrix by rows and by columns: see `recurrent_kernels`."""

    def __init__(self, matrix: Tensor) -> None:
        self.rows, self.columns = (_parts(kind, matrix) for kind in (csr_array, csc_array))

    def times(self, columns: int) -> Parts:
        """As it is to be multiplied with so many columns."""
        return self.columns if columns == 1 else self.rows


class SparseLanguageModel(nn.Module):
    """A language model that computes with its nonzero weights alone, for one word at a time or for batches of texts.

    It is called as the model it was made from, and returns what that returns, logits to 1e-5; in the states it returns,
    the units that were taken out are zero. One thread.

    Attributes:
        counts: words, units and gates that are left; see `structure.Structure.counts`.

    Raises:
        ValueError: not a language model of `vdbench.language`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        parts = structure(model)
        self.training = False
        self.mode, self.words = model.rnn.mode, len(parts.bias)  # type: ignore[union-attr]
        self.units = parts.layers[0].units.shape[1]
        self.counts = parts.counts()
        self.kept = [layer.kept.numpy().nonzero()[0] for layer in parts.layers]
        below = torch.ones(self.words, dtype=torch.bool) if parts.embedding is None else parts.dimensions
        self._embedding = None if parts.embedding is None else _parts(csr_array, parts.embedding[:, below])
        self._dimensions = int(below.sum())
        self._layers: list[tuple[_Sparse, _Sparse, np.ndarray]] = []
        for layer in parts.layers:
            inputs = layer.inputs[:, layer.kept][:, :, below].flatten(0, 1)
            if parts.embedding is None and not self._layers:  # one-hot words pick columns
                inputs = inputs.t()
            hidden = layer.units[:, layer.kept][:, :, layer.kept].flatten(0, 1)
            self._layers.append((_Sparse(inputs), _Sparse(hidden), layer.bias[:, layer.kept].reshape(-1, 1).numpy()))
            below = layer.kept
        self._output, self._bias = _Sparse(parts.output[:, below]), parts.bias.view(-1, 1).numpy()

    @torch.no_grad()
    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (T, N, words) and the state after the last of the words, int64 (T, N)."""
        if input.dim() != 2:
            raise ValueError(f"words are (T, N), not {tuple(input.shape)}")
        steps, sequences = input.shape
        words = np.ascontiguousarray(input.numpy().reshape(-1))
        if len(words) and not 0 <= words.min() <= words.max() < self.words:
            raise IndexError(f"words are numbers below {self.words}, not {words.min()} to {words.max()}")
        value = np.zeros((self._dimensions, len(words)), np.float32)
        if self._embedding is not None:
            kernels.look_up(*self._embedding, words, value)
        kinds, shape = 2 if self.mode == "LSTM" else 1, (len(self._layers), sequences, self.units)
        states = () if state is None else (state,) if isinstance(state, Tensor) else tuple(state)
        if states and [tuple(part.shape) for part in states] != [shape] * kinds:
            found = " and ".join(str(tuple(part.shape)) for part in states)
            wanted = "h and c" if kinds == 2 else "h"
            raise ValueError(f"the state of so many sequences is {wanted}, each {shape}, not {found}")
        states = [part.float().numpy() for part in states]
        after = [np.zeros(shape, np.float32) for _ in range(kinds)]
        for number, (inputs, hidden, bias) in enumerate(self._layers):
            kept = self.kept[number]
            gates = np.repeat(bias, len(words), axis=1)
            if number == 0 and self._embedding is None:
                columns = np.zeros_like(gates)
                kernels.look_up(*inputs.rows, words, columns)
                gates += columns
            else:
                kernels.add_product(*inputs.times(len(words)), value, gates)
            before = [np.ascontiguousarray(part[number].T[kept]) for part in states]
            before = before or [np.zeros((len(kept), sequences), np.float32) for _ in range(kinds)]
            value = np.empty((len(kept), len(words)), np.float32)
            run: Any = kernels.run_lstm if kinds == 2 else kernels.run_tanh
            run(*hidden.times(sequences), gates, *before, value)
            for whole, part in zip(after, before, strict=True):
                whole[number][:, kept] = part.T
        logits = np.repeat(self._bias, len(words), axis=1)
        kernels.add_product(*self._output.times(len(words)), value, logits)
        found = [torch.from_numpy(part) for part in after]
        shaped = torch.from_numpy(logits).view(self.words, steps, sequences).permute(1, 2, 0)
        return shaped, (found[0], found[1]) if kinds == 2 else found[0]

    def train(self, mode: bool = True) -> "SparseLanguageModel":
        """Stays in eval mode: there is nothing left to train."""
        return self
