"""One step of training; on a GPU one launch for all of its kernels."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vdbench.config import DenseRecipe
from vdbench.process import matmul_precision
from vdbench.variational import forward_with_kl, variational_matrices

_WARM_UP = 3  # steps before a graph is captured: libraries set themselves up, and the optimizer its state


def build_optimizer(model: nn.Module, recipe: DenseRecipe) -> torch.optim.Adam:
    """Adam; log_sigma2 is a group of its own, without weight decay.

    On a GPU learning rates are tensors there, so that a captured step takes them as they are set later.
    """
    variances = [matrix.log_sigma2 for _, matrix in variational_matrices(model)]
    known = {id(p) for p in variances}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": recipe.weight_decay}
    ]
    if variances:
        groups.append({"params": variances, "weight_decay": 0.0})
    device = groups[0]["params"][0].device
    if device.type == "cuda":
        for group in groups:
            group["lr"] = torch.tensor(recipe.learning_rate, device=device)
    return torch.optim.Adam(groups, lr=recipe.learning_rate, fused=True, capturable=device.type == "cuda")


def set_learning_rates(optimizer: torch.optim.Adam, rates: Sequence[float]) -> None:
    """Set the rate of every group. Raises ValueError for more or fewer rates than groups."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def load_optimizer_state(optimizer: torch.optim.Adam, state: dict[str, Any]) -> None:
    """As `optimizer.load_state_dict`, but for the learning rates, which are set anew every epoch."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


class Step:
    """Forward pass, loss, gradients and Adam.

    On a GPU a step is captured in a CUDA graph, the fourth as a rule, and replayed from then on where
    what it is given has the same shapes: it is some hundreds of kernels, and launching them one by one takes longer
    than they do. On images its products are bfloat16 under autocast, where the recipe asks for nothing else. It never
    waits for the device.

    Args:
        model: in training mode when a step is taken, on one device.
        optimizer: of `build_optimizer`, for this model.
        recipe: for its matmul_precision and gradient_clip.
        loss: of what the model returns and the targets, in nats.
        variational: whether the model has a KL divergence for the loss.

    Attributes:
        totals: (2,) class loss and KL divergence in nats, summed over the steps since it was last set to zero.
        kl_scale: scalar, the factor of the KL divergence in the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Adam,
        recipe: DenseRecipe,
        loss: Callable[[Any, Tensor], Tensor],
        variational: bool,
    ) -> None:
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        self.loss, self.variational = loss, variational
        device = next(model.parameters()).device
        self.on_gpu = device.type == "cuda"
        self.totals, self.kl_scale = torch.zeros(2, device=device), torch.zeros((), device=device)
        self._taken, self._shapes, self._graph = 0, [], None  # steps so far, what the last one was given
        self._given: list[Tensor] = []  # what the graph reads

    def __call__(self, inputs: tuple[Any, ...], targets: Tensor) -> None:
        """Take a step.

        Args:
            inputs: what the model is called with: images (N, C, H, W), or words and the state before them.
            targets: what it ought to say.
        """
        if not self.on_gpu:
            self.take(inputs, targets)
            return
        if self._graph is None:
            self._until_captured(inputs, targets)
        elif self.replays(inputs, targets):
            for place, value in zip(self._given, _tensors((inputs, targets)), strict=True):
                place.copy_(value)
            self._graph.replay()
        else:  # the last piece of a text, which is shorter
            self.take(inputs, targets)

    def replays(self, inputs: tuple[Any, ...], targets: Tensor) -> bool:
        """Whether there is a captured step for what has these shapes."""
        return [t.shape for t in self._given] == [t.shape for t in _tensors((inputs, targets))]

    def take(self, inputs: tuple[Any, ...], targets: Tensor) -> None:
        """A step, operation by operation."""
        autocasts = self.on_gpu and self.recipe.matmul_precision is None and inputs[0].is_floating_point()
        with matmul_precision(self.recipe.matmul_precision):
            with torch.autocast("cuda", torch.bfloat16) if autocasts else nullcontext():
                if self.variational:
                    output, kl = forward_with_kl(self.model, *inputs)
                    class_loss = self.loss(output, targets)
                    loss = class_loss + self.kl_scale * kl
                    self.totals[1] += kl.detach()
                else:
                    loss = class_loss = self.loss(self.model(*inputs), targets)
            self.totals[0] += class_loss.detach()
            self.optimizer.zero_grad()
            loss.backward()
            if self.recipe.gradient_clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip)
            self.optimizer.step()

    def _until_captured(self, inputs: tuple[Any, ...], targets: Tensor) -> None:
        shapes = [t.shape for t in _tensors((inputs, targets))]
        if self._taken < _WARM_UP or shapes != self._shapes:  # in a stream of its own, as what is captured will be
            self._taken, self._shapes = self._taken + 1, shapes
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.take(inputs, targets)
            torch.cuda.current_stream().wait_stream(stream)
            return
        inputs, targets = _copied((inputs, targets))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.take(inputs, targets)
        self._graph, self._given = graph, _tensors((inputs, targets))
        graph.replay()


def _tensors(value: Any) -> list[Tensor]:
    """Of nested tuples, in which None stands for nothing."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value or () for tensor in _tensors(part)]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value and tuple(_copied(part) for part in value)
