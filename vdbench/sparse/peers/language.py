"""Language models, each called with words, int64 (T, N), from the state zero, for logits (T, N, words)."""

import io
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from vdbench.sparse.onnx_graph import INPUT, OUTPUT
from vdbench.sparse.peers.common import Run, not_installed, onnx_session
from vdbench.structure import structure


def _through_torch(model: nn.Module) -> Run:
    @torch.inference_mode()
    def run(words: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(words))[0].numpy()

    return run


def torch_dense(model: nn.Module, words: np.ndarray, threads: int) -> Run:
    """PyTorch, zeros and all."""
    return _through_torch(model)


class _CsrModel(nn.Module):
    """The model with its matrices in compressed sparse rows, and the recurrence as a loop."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        parts = structure(model)
        self.embedding, self.mode = parts.embedding, model.rnn.mode  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self.layers = [
                (x.inputs.flatten(0, 1).to_sparse_csr(), x.units.flatten(0, 1).to_sparse_csr(), x.bias.reshape(-1, 1))
                for x in parts.layers
            ]
            self.output, self.bias = parts.output.to_sparse_csr(), parts.bias[:, None]

    def forward(self, words: Tensor) -> tuple[Tensor]:
        assert self.embedding is not None
        value = self.embedding[words.flatten()].t().contiguous()
        for inputs, units, bias in self.layers:
            value = self.run(inputs @ value + bias, units, words.shape[1])
        return ((self.output @ value + self.bias).t().view(*words.shape, -1),)

    def run(self, gates: Tensor, units: Tensor, sequences: int) -> Tensor:
        hidden = cell = gates.new_zeros(units.shape[1], sequences)
        outputs = []
        for gate in gates.split(sequences, dim=1):
            gate = gate + units @ hidden
            if self.mode == "LSTM":
                inlet, keep, new, outlet = gate.chunk(4)
                cell = keep.sigmoid() * cell + inlet.sigmoid() * new.tanh()
                hidden = outlet.sigmoid() * cell.tanh()
            else:
                hidden = gate.tanh()
            outputs.append(hidden)
        return torch.cat(outputs, dim=1)


def torch_csr(model: nn.Module, words: np.ndarray, threads: int) -> Run:
    """All matrices as torch's CSR tensors, the embedding dense."""
    return _through_torch(_CsrModel(model))


def onnxruntime(model: nn.Module, words: np.ndarray, threads: int) -> Run:
    """ONNX Runtime, dense, its own LSTM."""
    try:
        import onnx  # noqa: F401  # PyTorch's exporter needs it, and has another error for its absence
    except ImportError as error:
        raise not_installed(error.name) from None
    file, axes = io.BytesIO(), {0: "steps", 1: "texts"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's, that it is the older one, and that texts may be fewer
        torch.onnx.export(
            model,
            (torch.from_numpy(words),),
            file,  # type: ignore[arg-type]  # any binary file will do
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: axes, OUTPUT: axes},
            dynamo=False,  # the newer one needs a package of its own
        )
    return onnx_session(file.getvalue(), threads)


def vdbench(model: nn.Module, words: np.ndarray, threads: int) -> Run:
    """This package's, on one thread."""
    from vdbench.sparse.language import SparseLanguageModel

    return _through_torch(SparseLanguageModel(model))
