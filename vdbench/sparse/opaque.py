"""Operations that always run in PyTorch, and that nothing is known of but what shape they make."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from vdbench.sparse.graph import Graph, Op, Padding, channels_first


@dataclass(frozen=True, kw_only=True)
class Opaque(Op):
    """What reads all of its inputs, whatever becomes of them; it always runs in PyTorch."""


@dataclass(frozen=True, kw_only=True)
class Reshape(Opaque):
    """An example's numbers, in their order, in another shape, where that is no Flatten."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0].reshape(-1, *self.shape)


@dataclass(frozen=True, kw_only=True)
class ChannelsFirst(Opaque):
    """A value with its channels behind, as linear layers take it, (..., channels), as maps (channels, height, width);
    what has one axis in front of them has maps of one row. A view of what lies as `ChannelsLast` leaves it."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return channels_first(inputs[0], self.shape)


@dataclass(frozen=True, kw_only=True)
class ChannelsLast(Opaque):
    """Maps as a value with its channels behind: what `ChannelsFirst` is made of."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0].permute(0, 2, 3, 1).reshape(-1, *self.shape)


@dataclass(frozen=True, kw_only=True)
class Pad(Opaque):
    """Zeros around maps, where no convolution takes them in."""

    padding: Padding

    def __call__(self, *inputs: Tensor) -> Tensor:
        top, bottom, left, right = self.padding
        return functional.pad(inputs[0], (left, right, top, bottom))


@dataclass(frozen=True, kw_only=True)
class Softmax(Opaque):
    """Over the channels; if `log`, its logarithm."""

    log: bool

    def __call__(self, *inputs: Tensor) -> Tensor:
        return (torch.log_softmax if self.log else torch.softmax)(inputs[0], 1)


@dataclass(frozen=True, kw_only=True)
class TorchOp(Opaque):
    """Anything else that works example by example, as a function of batches."""

    function: Callable[..., Tensor] = field(repr=False)
    layers: frozenset[type[nn.Module]] = frozenset()  # the kinds of those in it that have weight matrices
    called: str = "function"  # the name of its class or function, for people to read

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def left_to_pytorch(graph: Graph, *kinds: type[nn.Module]) -> list[str]:
    """The operations that PyTorch runs and that have layers with weight matrices, of these kinds if given."""
    torch_ops = [op for op in graph.ops if isinstance(op, TorchOp) and op.layers]
    return [op.name for op in torch_ops if not kinds or op.layers & {*kinds}]
