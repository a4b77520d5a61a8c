"""PyTorch without sparse kernels."""

import copy

import numpy as np
import torch
from torch import Tensor, fx, nn

from vdbench.sparse.graph import Graph
from vdbench.sparse.peers.common import Run, compacted, require, through_torch


def torch_dense(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """PyTorch, zeros and all."""
    return through_torch(model)


def torch_channels_last(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """The same with images and kernels in the memory format in which the channels of a pixel are adjacent."""
    require(model, nn.Conv2d)
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images).contiguous(memory_format=torch.channels_last)).numpy()

    return run


class _Operations(nn.Module):
    def __init__(self, operations: Graph) -> None:
        super().__init__()
        self.operations = operations

    def forward(self, input: Tensor) -> Tensor:
        return self.operations(input)


def torch_compacted(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """PyTorch on the net without its dead units."""
    # traced, so that arrays become tensors once and not at every call
    return through_torch(fx.symbolic_trace(_Operations(compacted(model, example))))
