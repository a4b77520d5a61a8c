"""Linear layers whose weights are SciPy CSR matrices."""

import copy
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from vdbench.variational import VariationalDropoutConv2d, VariationalDropoutLinear


class SparseLinear(nn.Module):
    """A linear layer for inference on a CPU, its weights in compressed sparse rows.

    Args:
        weight: (out_features, in_features), its zeros are left out. bias: (out_features,) or None.

    Shape: input (*, in_features), output (*, out_features), float32.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.csr: Any = scipy.sparse.csr_matrix(weight.detach().numpy())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1, input.shape[-1]).numpy()
        out = torch.from_numpy(np.ascontiguousarray((self.csr @ flat.T).T))
        if self.bias is not None:
            out += self.bias
        return out.reshape(*input.shape[:-1], self.csr.shape[0])

    def extra_repr(self) -> str:
        out_features, in_features = self.csr.shape
        return f"in_features={in_features}, out_features={out_features}, nonzero={self.csr.nnz}"


def _for_inference(layer: nn.Module) -> nn.Module | None:
    """What replaces a layer: None where it stays. Subclasses stay, since they compute something else."""
    if type(layer) is nn.Linear:
        return SparseLinear(layer.weight, layer.bias)
    if isinstance(layer, VariationalDropoutLinear):
        return SparseLinear(layer.masked_weight(), layer.bias)
    if isinstance(layer, VariationalDropoutConv2d):
        plain: Any = copy.deepcopy(layer)
        plain.weight = nn.Parameter(plain.masked_weight().detach(), requires_grad=False)
        del plain.log_sigma2
        plain.__class__ = nn.Conv2d
        return plain
    return None


def to_cpu_sparse(model: nn.Module) -> nn.Module:
    """A copy of a model for inference on a CPU, in eval mode: linear layers compute with their nonzero weights alone
    (variational ones masked at their threshold), convolutions are plain ones with masked weights. Hooks on replaced
    linear layers are not kept.

    Raises:
        ValueError: the model is not on the CPU or not float32.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype} on {parameter.device}: move the model with .cpu().float()")
    model = copy.deepcopy(model).eval()
    swaps = {layer: new for layer in model.modules() if (new := _for_inference(layer)) is not None}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if name and layer in swaps:
            model.set_submodule(name, swaps[layer])
    return swaps.get(model, model)
