"""Any model for inference on a CPU, whatever it takes."""

import copy

from torch import nn

from vdbench.sparse.checks import check_parameters, unwrapped
from vdbench.sparse.language import SparseLanguageModel
from vdbench.sparse.module import SparseModule
from vdbench.structure import is_as_made


def to_cpu_sparse(model: nn.Module, *, threads: int | None = None) -> SparseModule | SparseLanguageModel:
    """A copy of a model for inference on a CPU, in eval mode, that computes with its nonzero weights alone: variational
    layers are masked at their threshold. It is compiled by `compile_sparse` when it is first called, for the shape of
    that batch; a model that is no fixed sequence of operations on one tensor, or that has linear layers on sequences,
    which may be of any length, is compiled layer by layer. A model of `vdbench.language`, without hooks or a forward
    pass of its own, becomes a `SparseLanguageModel`.

    Args:
        threads: at the most (default: as many as PyTorch uses).

    Raises:
        TypeError: not a module. ValueError: the model is TorchScript, not on the CPU, not float32, without weights yet
            or holds NaN or infinity; `threads` is below 1.
    """
    model = unwrapped(model)
    check_parameters(model)
    if is_as_made(model):
        return SparseLanguageModel(model, threads)
    return SparseModule(copy.deepcopy(model).eval(), threads)
