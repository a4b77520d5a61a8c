"""The engine as an `nn.Module`: compiled when the first batch shows its shape, layer by layer where need be."""

import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vdbench.conversion import to_plain
from vdbench.sparse.engine import CompiledNet, compile_sparse
from vdbench.sparse.tracing import Untraceable

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
                flat = batch.reshape(math.prod(batch.shape[:-1]), batch.shape[-1])
                return self.net_for(flat)(flat).reshape(*batch.shape[:-1], self.model.out_features)
            try:
                return self.net_for(batch)(batch)
            except Untraceable as error:
                log.warning("%s is compiled layer by layer: %s", type(self.model).__name__, error)
        if self._whole:
            self.model, self._whole = layer_by_layer(self.model, self.threads), False
        return self.model(*inputs, **named)

    def net_for(self, batch: Tensor | np.ndarray) -> CompiledNet:
        """What is compiled for batches of such examples; it takes arrays too, with less ado than `forward`."""
        shape = batch.shape[1:]
        if shape not in self.nets:
            self.nets[shape] = compile_sparse(self.model, torch.as_tensor(batch), threads=self.threads)
        return self.nets[shape]

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
