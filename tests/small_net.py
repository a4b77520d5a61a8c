"""A small network with what conversion has to cope with, plain and variational, and what else tests of layers share."""

import torch
from torch import nn

from vdbench.conversion import to_variational_dropout
from vdbench.variational import VariationalDropout, variational_layers

IMAGES = torch.linspace(-1, 1, 3 * 2 * 16).view(3, 2, 4, 4)
WORDS = torch.tensor([[0, 3], [3, 1], [4, 3]])


def randomise(layer: VariationalDropout, low: float = -3.0, high: float = 0.0) -> None:
    with torch.no_grad():
        layer.weight.normal_()
        layer.log_sigma2.uniform_(low, high)
        if layer.bias is not None:
            layer.bias.normal_()


def plain_network(dtype: torch.dtype | None = None) -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect", groups=2, dtype=dtype),
        nn.BatchNorm2d(4, dtype=dtype),
        nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(16, 8, bias=False, dtype=dtype)),
        nn.Linear(8, 5, dtype=dtype),
    )


def network() -> nn.Sequential:
    """A variational one with weights and variances of order 1, some of them over the threshold."""
    net = plain_network()
    to_variational_dropout(net, loga_threshold=2.0)
    for _, layer in variational_layers(net):
        randomise(layer)
    return net
