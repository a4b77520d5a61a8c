"""The engine as an `nn.Module`: compiled when the first batch shows its shape, layer by layer where need be."""

import copy
import inspect
import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vdbench.conversion import call_every_layer, to_plain
from vdbench.sparse.checks import Refused, Untraceable
from vdbench.sparse.compact import compact
from vdbench.sparse.engine import CompiledNet, compiled
from vdbench.sparse.graph import LinearAtPlaces
from vdbench.sparse.opaque import left_to_pytorch
from vdbench.sparse.threads import checked_threads
from vdbench.sparse.tracing import trace

log = logging.getLogger("vdbench")

LAYERS = (nn.Linear, nn.Conv2d)


class SparseModule(nn.Module):
    """A model for inference on a CPU that computes with its nonzero weights alone; see `to_cpu_sparse`. What the model
    has besides, its weights for one, is read from here too; weights are changed by this module's `load_state_dict`, not
    inside `model`, which what is compiled knows nothing of.

    Attributes:
        nets: what was compiled, by the shape of an example.
    """

    def __init__(self, model: nn.Module, threads: int | None) -> None:
        super().__init__()
        self.model, self.threads = to_plain(model), checked_threads(threads)
        self.nets: dict[tuple[int, ...], CompiledNet] = {}
        self._by_layers: set[tuple[int, ...]] = set()  # shapes of examples for which the whole is not compiled
        self._parts: tuple[nn.Module, ...] = ()  # the model by layers, in a tuple, for it is no part of the state
        self.register_load_state_dict_post_hook(_forget)
        self.training = False

    @torch.no_grad()
    def forward(self, *inputs: Any, **named: Any) -> Any:
        batch = self._only_batch(inputs, named)
        if batch is not None and batch.shape[1:] not in self._by_layers:
            try:
                return self._of(batch)
            except Refused:
                pass  # a mistake, of which the model will say what it is, or one example by itself
            except Untraceable as error:
                log.warning("%s is compiled layer by layer: %s", type(self.model).__name__, error)
                self._by_layers.add(batch.shape[1:])
        if not self._parts:
            self._parts = (layer_by_layer(self.model, self.threads),)
        return self._parts[0](*inputs, **named)

    def _only_batch(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        """The only input, if it is one that whole models are compiled for."""
        if named:
            try:
                bound = inspect.signature(self.model.forward).bind(*inputs, **named)
            except TypeError:
                return None  # the model will say what is wrong
            inputs, named = bound.args, bound.kwargs
        alone = inputs[0] if len(inputs) == 1 and not named else None
        if not isinstance(alone, Tensor) or not alone.is_floating_point():
            return None
        return alone.detach() if alone.dim() > 1 or isinstance(self.model, nn.Linear) else None

    def _of(self, batch: Tensor) -> Tensor:
        if isinstance(self.model, nn.Linear):  # takes any number of axes in front
            flat = batch.reshape(math.prod(batch.shape[:-1]), batch.shape[-1])
            return self.net_for(flat)(flat).reshape(*batch.shape[:-1], self.model.out_features)  # type: ignore[union-attr]
        return self.net_for(batch)(batch)  # type: ignore[return-value]

    def net_for(self, batch: Tensor | np.ndarray) -> CompiledNet:
        """What is compiled for batches of such examples; it takes arrays too, with less ado than `forward`.

        Raises:
            Untraceable: as `compile_sparse`, and where PyTorch would run linear layers or they see several axes:
                compiled by themselves they take any number of places.
        """
        shape = batch.shape[1:]
        if shape not in self.nets:
            graph = compact(trace(self.model, torch.as_tensor(batch)))
            if left := left_to_pytorch(graph, nn.Linear):
                raise Untraceable(f"as a whole, PyTorch would run {', '.join(left)}")
            if anew := [op.name for op in graph.ops if isinstance(op, LinearAtPlaces)]:
                raise Untraceable(f"as a whole, {', '.join(anew)} would be compiled anew for every length")
            self.nets[shape] = compiled(graph, self.threads)
        return self.nets[shape]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles compile anew: machine code and memory belong to one process."""
        return {**self.__dict__, "nets": {}, "_parts": ()}

    def train(self, mode: bool = True) -> "SparseModule":
        """Stays in eval mode: there is nothing left to train."""
        return self


def _forget(module: SparseModule, keys: object) -> None:
    """New weights make another net."""
    module.nets, module._by_layers, module._parts = {}, set(), ()


def layer_by_layer(model: nn.Module, threads: int | None) -> nn.Module:
    """A model with the same parameters, every linear and convolutional layer swapped for one that is compiled by
    itself. Subclasses stay, since they compute something else, and so do layers with hooks."""
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    call_every_layer(model)
    swaps = {layer: SparseModule(layer, threads) for layer in model.modules() if _can_be_swapped(layer)}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if name and layer in swaps:
            model.set_submodule(name, swaps[layer])
    return model


def _can_be_swapped(layer: nn.Module) -> bool:
    return type(layer) in LAYERS and not layer._forward_hooks and not layer._forward_pre_hooks
