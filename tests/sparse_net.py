"""A small net for tests of the sparse engine."""

import torch
from torch import nn

EXAMPLE = torch.zeros(1, 2, 10, 10)


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
