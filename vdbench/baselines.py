"""Gradual pruning, the baseline: sparsity rises while the net trains on (Zhu and Gupta 2017, arXiv 1710.01878)."""

import torch
from torch import Tensor, nn

from vdbench import metrics


def gradual_sparsity(final: float, progress: float) -> float:
    """The sparsity at `progress` in [0, 1] of the pruning phase: final * (1 - (1 - progress)^3), equation 1."""
    return final * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)


class GradualPruner:
    """Keeps the highest scores of every layer, ever fewer of them, until `kept[layer]` weights are left.

    The scores are the weights' magnitudes, or, for the control, random numbers drawn once: the same schedule with
    the same proportions in every layer, so that nothing but the choice of weights differs.

    Args:
        model: a dense net; its weights are masked in place.
        kept: weights to keep at the end, by layer name.
        generator: draws random scores; None scores by magnitude.

    Raises:
        ValueError: `kept` names other layers than the model has.
    """

    def __init__(self, model: nn.Module, kept: dict[str, int], generator: torch.Generator | None = None) -> None:
        found = metrics.weights(model)
        if found.keys() != kept.keys():
            raise ValueError(f"the net has layers {list(found)}, the one it is matched to {list(kept)}")
        self.kept = kept
        self.weights: dict[str, Tensor] = found
        self.scores = {
            name: torch.rand(weight.shape, generator=generator).to(weight.device)
            for name, weight in found.items()
            if generator is not None
        }
        self.masks = {name: torch.ones_like(weight) for name, weight in found.items()}

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """Choose the masks for this point of the pruning phase and apply them. A removed weight never returns."""
        for name, weight in self.weights.items():
            score = self.scores.get(name, weight.abs()).where(self.masks[name] > 0, -1.0)
            total = weight.numel()
            left = total - round(gradual_sparsity(total - self.kept[name], progress))
            kept = score.flatten().topk(left).indices
            mask = torch.zeros(total, dtype=weight.dtype, device=weight.device)
            self.masks[name] = mask.index_fill_(0, kept, 1.0).view(weight.shape)
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the removed weights again, after an optimizer step moved them."""
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])
