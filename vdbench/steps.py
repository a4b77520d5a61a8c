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

    On a GPU a step on images is captured in a CUDA graph when it is taken for the fourth time, and replayed from then
    on: it is some hundreds of kernels, and launching them one by one takes longer than they do. Its products are
    bfloat16 under autocast, where the recipe asks for nothing else. It never waits for the device.

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
        self._taken, self._graph, self._given = 0, None, ()

    def __call__(self, inputs: tuple[Any, ...], targets: Tensor) -> None:
        """Take a step.

        Args:
            inputs: what the model is called with: images (N, C, H, W), or words and the state before them.
            targets: what it ought to say.

        Raises:
            ValueError: images of another shape than those of the captured step.
        """
        if self.on_gpu and len(inputs) == 1:
            self._on_gpu(inputs[0], targets)
        else:
            self.take(inputs, targets)

    def take(self, inputs: tuple[Any, ...], targets: Tensor, autocast: bool = False) -> None:
        """A step, operation by operation."""
        with matmul_precision(self.recipe.matmul_precision):
            with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
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

    def _on_gpu(self, images: Tensor, targets: Tensor) -> None:
        autocast = self.recipe.matmul_precision is None
        if self._graph is not None:
            for place, value in zip(self._given, (images, targets), strict=True):
                if place.shape != value.shape:
                    raise ValueError(f"a step was captured for {tuple(place.shape)} and is given {tuple(value.shape)}")
                place.copy_(value)
            self._graph.replay()
            return
        if self._taken < _WARM_UP:  # in a stream of its own, as what is captured will be
            self._taken += 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.take((images,), targets, autocast)
            torch.cuda.current_stream().wait_stream(stream)
            return
        self._given = images.clone(), targets.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.take((self._given[0],), self._given[1], autocast)
        self._graph.replay()
