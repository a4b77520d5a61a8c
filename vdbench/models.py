"""The networks of the paper, plain `nn.Module`s; `to_variational_dropout` makes them variational."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn


class LeNet300100(nn.Sequential):
    """LeNet-300-100 (LeCun et al. 1998): 784 - 300 - 100 - classes, ReLU between; 266,200 weights for 10 classes.

    Shape: input (N, 1, 28, 28), output logits (N, num_classes).
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(
            OrderedDict(
                flatten=nn.Flatten(),
                fc1=nn.Linear(784, 300),
                relu1=nn.ReLU(),
                fc2=nn.Linear(300, 100),
                relu2=nn.ReLU(),
                fc3=nn.Linear(100, num_classes),
            )
        )


class LeNet5(nn.Sequential):
    """LeNet-5-Caffe as the paper's authors run it: two 5x5 convolutions (20 and 50 filters), each with 2x2 max-pooling
    and ReLU, then 800 - 500 - classes; 430,500 weights for 10 classes.

    Pooling comes before the ReLU: the two commute, and this way round is a quarter of the work.

    Shape: input (N, 1, 28, 28), output logits (N, num_classes).
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(1, 20, 5),
                pool1=nn.MaxPool2d(2),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(20, 50, 5),
                pool2=nn.MaxPool2d(2),
                relu2=nn.ReLU(),
                flatten=nn.Flatten(),
                fc1=nn.Linear(800, 500),
                relu3=nn.ReLU(),
                fc2=nn.Linear(500, num_classes),
            )
        )
        # torch's CPU convolutions and poolings are faster in this memory format; it changes no result
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.contiguous(memory_format=torch.channels_last))


MODELS: dict[str, Callable[[int], nn.Module]] = {"lenet300100": LeNet300100, "lenet5": LeNet5}
