"""Language models, called with words, int64 (T, N), for logits (T, N, words).

A call reads on in the texts of the call before, from the state zero where there is none of as many words.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vdbench.sparse.onnx_graph import INPUT, OUTPUT
from vdbench.sparse.peers.common import BackendMissing, Run, not_installed, onnx_session
from vdbench.structure import structure

Read = Callable[[np.ndarray, Any], tuple[np.ndarray, Any]]  # of words and the state before them; logits and that after


def reading_on(read: Read) -> Run:
    shape, state = None, None

    def run(words: np.ndarray) -> np.ndarray:
        nonlocal shape, state
        logits, state = read(words, state if words.shape == shape else None)
        shape = words.shape
        return logits

    return run


def through_torch(model: nn.Module) -> Run:
    @torch.inference_mode()
    def read(words: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        logits, state = model(torch.from_numpy(words), state)
        return logits.numpy(), state

    return reading_on(read)


def torch_dense(model: nn.Module, words: np.ndarray, threads: int) -> Run:
    """PyTorch, zeros and all."""
    return through_torch(model)


class _CsrModel(nn.Module):
    """The model with its matrices in compressed sparse rows, and the recurrence as a loop."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        parts = structure(model)
        if parts.embedding is None:
            raise BackendMissing("torch's CSR matrices have no columns to pick for one-hot words")
        self.embedding, self.mode = parts.embedding, model.rnn.mode  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self.layers = [
                (x.inputs.flatten(0, 1).to_sparse_csr(), x.units.flatten(0, 1).to_sparse_csr(), x.bias.reshape(-1, 1))
                for x in parts.layers
            ]
            self.output, self.bias = parts.output.to_sparse_csr(), parts.bias[:, None]

    def forward(self, words: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """`state`: of every layer, (2, units, N): hidden and cell."""
        value, after = self.embedding[words.flatten()].t().contiguous(), []
        for number, (inputs, units, bias) in enumerate(self.layers):
            before = value.new_zeros(2, units.shape[1], words.shape[1]) if state is None else state[number]
            value, last = self.run(inputs @ value + bias, units, before)
            after.append(last)
        return (self.output @ value + self.bias).t().view(*words.shape, -1), after

    def run(self, gates: Tensor, units: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden, cell = state
        outputs = []
        for gate in gates.split(hidden.shape[1], dim=1):
            gate = gate + units @ hidden
            if self.mode == "LSTM":
                inlet, keep, new, outlet = gate.chunk(4)
                cell = keep.sigmoid() * cell + inlet.sigmoid() * new.tanh()
                hidden = outlet.sigmoid() * cell.tanh()
            else:
                hidden = gate.tanh()
            outputs.append(hidden)
        return torch.cat(outputs, dim=1), torch.stack((hidden, cell))


def torch_csr(model: nn.Module, words: np.ndarray, threads: int) -> Run:
    """All matrices as torch's CSR tensors, the embedding dense."""
    return through_torch(_CsrModel(model))


def onnxruntime(model: nn.Module, words: np.ndarray, threads: int) -> Run:
    """ONNX Runtime, dense, with its own LSTM or RNN."""
    try:
        import onnx  # noqa: F401  # PyTorch's exporter needs it, and has another error for its absence
    except ImportError as error:
        raise not_installed(error.name) from None
    rnn: Any = model.rnn
    kinds = ("hidden", "cell") if rnn.mode == "LSTM" else ("hidden",)
    state = [torch.zeros(rnn.num_layers, words.shape[1], rnn.hidden_size) for _ in kinds]
    after = [f"{kind} after" for kind in kinds]
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's, that it is the older one, and that texts may be fewer
        torch.onnx.export(
            model,
            (torch.from_numpy(words), tuple(state) if len(state) == 2 else state[0]),
            file,  # type: ignore[arg-type]  # any binary file will do
            input_names=[INPUT, *kinds],
            output_names=[OUTPUT, *after],
            dynamic_axes={name: {0: "steps", 1: "texts"} for name in (INPUT, OUTPUT)}
            | {name: {1: "texts"} for name in (*kinds, *after)},
            dynamo=False,  # the newer one needs a package of its own
        )
    session = onnx_session(file.getvalue(), threads)

    def read(words: np.ndarray, before: list[np.ndarray] | None) -> tuple[np.ndarray, list[np.ndarray]]:
        before = before or [np.zeros((rnn.num_layers, words.shape[1], rnn.hidden_size), np.float32) for _ in kinds]
        logits, *last = session.run(None, {INPUT: words, **dict(zip(kinds, before, strict=True))})
        return logits, last

    return reading_on(read)
