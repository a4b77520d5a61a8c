"""Inference with pruned networks on a CPU, and the peers it is measured against."""

from vdbench.sparse.engine import CompiledNet as CompiledNet
from vdbench.sparse.engine import compile_sparse as compile_sparse
from vdbench.sparse.language import SparseLanguageModel as SparseLanguageModel
from vdbench.sparse.module import SparseModule as SparseModule
from vdbench.sparse.to_cpu import to_cpu_sparse as to_cpu_sparse
