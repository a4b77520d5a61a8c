"""A pruned language model on a CPU: what does not matter taken out, and the rest compiled."""

import functools
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn

from vdbench.language import State
from vdbench.sparse import recurrent_kernels as kernels
from vdbench.sparse.jit import vector_lanes
from vdbench.sparse.module import SparseModule
from vdbench.sparse.plan import BATCH_VECTORS
from vdbench.sparse.recurrence import NO_TABLE, SparseRecurrence, Table
from vdbench.sparse.threads import Pool
from vdbench.structure import structure

MANY = 256  # words; with fewer, other threads fall asleep between calls and take longer to wake than they save
FEW = 4  # texts; fewer are read one after the other, since they would leave most of a vector empty


def _whole_vectors(texts: int) -> int:
    """So many lanes, and those that fill up the last vector."""
    return -(-texts // vector_lanes()) * vector_lanes()


def _table(matrix: Tensor) -> Table:
    found = csr_array(matrix.numpy())
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


class SparseLanguageModel(nn.Module):
    """A language model that computes with its nonzero weights alone, for one word at a time or for batches of texts.

    It is called as the model it was made from, and returns what that returns, logits to 1e-5 of the largest; in the
    states it returns, the units that were taken out are zero. What it needs is compiled when it is first called with as
    many texts. Texts, in whole vectors of them, and what no word waits for are shared out among threads; a call with
    few words is one thread's.

    Args:
        threads: at the most (default: as many as PyTorch uses).

    Attributes:
        counts: words, units and gates that are left; see `structure.Structure.counts`.
        kept: the numbers of the units that are left, by layer.

    Raises:
        ValueError: not a language model of `vdbench.language`, or with a recurrent layer that `structure` refuses.
    """

    def __init__(self, model: nn.Module, threads: int | None = None) -> None:
        super().__init__()
        parts = structure(model)
        self.training = False
        self.mode, self.words = model.rnn.mode, len(parts.bias)  # type: ignore[union-attr]
        self.units = parts.layers[0].units.shape[1]
        self.counts = parts.counts()
        below = torch.ones(self.words, dtype=torch.bool) if parts.embedding is None else parts.dimensions
        self._embedding, self._dimensions = NO_TABLE, 0
        if parts.embedding is not None:
            self._embedding, self._dimensions = _table(parts.embedding[:, below]), int(below.sum())
        self._layers: list[SparseRecurrence] = []
        for layer in parts.layers:
            inputs, units = layer.inputs[:, layer.kept][:, :, below], layer.units[:, layer.kept][:, :, layer.kept]
            table = NO_TABLE
            if parts.embedding is None and not self._layers:  # words pick columns
                table, inputs = _table(inputs.flatten(0, 1).t()), inputs[:, :, :0]
            kept = layer.kept.numpy().nonzero()[0]
            self._layers.append(SparseRecurrence(inputs, units, layer.bias[:, layer.kept], kept, table))
            below = layer.kept
        # in a tuple, for it is no part of a state
        self._output = (_Product(parts.output[:, below], parts.bias, threads),)
        self._pool = Pool(threads)
        self.kept = [layer.kept for layer in self._layers]

    @torch.no_grad()
    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (T, N, words) and the state after the last of the words, int64 (T, N)."""
        if not isinstance(input, Tensor) or input.dtype != torch.int64:
            what = f"a tensor of {input.dtype}" if isinstance(input, Tensor) else f"a {type(input).__name__}"
            raise TypeError(f"words are a tensor of int64, not {what}")
        if input.dim() != 2:
            raise ValueError(f"words are (T, N), not {tuple(input.shape)}")
        steps, sequences = input.shape
        words = np.ascontiguousarray(input.numpy())
        if words.size and not 0 <= words.min() <= words.max() < self.words:
            raise IndexError(f"words are numbers below {self.words}, not {words.min()} to {words.max()}")
        before = self._parts(state, sequences)
        after = [np.zeros_like(part) for part in before]
        hidden = np.empty((steps, sequences, len(self._layers[-1].kept)), np.float32)
        threads = self._pool.threads if words.size >= MANY else 1
        share = _whole_vectors(-(-sequences // threads))
        at_once = 1 if sequences < FEW else min(share, BATCH_VECTORS * vector_lanes())
        threads = max(1, min(threads, -(-sequences // at_once)))
        for texts in {min(at_once, sequences), sequences % at_once} - {0}:
            for layer in self._layers:
                layer.prepare(1 if at_once == 1 else _whole_vectors(texts))

        def read(thread: int) -> None:
            for first in range(thread * at_once, sequences, threads * at_once):
                value = self._read(words, first, at_once, before, after)
                texts = hidden[:, first : first + at_once]
                texts[...] = value.transpose(0, 2, 1)[:, : texts.shape[1]]

        self._pool.run([functools.partial(read, thread) for thread in range(threads)])
        logits = self._output[0](hidden.reshape(steps * sequences, hidden.shape[2])).reshape(
            steps, sequences, self.words
        )
        found = [torch.from_numpy(part) for part in after]
        return torch.from_numpy(logits), (found[0], found[1]) if len(found) == 2 else found[0]

    def _parts(self, state: State | None, sequences: int) -> list[np.ndarray]:
        """h and, of an LSTM, c of so many sequences, (layers, N, units) each. Raises ValueError for another state."""
        kinds, shape = 2 if self.mode == "LSTM" else 1, (len(self._layers), sequences, self.units)
        if state is None:
            return [np.zeros(shape, np.float32) for _ in range(kinds)]
        parts = (state,) if isinstance(state, Tensor) else tuple(state)
        if [tuple(part.shape) for part in parts] != [shape] * kinds:
            found = " and ".join(str(tuple(part.shape)) for part in parts)
            wanted = f"(h, c), each {shape}" if kinds == 2 else f"h, {shape}"
            raise ValueError(f"the state of so many sequences is {wanted}, not {found}")
        return [np.ascontiguousarray(part.float().numpy()) for part in parts]

    def _read(
        self, words: np.ndarray, first: int, at_once: int, before: list[np.ndarray], after: list[np.ndarray]
    ) -> np.ndarray:
        """What the last layer says, (T, units, columns), of up to so many texts from `first` on, a column each; their
        states, those in `before` at the start, are in `after` then."""
        words = np.ascontiguousarray(words[:, first : first + at_once])
        columns = 1 if at_once == 1 else _whole_vectors(words.shape[1])
        value = np.zeros((len(words), self._dimensions, columns), np.float32)
        if self._dimensions:
            kernels.look_up_all(self._embedding, words, value)
        for number, layer in enumerate(self._layers):
            old, new = (tuple(part[number] for part in parts) for parts in (before, after))
            value = layer(value, words, first, old, new)
        return value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """What is left of the weights fits no other model."""
        *_, errors = others
        which = prefix.removesuffix(".") or "this"
        errors.append(f"load the weights into the model that {which} was made from, and call to_cpu_sparse again")

    def train(self, mode: bool = True) -> "SparseLanguageModel":
        """Stays in eval mode: there is nothing left to train."""
        return self
