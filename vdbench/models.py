"""The networks, plain `nn.Module`s; `to_variational_dropout` makes them variational."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vdbench.config import VGG_WIDTHS
from vdbench.language import LANGUAGE_MODELS


class LeNet300100(nn.Sequential):
    """LeNet-300-100 (LeCun et al. 1998): 784 - 300 - 100 - classes, ReLU between; 266,200 weights for 10 classes.

    Shape: input (N, 1, 28, 28), output logits (N, num_classes).
    """

    input_shape = (1, 28, 28)

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

    input_shape = (1, 28, 28)

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


VGG_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# of the dense net, after each convolution but those that end a block, and after the first fully connected layer
VGG_DROPOUT = ((0.3,), (0.4,), (0.4, 0.4), (0.4, 0.4), (0.4, 0.4))
VGG_DROPOUT_FC = 0.5


class VGGLike(nn.Sequential):
    """The VGG-like net of the paper (Zagoruyko 2015): thirteen 3x3 convolutions in five blocks, each ending in 2x2
    max-pooling, then 512 - classes; batch normalisation and ReLU after every layer but the last; 14,977,728 weights
    for 10 classes.

    Args:
        width: scales the number of filters and units of every layer but the last; 0.25 to 1.5 in the paper.

    Shape: input (N, 3, 32, 32), output logits (N, num_classes).
    """

    input_shape = (3, 32, 32)

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = self.input_shape[0]
        for block, (sizes, rates) in enumerate(zip(VGG_BLOCKS, VGG_DROPOUT, strict=True), start=1):
            for place, size in enumerate(sizes, start=1):
                name, outputs = f"{block}_{place}", round(size * width)
                layers[f"conv{name}"] = nn.Conv2d(inputs, outputs, 3, padding=1)
                layers[f"bn{name}"] = nn.BatchNorm2d(outputs, eps=1e-3)
                layers[f"relu{name}"] = nn.ReLU()
                if place <= len(rates):
                    layers[f"dropout{name}"] = nn.Dropout(rates[place - 1])
                inputs = outputs
            layers[f"pool{block}"] = nn.MaxPool2d(2)
        hidden = round(512 * width)
        layers |= OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(inputs, hidden),
            bn_fc1=nn.BatchNorm1d(hidden, eps=1e-3),
            relu_fc1=nn.ReLU(),
            dropout_fc1=nn.Dropout(VGG_DROPOUT_FC),
            fc2=nn.Linear(hidden, num_classes),
        )
        super().__init__(layers)


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set the rate of every dropout layer of a model, and of dropout between recurrent layers. Where weights are
    variational it is usually 0, as in this project's recipes."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = rate
        elif isinstance(module, nn.RNNBase) and module.num_layers > 1:
            module.dropout = rate


MODELS: dict[str, Callable[[int], nn.Module]] = {"lenet300100": LeNet300100, "lenet5": LeNet5}
MODELS |= {name: partial(VGGLike, width=width) for name, width in VGG_WIDTHS.items()} | LANGUAGE_MODELS
