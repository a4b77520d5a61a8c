"""Linear layers whose weights are SciPy CSR matrices, as the system we succeed computes them."""

import copy

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from vdbench.variational import VariationalDropout, VariationalDropoutConv2d


class SparseLinear(nn.Module):
    """A linear layer for inference on a CPU, its weights in compressed sparse rows.

    Args:
        weight: (out_features, in_features), its zeros are left out. bias: (out_features,) or None.

    Shape: input (*, in_features), output (*, out_features), float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.csr = scipy.sparse.csr_matrix(weight.detach().numpy())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1, input.shape[-1]).numpy()
        out = torch.from_numpy(np.ascontiguousarray((self.csr @ flat.T).T))
        if self.bias is not None:
            out += self.bias
        return out.reshape(*input.shape[:-1], -1)

    def extra_repr(self) -> str:
        out_features, in_features = self.csr.shape
        return f"in_features={in_features}, out_features={out_features}, nonzero={self.csr.nnz}"


def _for_inference(layer: nn.Module) -> nn.Module | None:
    """What replaces a layer: None where it stays."""
    weight = layer.masked_weight() if isinstance(layer, VariationalDropout) else getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear):
        return SparseLinear(weight, layer.bias)  # type: ignore[arg-type]
    if isinstance(layer, VariationalDropoutConv2d):
        plain = copy.deepcopy(layer)
        del plain.log_sigma2
        plain.__class__ = nn.Conv2d
        plain.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)  # type: ignore[union-attr]
        return plain
    return None


def to_cpu_sparse(model: nn.Module) -> nn.Module:
    """A copy of a model for inference on a CPU, in eval mode: linear layers compute with their nonzero weights alone
    (variational ones masked at their threshold), convolutions are plain ones with masked weights.

    Raises:
        ValueError: the model is not on the CPU or not float32.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype} on {parameter.device}: move the model with .cpu().float()")
    model = copy.deepcopy(model).eval()
    if (replacement := _for_inference(model)) is not None:
        return replacement
    swaps = {id(m): new for m in model.modules() if (new := _for_inference(m)) is not None}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in swaps:
                setattr(module, name, swaps[id(child)])
    return model
