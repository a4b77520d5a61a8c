"""Sparse variational dropout: layers, conversion, sparse inference, and the benchmark suite that uses them.

Names are imported on first use, so that the command line does not wait for torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "VariationalDropoutLinear": "variational",
    "VariationalDropoutConv2d": "variational",
    "VariationalDropoutConvolution2D": "variational",
    "VariationalDropoutEmbedding": "recurrent",
    "VariationalDropoutLSTM": "recurrent",
    "VariationalDropoutTanhRNN": "recurrent",
    "VariationalDropoutChain": "chain",
    "to_variational_dropout": "conversion",
    "to_plain": "conversion",
    "kl_divergence": "variational",
    "forward_with_kl": "variational",
    "set_dropout": "models",
    "sparsity": "metrics",
    "compile_sparse": "sparse",
    "CompiledNet": "sparse",
    "to_cpu_sparse": "sparse",
    "load": "shipping",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vdbench' has no attribute {name!r}")
    return getattr(import_module(f"vdbench.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
