"""Small nets for tests of the sparse engine."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

EXAMPLE = torch.zeros(1, 2, 10, 10)


class Calls(nn.Module):
    """A function as a model, with parameters for it to call with."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        self.names = list(parameters)
        for name, parameter in parameters.items():
            self.register_parameter(name, nn.Parameter(parameter))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *(getattr(self, name) for name in self.names))


def network(density: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 20),
        nn.ReLU(),
        nn.Linear(20, 3),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data *= torch.rand_like(layer.weight) < density
    model[1].running_mean.normal_()
    return model.eval()


def assert_same(out, expected) -> None:
    assert out.shape == expected.shape
    assert (torch.as_tensor(out) - expected).abs().max() <= 1e-5 * expected.abs().max()
