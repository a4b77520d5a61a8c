"""What a model and an example must be to be traced, and whether a graph computes what its model does."""

import torch
from torch import Tensor, nn

from vdbench.mistakes import first_line
from vdbench.sparse.graph import Graph

TOLERANCE = 1e-4  # of the largest output


class Untraceable(ValueError):
    """A model that is no fixed sequence of operations on single examples, or that could not be read as one."""


class Refused(Untraceable):
    """Examples that the model itself does not take, or in which there is nothing."""


def check(model: nn.Module, example: Tensor) -> None:
    """Raises TypeError or ValueError for a model or an example that `trace` does not take, and says what to do."""
    if not isinstance(example, Tensor) or example.dtype != torch.float32:
        what = f"a tensor of {example.dtype}" if isinstance(example, Tensor) else f"a {type(example).__name__}"
        words = "; models of numbered words go to to_cpu_sparse(model)" if what.endswith("int64") else ""
        raise TypeError(
            f"the example is {what}: give a float32 tensor with a batch axis, like the model's input{words}"
        )
    if example.dim() < 2:
        raise ValueError(f"the example of shape {tuple(example.shape)} has no batch axis: add one with [None]")
    if 0 in example.shape[1:]:
        raise Refused(f"examples of shape {tuple(example.shape[1:])} have no numbers to compute anything from")
    check_parameters(model)
    if training := [name or type(model).__name__ for name, module in model.named_modules() if module.training]:
        raise ValueError(f"{training[0]} is in training mode: call model.eval()")
    if empty := [name for name, parameter in model.named_parameters() if not parameter.numel()]:
        raise Untraceable(f"{empty[0]} has no numbers")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that `nn.DataParallel` or its like was given."""
    return model.module if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else model


def check_parameters(model: nn.Module) -> None:
    """Raises TypeError for what is no module, ValueError for a model of TorchScript, or that is not on the CPU, not
    float32, without weights yet or holds NaN or infinity."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}: give an nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            which = name or "the model"
            raise ValueError(f"{which} is TorchScript, which hides its layers: give the original module instead")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"{name} has no numbers yet: run one batch through the model first")
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype} on {parameter.device}: move the model with .cpu().float()")
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds NaN or infinity: the model has diverged or is damaged")


def check_output(model: nn.Module, batch: Tensor) -> None:
    """Raises Refused for a model that does not take such examples, Untraceable unless it makes one result of each."""
    try:
        together, alone = model(batch.clone()), model(batch[:1].clone())
    except Exception as error:
        shape = tuple(batch.shape[1:])
        raise Refused(f"the model does not take 1 and 2 examples of shape {shape}: {first_line(error)}") from error
    if not isinstance(together, Tensor) or together.dtype != torch.float32:
        what = f"a tensor of {together.dtype}" if isinstance(together, Tensor) else f"a {type(together).__name__}"
        raise Untraceable(f"the model returns {what}, not one float32 tensor")
    shapes = tuple(together.shape), tuple(alone.shape)
    if shapes != ((2, *shapes[0][1:]), (1, *shapes[0][1:])):
        raise Untraceable(
            f"the model's output, {shapes[0]} for 2 examples and {shapes[1]} for 1, is not one an example"
        )


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether they have the same shape and differ by 1e-4 of the largest number at most."""
    if found.shape != expected.shape:
        return False
    return expected.numel() == 0 or bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def verify(graph: Graph, model: nn.Module, batch: Tensor) -> None:
    """Check a graph against its model on a batch and on each of the examples: a net under misread operations.

    Raises:
        Untraceable: they differ by more than 1e-4 of the largest output, or the model's outputs do among themselves.
    """
    expected = torch.cat([model(example[None].clone()) for example in batch])
    if not expected.isfinite().all():
        raise Untraceable("the model gives NaN or infinity for normally distributed examples")
    if not close(model(batch.clone()), expected):
        raise Untraceable("the model's output for an example depends on the rest of the batch, or on chance")
    if not close(graph(batch.clone()), expected):
        raise Untraceable("the traced operations do not compute what the model computes: one does more than it shows")
