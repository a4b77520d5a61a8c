"""From a module to a graph: chains of the layers that our own networks are made of."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from vdbench.sparse.graph import Affine, Clip, Conv2d, Flatten, Graph, Input, Linear, MaxPool2d, Op


def _array(tensor: Tensor | None, size: int) -> np.ndarray:
    return np.zeros(size, np.float32) if tensor is None else tensor.detach().numpy()


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in model.named_modules():
        if not list(layer.children()):
            yield name or "layer", layer


@torch.no_grad()
def trace(model: nn.Module, example: Tensor) -> Graph:
    ops: list[Op] = [Input(name="input", shape=tuple(example.shape[1:]))]
    value = example
    for name, layer in _leaves(model):
        if isinstance(layer, nn.Dropout | nn.Dropout2d | nn.Identity):
            continue
        value = layer(value)
        known = {"name": name, "inputs": (ops[-1].name,), "shape": tuple(value.shape[1:])}
        ops.append(_op(layer, known))
    return Graph(tuple(ops))


def _op(layer: nn.Module, known: dict) -> Op:
    match layer:
        case nn.Linear():
            return Linear(**known, weight=layer.weight.detach().numpy(), bias=_array(layer.bias, layer.out_features))
        case nn.Conv2d():
            top, left = layer.padding
            return Conv2d(
                **known,
                weight=layer.weight.detach().numpy(),
                bias=_array(layer.bias, layer.out_channels),
                stride=layer.stride,
                padding=(top, top, left, left),
                dilation=layer.dilation,
                groups=layer.groups,
            )
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            scale = layer.weight / torch.sqrt(layer.running_var + layer.eps)
            return Affine(**known, scale=scale.numpy(), shift=(layer.bias - layer.running_mean * scale).numpy())
        case nn.ReLU():
            return Clip(**known)
        case nn.MaxPool2d():
            return MaxPool2d(**known, kernel=(layer.kernel_size,) * 2, stride=(layer.stride,) * 2)
        case nn.Flatten():
            return Flatten(**known)
    raise NotImplementedError(type(layer).__name__)
