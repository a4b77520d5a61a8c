"""The engine as an `nn.Module`: compiled when the first batch shows its shape, layer by layer where need be."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from vdbench.conversion import to_plain
from vdbench.sparse.engine import CompiledNet, compile_sparse
from vdbench.sparse.language import SparseLanguageModel
from vdbench.sparse.tracing import Untraceable
from vdbench.structure import LanguageModel

log = logging.getLogger("vdbench")

LAYERS = (nn.Linear, nn.Conv2d)


class SparseModule(nn.Module):
    """A model for inference on a CPU that computes with its nonzero weights alone; see `to_cpu_sparse`.

    Attributes:
        nets: what was compiled, by the shape of an example.
    """

    def __init__(self, model: nn.Module, threads: int | None) -> None:
        super().__init__()
        self.model, self.threads = model, threads
        self.nets: dict[tuple[int, ...], CompiledNet] = {}
        self._whole = True
        self.training = False

    @torch.no_grad()
    def forward(self, *inputs: Any, **named: Any) -> Any:
        if self._whole and not named and len(inputs) == 1 and _is_float(inputs[0]):
            batch = inputs[0].detach()
            if isinstance(self.model, nn.Linear):  # takes any number of axes in front
                flat = self._compiled(batch.reshape(-1, batch.shape[-1]))
                return flat.reshape(*batch.shape[:-1], self.model.out_features)
            try:
                return self._compiled(batch)
            except Untraceable as error:
                log.warning("%s is compiled layer by layer: %s", type(self.model).__name__, error)
        if self._whole:
            self.model, self._whole = layer_by_layer(self.model, self.threads), False
        return self.model(*inputs, **named)

    def _compiled(self, batch: Tensor) -> Tensor:
        shape = tuple(batch.shape[1:])
        if shape not in self.nets:
            self.nets[shape] = compile_sparse(self.model, batch, threads=self.threads)
        return self.nets[shape](batch)  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles compile anew: machine code and memory belong to one process."""
        return {**self.__dict__, "nets": {}}

    def train(self, mode: bool = True) -> "SparseModule":
        """Stays in eval mode: there is nothing left to train."""
        return self


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def layer_by_layer(model: nn.Module, threads: int | None) -> nn.Module:
    """The model with every linear and convolutional layer swapped for one that is compiled by itself, and other
    variational layers for plain ones. Subclasses that are not ours stay, since they compute something else."""
    model = to_plain(model)
    swaps = {layer: SparseModule(layer, threads) for layer in model.modules() if type(layer) in LAYERS}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if name and layer in swaps:
            model.set_submodule(name, swaps[layer])
    return model


def to_cpu_sparse(model: nn.Module, *, threads: int | None = None) -> SparseModule | SparseLanguageModel:
    """A copy of a model for inference on a CPU, in eval mode, that computes with its nonzero weights alone: variational
    layers are masked at their threshold. It is compiled by `compile_sparse` when it is first called, for the shape of
    that batch; a model that is no fixed sequence of operations on one tensor is compiled layer by layer. A model of
    `vdbench.language` becomes a `SparseLanguageModel`.

    Args:
        threads: at the most (default: as many as PyTorch uses).

    Raises:
        ValueError: the model is not on the CPU or not float32.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype} on {parameter.device}: move the model with .cpu().float()")
    if isinstance(model, LanguageModel):
        return SparseLanguageModel(model)
    return SparseModule(copy.deepcopy(model).eval(), threads)
