"""The ways to run a pruned net that are timed side by side.

Each takes the net, in eval mode, an example of its input, float32 (N, ...), and a number of threads, and gives a
function from a float32 (N, ...) array, of any N, to the array of outputs. Those in PyTorch use the threads that the
process has. Language models have ways of their own, from int64 (T, N) words to logits (T, N, words).
"""

import numpy as np
import torch
from torch import nn

from vdbench.config_timing import Backend
from vdbench.sparse.engine import compile_sparse
from vdbench.sparse.language import SparseLanguageModel
from vdbench.sparse.peers import language
from vdbench.sparse.peers.common import BackendMissing as BackendMissing
from vdbench.sparse.peers.common import Build, Run
from vdbench.sparse.peers.engines import (
    mnn_compacted,
    mnn_dense,
    mnn_sparse,
    onnxruntime,
    onnxruntime_compacted,
    openvino,
    openvino_compacted,
)
from vdbench.sparse.peers.matrices import im2col_scipy, scipy_csr, sparse_dot_mkl, torch_csr
from vdbench.sparse.peers.pytorch import torch_channels_last, torch_compacted, torch_dense


def vdbench(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """This package's engine."""
    compiled = compile_sparse(model, torch.from_numpy(example), threads=threads)
    return lambda batch: np.asarray(compiled(batch))


def language_vdbench(model: nn.Module, words: np.ndarray, threads: int) -> Run:
    """This package's way with language models."""
    return language.through_torch(SparseLanguageModel(model, threads))


BACKENDS: dict[Backend, Build] = {
    "torch_dense": torch_dense,
    "torch_channels_last": torch_channels_last,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "mnn_dense": mnn_dense,
    "torch_compacted": torch_compacted,
    "onnxruntime_compacted": onnxruntime_compacted,
    "openvino_compacted": openvino_compacted,
    "mnn_compacted": mnn_compacted,
    "mnn_sparse": mnn_sparse,
    "scipy_csr": scipy_csr,
    "torch_csr": torch_csr,
    "sparse_dot_mkl": sparse_dot_mkl,
    "im2col_scipy": im2col_scipy,
    "vdbench": vdbench,
}
LANGUAGE_BACKENDS: dict[Backend, Build] = {
    "torch_dense": language.torch_dense,
    "onnxruntime": language.onnxruntime,
    "torch_csr": language.torch_csr,
    "vdbench": language_vdbench,
}
