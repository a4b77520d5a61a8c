"""What is measured of a network: error, sparsity, compression and multiply-adds."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vdbench.netfile import parameter_name
from vdbench.records import Layer, MultiplyAdds, Size, Work
from vdbench.variational import VariationalDropout, weight_name

EVALUATION_BATCH = 1000


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight tensor every `nn.Linear`, `nn.Conv2d` and `nn.Embedding` computes with in eval mode, by layer name,
    and every weight matrix of every recurrent layer, by layer and matrix: `lstm.weight_hh_l0`.

    Variational layers are masked at their threshold; in others a removed weight is a zero. Biases, normalisation
    and `log_sigma2` are not weights.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, VariationalDropout):
            for matrix in module.matrices():
                found[weight_name(name, matrix.name)] = matrix.masked(module.loga_threshold).detach()
        elif isinstance(module, nn.RNNBase):
            for part, weight in module.named_parameters():
                if part.startswith("weight"):
                    found[weight_name(name, part)] = weight.detach()
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            found[name] = module.weight.detach()
    return found


def layers(model: nn.Module) -> list[Layer]:
    """Total and nonzero weights of every layer; what several share is the first one's."""
    found: list[Layer] = []
    owned: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
    for name, weight in weights(model).items():
        owned.setdefault((weight.data_ptr(), weight.shape), (name, weight))
    for name, weight in owned.values():
        nonzero, total = int(torch.count_nonzero(weight)), weight.numel()
        found.append(
            Layer(name=name, shape=list(weight.shape), total=total, nonzero=nonzero, sparsity=1 - nonzero / total)
        )
    return found


def size(model: nn.Module) -> Size:
    """Weights, nonzero weights and their ratio over all layers that `weights` knows; whatever else is learned counts
    among the biases. Raises ValueError for a model without such a layer."""
    counted = layers(model)
    if not counted:
        raise ValueError(f"{type(model).__name__} has no linear, convolutional, embedding or recurrent layer")
    total, nonzero = sum(layer.total for layer in counted), sum(layer.nonzero for layer in counted)
    named = {parameter_name(layer.name) for layer in counted}
    biases = sum(p.numel() for n, p in model.named_parameters() if n not in named and not n.endswith("log_sigma2"))
    return Size(
        weights=total,
        nonzero_weights=nonzero,
        biases=biases,
        sparsity=1 - nonzero / total,
        compression_ratio=compression_ratio(total, nonzero),
    )


def compression_ratio(total: int, nonzero: int) -> float:
    """|W| / |W != 0|; a net without weights left counts as one with one left, so that the ratio stays a number."""
    return total / max(nonzero, 1)


def sparsity(model: nn.Module) -> float:
    """Zeros / total over the weights of all linear, `nn.Conv2d`, embedding and recurrent layers, variational or not.
    Raises ValueError for a model without any."""
    return size(model).sparsity


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the block; after it every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _observe(model: nn.Module, example: Tensor, hooks: dict[str, Callable[..., None]]) -> None:
    """Run the model once in eval mode with a forward hook on each named layer."""
    owners = {name: parameter_name(name).rpartition(".")[0] for name in hooks}
    handles = [model.get_submodule(owners[name]).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        with torch.no_grad(), evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()


def multiply_adds(model: nn.Module, example: Tensor) -> MultiplyAdds:
    """Multiply-adds for one example, dense and with the zeros left out (each weight times its output positions). An
    embedding looks up and multiplies nothing.

    Args:
        example: an input of batch size 1; one word for a language model.
    """
    positions: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.RNNBase):
                met = args[0].shape[:-1].numel()
            elif isinstance(module, nn.Embedding):
                met = 0
            else:
                met = output[0].numel() // output.shape[1 if isinstance(module, nn.Conv2d) else -1]
            positions[name] = positions.get(name, 0) + met

        return hook

    found = weights(model)
    _observe(model, example, {name: count(name) for name in found})
    dense = sum(weight.numel() * positions.get(name, 0) for name, weight in found.items())
    left = sum(int(torch.count_nonzero(weight)) * positions.get(name, 0) for name, weight in found.items())
    return MultiplyAdds(dense=dense, left=left, theoretical_speedup=dense / max(left, 1))


def work(model: nn.Module, example: Tensor) -> Work:
    """What the nonzero weights ask for. Unlike `multiply_adds`, it leaves out products with a convolution's padding.

    Args:
        example: an input of batch size 1.
    """
    found = weights(model)
    totals = {"multiply_adds": 0, "values": 0, "weights": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor], output: Tensor) -> None:
            mask = (found[name] != 0).double()
            ones = torch.ones_like(args[0], dtype=torch.double)
            if isinstance(module, nn.Conv2d):
                shape = (module.stride, module.padding, module.dilation, module.groups)
                met = functional.conv2d(ones, mask, None, *shape)  # type: ignore[call-overload]
            else:
                met = functional.linear(ones, mask)
            totals["multiply_adds"] += round(float(met.sum()))
            totals["values"] += args[0].numel() + output.numel()
            totals["weights"] += int(mask.sum())

        return hook

    _observe(model, example, {name: count(name) for name in found})
    return Work(**totals)


EVALUATION_WORDS = 2000  # in one call


@torch.no_grad()
def text_cross_entropy(model: nn.Module, words: Tensor) -> float:
    """Mean cross-entropy in nats of every word but the first, each after all the words before it, in eval mode; the
    training mode is restored. Its exponential is the perplexity.

    Args:
        words: (N,) int64, on the same device as the model.
    """
    total, state = 0.0, None
    with evaluating(model):
        for start in range(0, len(words) - 1, EVALUATION_WORDS):
            piece = words[start : start + EVALUATION_WORDS + 1]
            logits, state = model(piece[:-1, None], state)
            total += float(functional.cross_entropy(logits[:, 0], piece[1:], reduction="sum"))
    return total / (len(words) - 1)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Error, top-5 error (percent) and mean cross-entropy (nats) in eval mode; the training mode is restored.

    Args:
        images: (N, C, H, W) float. labels: (N,) int64, on the same device as the model.
    """
    wrong = wrong5 = 0
    cross_entropy = 0.0
    with evaluating(model):
        for start in range(0, len(labels), EVALUATION_BATCH):
            target = labels[start : start + EVALUATION_BATCH]
            logits = model(images[start : start + EVALUATION_BATCH])
            top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
            wrong += len(target) - int(top5[:, 0].sum())
            wrong5 += len(target) - int(top5.sum())
            cross_entropy += float(functional.cross_entropy(logits, target, reduction="sum"))
    count = len(labels)
    return {"error": 100 * wrong / count, "top5_error": 100 * wrong5 / count, "cross_entropy": cross_entropy / count}
