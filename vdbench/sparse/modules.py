"""The function call that each of PyTorch's modules stands for in eval mode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import type_before_parametrizations

from vdbench.variational import VariationalDropoutConv2d, VariationalDropoutLinear

Call = tuple[Any, ...]  # a function and its arguments after the input


def _convolution(layer: nn.Conv1d | nn.Conv2d, weight: Tensor) -> Call | None:
    if layer.padding_mode != "zeros":
        return None
    function = functional.conv1d if isinstance(layer, nn.Conv1d) else functional.conv2d
    return function, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups


def _normalisation(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> Call:
    statistics = layer.running_mean, layer.running_var
    return functional.batch_norm, *statistics, layer.weight, layer.bias, False, 0.0, layer.eps


def _maximum(pool: nn.MaxPool1d | nn.MaxPool2d) -> Call:
    function = functional.max_pool1d if isinstance(pool, nn.MaxPool1d) else functional.max_pool2d
    return function, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode


def _average(pool: nn.AvgPool1d | nn.AvgPool2d) -> Call:
    how = pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad
    if isinstance(pool, nn.AvgPool1d):
        return functional.avg_pool1d, *how
    return functional.avg_pool2d, *how, pool.divisor_override


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

_CALLS: dict[type[nn.Module], Callable[[Any], Call | None]] = {
    nn.Linear: lambda m: (functional.linear, m.weight, m.bias),
    VariationalDropoutLinear: lambda m: (functional.linear, m.masked_weight(), m.bias),
    nn.Conv1d: lambda m: _convolution(m, m.weight),
    nn.Conv2d: lambda m: _convolution(m, m.weight),
    VariationalDropoutConv2d: lambda m: _convolution(m, m.masked_weight()),
    nn.BatchNorm1d: _normalisation,
    nn.BatchNorm2d: _normalisation,
    nn.ReLU: lambda m: (functional.relu,),
    nn.ReLU6: lambda m: (functional.relu6,),
    nn.Hardtanh: lambda m: (functional.hardtanh, m.min_val, m.max_val),
    nn.LeakyReLU: lambda m: (functional.leaky_relu, m.negative_slope),
    nn.Tanh: lambda m: (torch.tanh,),
    nn.Sigmoid: lambda m: (torch.sigmoid,),
    nn.SiLU: lambda m: (functional.silu,),
    nn.GELU: lambda m: (functional.gelu, m.approximate),
    nn.ELU: lambda m: (functional.elu, m.alpha),
    nn.Hardsigmoid: lambda m: (functional.hardsigmoid,),
    nn.Hardswish: lambda m: (functional.hardswish,),
    nn.Softmax: lambda m: (torch.softmax, m.dim),
    nn.LogSoftmax: lambda m: (torch.log_softmax, m.dim),
    nn.MaxPool1d: _maximum,
    nn.MaxPool2d: _maximum,
    nn.AvgPool1d: _average,
    nn.AvgPool2d: _average,
    nn.AdaptiveAvgPool1d: lambda m: (functional.adaptive_avg_pool1d, m.output_size),
    nn.AdaptiveMaxPool1d: lambda m: (functional.adaptive_max_pool1d, m.output_size),
    nn.AdaptiveAvgPool2d: lambda m: (functional.adaptive_avg_pool2d, m.output_size),
    nn.AdaptiveMaxPool2d: lambda m: (functional.adaptive_max_pool2d, m.output_size),
    nn.Flatten: lambda m: (torch.flatten, m.start_dim, m.end_dim),
    nn.Unflatten: lambda m: (torch.unflatten, m.dim, m.unflattened_size),
    nn.ZeroPad2d: lambda m: (functional.pad, m.padding),
    nn.Identity: lambda m: ("contiguous",),
    **dict.fromkeys(_DROPOUTS, lambda m: (functional.dropout, m.p, False)),
}


def is_known(module: nn.Module) -> bool:
    return type(module) in _CALLS


def call_of(module: nn.Module) -> Call | None:
    """What a module calls; None where it is none of these, or pads with something else than zeros."""
    kind = type_before_parametrizations(module)
    return _CALLS[kind](module) if kind in _CALLS else None
