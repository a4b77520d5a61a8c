"""Nets that are timed without having been trained: random weights, of which a stated share is left."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from vdbench import metrics
from vdbench.baselines import GradualPruner
from vdbench.config_timing import CaseSpec
from vdbench.models import LeNet5, LeNet300100, VGGLike

Shape = tuple[int, ...]


def _convolution(channels: int, size: int) -> tuple[nn.Module, Shape]:
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(layer=layer)), (channels, size, size)


def _linear(inputs: int, outputs: int) -> tuple[nn.Module, Shape]:
    return nn.Sequential(OrderedDict(layer=nn.Linear(inputs, outputs))), (inputs,)


NETS: dict[str, Callable[..., tuple[nn.Module, Shape]]] = {
    "lenet300100": lambda: (LeNet300100(), LeNet300100.input_shape),
    "lenet5": lambda: (LeNet5(), LeNet5.input_shape),
    "vgglike": lambda width: (VGGLike(width=width), VGGLike.input_shape),
    "conv3x3": _convolution,
    "linear": _linear,
}


def build(spec: CaseSpec) -> tuple[nn.Module, Shape]:
    """The net, in eval mode, and the shape of one example. The same spec gives the same net.

    Weights are drawn so that an example does not fade on its way through few of them, and statistics of batch
    normalisation are such that it changes something: engines are then compared on outputs that depend on everything.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    model, shape = NETS[spec.model](**spec.arguments)
    model.eval()
    weights = metrics.weights(model)
    kept = {name: max(1, round(spec.densities[name] * weight.numel())) for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            inputs_left = kept[name] / len(weight)
            weight.normal_(0, (2 / inputs_left) ** 0.5, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for centred in (module.bias, module.running_mean):
                    centred.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
                for positive in (module.weight, module.running_var):
                    positive.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    GradualPruner(model, kept, generator).update(1.0)
    return model, shape
