"""A pruned language model on a CPU: what does not matter taken out, the rest compiled, but for recurrences."""

from typing import Any

import numpy as np
import torch
from scipy.sparse import csc_array, csr_array
from torch import Tensor, nn

from vdbench.language import State
from vdbench.sparse import recurrent_kernels as kernels
from vdbench.sparse.module import SparseModule
from vdbench.structure import GATES, Recurrence, structure

MANY = 256  # words; with fewer, other threads fall asleep over every recurrence and take longer to wake than they save
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # starts, places and values


def _parts(kind: type[csr_array] | type[csc_array], matrix: Tensor) -> Parts:
    found: Any = kind(matrix.numpy())
    # numba asks of every signed index whether it counts from the end
    return found.indptr.astype(np.int64), found.indices.astype(np.uint32), found.data.astype(np.float32)


class _Product(nn.Module):
    """x W^T + b, (N, inputs) to (N, outputs), compiled if there is anything to compile."""

    def __init__(self, weight: Tensor, bias: Tensor, threads: int | None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, device="meta").eval()  # so that no number is drawn
        self.layer.out_features, self.layer.in_features = weight.shape
        self.layer.weight, self.layer.bias = (
            nn.Parameter(part.clone(), requires_grad=False) for part in (weight, bias)
        )
        self.of_few = SparseModule(self.layer, 1)
        self.of_many = self.of_few if threads == 1 else SparseModule(self.layer, threads)

    def forward(self, value: np.ndarray) -> np.ndarray:
        if not self.layer.weight.numel():
            return self.layer(torch.from_numpy(value)).numpy()
        module = self.of_few if len(value) < MANY else self.of_many
        return module.net_for(value)(value)  # type: ignore[return-value]


class _Layer(nn.Module):
    """A recurrent layer: what its inputs and biases add up to, for all words at once, and the recurrence."""

    def __init__(self, layer: Recurrence, below: Tensor, threads: int | None, *, one_hot: bool) -> None:
        super().__init__()
        self.kept = layer.kept.numpy().nonzero()[0]
        inputs = layer.inputs[:, layer.kept][:, :, below].flatten(0, 1)
        bias = layer.bias[:, layer.kept].flatten()
        # one-hot words pick columns
        self.picked = (_parts(csr_array, inputs.t()), bias.numpy()) if one_hot else None
        self.product = nn.Identity() if one_hot else _Product(inputs, bias, threads)
        hidden = layer.units[:, layer.kept][:, :, layer.kept].flatten(0, 1)
        self.rows, self.columns = _parts(csr_array, hidden), _parts(csc_array, hidden)
        self.run: Any = kernels.run_lstm if len(layer.units) == GATES["LSTM"] else kernels.run_tanh

    def forward(self, value: np.ndarray, words: np.ndarray, states: list[np.ndarray]) -> np.ndarray:
        """Outputs (T * N, units), of inputs (T * N, ...) or of one-hot words; the states (units, N) go on."""
        if self.picked:
            columns, bias = self.picked
            gates = np.tile(bias, (len(words), 1))
            kernels.look_up(*columns, words, gates)
        else:
            gates = self.product(value)
        outputs = np.empty((len(words), len(self.kept)), np.float32)
        self.run(*(self.columns if states[0].shape[1] == 1 else self.rows), gates, *states, outputs)
        return outputs


class SparseLanguageModel(nn.Module):
    """A language model that computes with its nonzero weights alone, for one word at a time or for batches of texts.

    It is called as the model it was made from, and returns what that returns, logits to 1e-5 of the largest; in the
    states it returns, the units that were taken out are zero. What no word of a call waits for is compiled by
    `compile_sparse` when it is first called; the recurrence, and a call with few words, is one thread's.

    Args:
        threads: at the most (default: as many as PyTorch uses).

    Attributes:
        counts: words, units and gates that are left; see `structure.Structure.counts`.
        kept: the units that are left, by layer.

    Raises:
        ValueError: not a language model of `vdbench.language`.
    """

    def __init__(self, model: nn.Module, threads: int | None = None) -> None:
        super().__init__()
        parts = structure(model)
        self.training = False
        self.mode, self.words = model.rnn.mode, len(parts.bias)  # type: ignore[union-attr]
        self.units = parts.layers[0].units.shape[1]
        self.counts = parts.counts()
        below = torch.ones(self.words, dtype=torch.bool) if parts.embedding is None else parts.dimensions
        self._embedding = None if parts.embedding is None else _parts(csr_array, parts.embedding[:, below])
        self._dimensions = 0 if parts.embedding is None else int(below.sum())
        layers: list[_Layer] = []
        for number, layer in enumerate(parts.layers):
            one_hot = parts.embedding is None and number == 0
            layers.append(_Layer(layer, below, threads, one_hot=one_hot))
            below = layer.kept
        self._output = _Product(parts.output[:, below], parts.bias, threads)
        self._layers, self.kept = nn.ModuleList(layers), [layer.kept for layer in layers]

    @torch.no_grad()
    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (T, N, words) and the state after the last of the words, int64 (T, N)."""
        if input.dim() != 2:
            raise ValueError(f"words are (T, N), not {tuple(input.shape)}")
        steps, sequences = input.shape
        words = np.ascontiguousarray(input.numpy().reshape(-1))
        if len(words) and not 0 <= words.min() <= words.max() < self.words:
            raise IndexError(f"words are numbers below {self.words}, not {words.min()} to {words.max()}")
        kinds, shape = 2 if self.mode == "LSTM" else 1, (len(self._layers), sequences, self.units)
        states = () if state is None else (state,) if isinstance(state, Tensor) else tuple(state)
        if states and [tuple(part.shape) for part in states] != [shape] * kinds:
            found = " and ".join(str(tuple(part.shape)) for part in states)
            wanted = "h and c" if kinds == 2 else "h"
            raise ValueError(f"the state of so many sequences is {wanted}, each {shape}, not {found}")
        states = [part.float().numpy() for part in states]
        after = [np.zeros(shape, np.float32) for _ in range(kinds)]
        value = np.zeros((len(words), self._dimensions), np.float32)
        if self._embedding is not None:
            kernels.look_up(*self._embedding, words, value)
        for number, (layer, kept) in enumerate(zip(self._layers, self.kept, strict=True)):
            before = [np.ascontiguousarray(part[number].T[kept]) for part in states]
            before = before or [np.zeros((len(kept), sequences), np.float32) for _ in range(kinds)]
            value = layer(value, words, before)
            for whole, part in zip(after, before, strict=True):
                whole[number][:, kept] = part.T
        logits = torch.from_numpy(self._output(value).reshape(steps, sequences, self.words))
        found = [torch.from_numpy(part) for part in after]
        return logits, (found[0], found[1]) if kinds == 2 else found[0]

    def train(self, mode: bool = True) -> "SparseLanguageModel":
        """Stays in eval mode: there is nothing left to train."""
        return self
