"""What a net is trained to do: its batches, its loss and how it is measured. The training loop is the same for all."""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from vdbench import metrics
from vdbench.batchnorm import normalised_by_averages, reestimate
from vdbench.config import DenseRecipe, RunSpec
from vdbench.data import Dataset
from vdbench.schedules import derived_seed
from vdbench.text import Text

SEQUENCE_LENGTH = 35


class Task(Protocol):
    """One way to train on one data set."""

    measures: tuple[str, ...]  # what is kept of `evaluate`, first what the net is judged by: the smaller the better
    num_examples: int  # what the KL divergence is divided by

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        ...

    def batches(self, epoch: int) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        """What a model is called with and what it ought to say, step by step."""
        ...

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """Mean cross-entropy of a batch, in nats."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The measures of a model on the data to evaluate on, `cross_entropy` among them. Statistics of batch
        normalisation are estimated anew for it; what the error is without that is `error_running_averages`."""
        ...


class Classification:
    """Images in a new order every epoch, the incomplete last batch dropped."""

    measures: tuple[str, ...] = ("error", "error_running_averages")

    def __init__(self, data: Dataset, spec: RunSpec) -> None:
        self.data, self.batch_size, self.seed = data, spec.recipe.batch_size, spec.seed
        self.augment = bool(spec.augment)
        self.num_examples = len(data.train_labels)

    @property
    def steps(self) -> int:
        return self.num_examples // self.batch_size

    def batches(self, epoch: int) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        device, augmentation = self.data.train_labels.device, None
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        order = torch.randperm(self.num_examples, generator=generator).to(device)
        if self.augment:
            augmentation = torch.Generator(device).manual_seed(derived_seed(self.seed, "augmentation", epoch))
        for step in range(self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            images, labels = self.data.train_batch(batch, augmentation)
            yield (images,), labels

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        return functional.cross_entropy(output, targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        if not normalised_by_averages(model):
            return evaluate(model, self.data)
        before = evaluate(model, self.data)["error"]
        reestimate(model, self.data)
        return {**evaluate(model, self.data), "error_running_averages": before}


class LanguageModelling:
    """A text as `batch_size` columns of words, each read from top to bottom once an epoch in pieces of
    `sequence_length`. The state after one piece is where the next begins; gradients end there (truncated
    backpropagation through time). An epoch begins without a state, so that it needs nothing of the one before."""

    measures: tuple[str, ...] = ("perplexity",)

    def __init__(self, data: Text, recipe: DenseRecipe) -> None:
        self.data, self.length = data, recipe.sequence_length or SEQUENCE_LENGTH
        self.num_examples = len(data.train_words)
        rows = (self.num_examples - 1) // recipe.batch_size
        words = data.train_words[: rows * recipe.batch_size + 1]
        self.words, self.next = (
            part.view(recipe.batch_size, rows).t().contiguous() for part in (words[:-1], words[1:])
        )
        self.state: tuple[Tensor, ...] = ()  # of an RNN one tensor, of an LSTM two; none before the first step

    @property
    def steps(self) -> int:
        return -(-len(self.words) // self.length)

    def batches(self, epoch: int) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        for part in self.state:
            part.zero_()
        for start in range(0, len(self.words), self.length):
            piece = slice(start, start + self.length)
            yield (self.words[piece], self._given()), self.next[piece]

    def _given(self) -> Any:
        """A copy of the state, for the next takes its place before the gradients are computed; None where there is none
        yet."""
        parts = tuple(part.clone() for part in self.state)
        return parts if len(parts) > 1 else next(iter(parts), None)

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        from vdbench.cross_entropy import cross_entropy  # numba is slow to import, and images need none of it

        logits, state = output
        parts = tuple(part.detach() for part in (state if isinstance(state, tuple) else (state,)))
        if self.state:
            for place, part in zip(self.state, parts, strict=True):
                place.copy_(part)  # where a captured step finds it again
        else:
            self.state = tuple(part.clone() for part in parts)
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return evaluate(model, self.data)


def task(data: Dataset | Text, spec: RunSpec) -> Task:
    """The task that a data set is for."""
    return LanguageModelling(data, spec.recipe) if isinstance(data, Text) else Classification(data, spec)


def evaluate(model: nn.Module, data: Dataset | Text) -> dict[str, float]:
    """What a net is worth on the data to evaluate on: see `metrics.evaluate` and `metrics.text_cross_entropy`."""
    if isinstance(data, Text):
        cross_entropy = metrics.text_cross_entropy(model, data.eval_words)
        return {"perplexity": math.exp(min(cross_entropy, 700.0)), "cross_entropy": cross_entropy}
    return metrics.evaluate(model, data.eval_images, data.eval_labels)
