"""The mixin that gives a classifier variational dropout, its loss and its statistics."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from vdbench import metrics
from vdbench.conversion import to_variational_dropout
from vdbench.variational import forward_with_kl, variational_layers


class VariationalDropoutChain(nn.Module):
    """Adds variational dropout to a classifier: `class VGG16VD(VariationalDropoutChain, VGG16): pass`.

    Args:
        *args, **kwargs: passed on to the classifier.
        num_examples: size of the training set; the KL divergence of the loss is divided by it.
        warm_up: how much the KL weight rises with every `calc_loss` in training mode, from 0 to 1; 0 for a weight of
            1 from the start.

    Attributes:
        kl_weight: the present KL weight. It is not part of the state dict.
    """

    def __init__(self, *args: Any, num_examples: int | None = None, warm_up: float = 1e-4, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not warm_up >= 0:
            raise ValueError(f"warm_up is a rise of the KL weight a step, not {warm_up}")
        self.num_examples = num_examples
        self.warm_up = warm_up
        self.kl_weight = 0.0 if warm_up else 1.0
        self._class_loss = self._kl = torch.zeros(())

    def to_variational_dropout(self, **options: Any) -> Self:
        """Make the layers variational, in place; options as the function of that name."""
        to_variational_dropout(self, **options)
        return self

    def calc_loss(self, x: Tensor, t: Tensor) -> Tensor:
        """Mean cross-entropy, plus the weighted KL divergence a training example once the layers are variational.

        Args:
            x: what the classifier takes. t: (N,) int64 classes.

        Raises:
            ValueError: the layers are variational and `num_examples` is not known.
        """
        if not any(True for _ in variational_layers(self)):
            loss = functional.cross_entropy(self(x), t)
            self._class_loss = loss.detach()
            return loss
        if self.num_examples is None or self.num_examples < 1:
            raise ValueError("the KL divergence is divided by the size of the training set: set num_examples")
        logits, kl = forward_with_kl(self, x)
        class_loss = functional.cross_entropy(logits, t)
        if self.training and self.warm_up:
            self.kl_weight = min(1.0, self.kl_weight + self.warm_up)
        self._class_loss, self._kl = class_loss.detach(), kl.detach()
        return class_loss + self.kl_weight / self.num_examples * kl

    @torch.no_grad()
    def training_statistics(self) -> dict[str, float]:
        """Of the last `calc_loss`: class_loss and kl (nats), kl_weight; of the weights now: mean_p (mean dropout rate),
        sparsity (share with a dropout rate over p_threshold), compression_ratio (|W| / |W != 0| after masking).

        Raises:
            ValueError: no layer is variational.
        """
        layers = [layer for _, layer in variational_layers(self)]
        if not layers:
            raise ValueError("no layer is variational yet: call to_variational_dropout() first")
        rates = [torch.cat([torch.sigmoid(m.log_alpha()).flatten() for m in layer.matrices()]) for layer in layers]
        dropped = sum(int((p > layer.p_threshold).sum()) for p, layer in zip(rates, layers, strict=True))
        every = torch.cat(rates)
        return {
            "class_loss": float(self._class_loss),
            "kl": float(self._kl),
            "kl_weight": self.kl_weight,
            "mean_p": float(every.mean()),
            "sparsity": dropped / every.numel(),
            "compression_ratio": metrics.size(self).compression_ratio,
        }

    def to_cpu_sparse(self) -> nn.Module:
        """A copy for inference on a CPU that computes with the weights that are left; see `sparse.to_cpu_sparse`."""
        from vdbench.sparse import to_cpu_sparse

        return to_cpu_sparse(self)
