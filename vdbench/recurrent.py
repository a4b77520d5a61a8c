"""Variational dropout for sequences: recurrent layers and embeddings, each with one weight sample a minibatch.

A recurrent layer's state depends on its weights through every earlier timestep, so noise drawn afresh at each of them
would be the noise of another model: one sample of the weights serves all timesteps and all sequences of a forward pass
(Chirkova, Lobacheva, Vetrov, *Bayesian Compression for Natural Language Processing*, EMNLP 2018, arXiv 1810.10927).
A sampled weight is an ordinary weight, so torch's fused implementations, cuDNN's and oneDNN's, are used as they are.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from vdbench.variational import (
    INITIAL_LOG_SIGMA2,
    LOGA_THRESHOLD,
    P_THRESHOLD,
    Matrix,
    SingleWeight,
    VariationalDropout,
)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without cuDNN's warning that it puts the weights together at every call: samples are new at every call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single")
        yield


class _Recurrent(VariationalDropout, nn.RNNBase):
    """What the recurrent layers share. The log variances of `weight_hh_l0` are `weight_hh_l0_log_sigma2`; biases have
    none."""

    @classmethod
    def refuses(cls, layer: nn.Module) -> str | None:
        computed = [name for name in layer._flat_weights_names if name not in layer._parameters]  # type: ignore[union-attr]
        if computed:
            return f"{', '.join(computed)} is computed anew at every call, as pruning and weight_norm do"
        return super().refuses(layer)

    def _weight_names(self) -> Iterator[str]:
        return (name for name in self._flat_weights_names if name.startswith("weight"))

    def _init_variational(self, p_threshold: float, loga_threshold: float, initial_log_sigma2: float) -> None:
        super()._init_variational(p_threshold, loga_threshold, initial_log_sigma2)
        for name in self._weight_names():
            log_sigma2 = nn.Parameter(torch.full_like(getattr(self, name), initial_log_sigma2))
            self.register_parameter(f"{name}_log_sigma2", log_sigma2)

    def matrices(self) -> list[Matrix]:
        return [Matrix(name, getattr(self, name), getattr(self, f"{name}_log_sigma2")) for name in self._weight_names()]

    def forward(self, input: Any, hx: Any = None) -> Any:
        if self.training:
            weights = self._samples()
        else:
            weights = {matrix.name: matrix.masked(self.loga_threshold) for matrix in self.matrices()}
        self._update_flat_weights()
        twin = object.__new__(type(self))  # whose weights these are: other threads may be calling this layer
        flat = [weights.get(name, getattr(self, name)) for name in self._flat_weights_names]
        twin.__dict__.update(self.__dict__, _flat_weights=flat)
        with _quiet() if next(iter(weights.values())).is_cuda else contextlib.nullcontext():
            return super(_Recurrent, twin).forward(input, hx)


class VariationalDropoutTanhRNN(_Recurrent, nn.RNN):
    """`torch.nn.RNN` with sparse variational dropout: one sample of the weights a forward pass in training mode, and
    weights masked at `loga_threshold` in eval mode. Everything else is `torch.nn.RNN`'s: several layers, two
    directions, dropout between layers, initial states, packed sequences.

    Args:
        *args, **kwargs: as `torch.nn.RNN`, whose nonlinearity is tanh unless told otherwise.
        p_threshold, loga_threshold, initial_log_sigma2: as `VariationalDropoutLinear`, and so `mask_in_training`.

    Shape: as `torch.nn.RNN`.

    Raises:
        ValueError: a threshold out of range.
    """


class VariationalDropoutLSTM(_Recurrent, nn.LSTM):
    """`torch.nn.LSTM` with sparse variational dropout: one sample of the weights a forward pass in training mode, and
    weights masked at `loga_threshold` in eval mode. Everything else is `torch.nn.LSTM`'s: several layers, two
    directions, projections, dropout between layers, initial states, packed sequences.

    Args:
        *args, **kwargs: as `torch.nn.LSTM`.
        p_threshold, loga_threshold, initial_log_sigma2: as `VariationalDropoutLinear`, and so `mask_in_training`.

    Shape: as `torch.nn.LSTM`.

    Raises:
        ValueError: a threshold out of range.
    """


class VariationalDropoutEmbedding(SingleWeight, nn.Embedding):
    """`torch.nn.Embedding` with sparse variational dropout: in training mode one sample of every row that occurs in
    the input, whichever positions it occurs at; in eval mode rows masked at `loga_threshold`.

    Only the rows that occur are sampled, on a GPU all. The KL divergence and its gradients are those of all rows,
    exactly.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as `torch.nn.Embedding`. The row at `padding_idx`
            is zero, without noise.
        p_threshold, loga_threshold, initial_log_sigma2: as `VariationalDropoutLinear`, and so `mask_in_training`.

    Shape: input (*) int64, output (*, embedding_dim).

    Raises:
        ValueError: a threshold out of range.
    """

    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        p_threshold: float = P_THRESHOLD,
        loga_threshold: float = LOGA_THRESHOLD,
        initial_log_sigma2: float = INITIAL_LOG_SIGMA2,
    ) -> None:
        super().__init__(
            *(num_embeddings, embedding_dim, padding_idx),
            device=device,
            dtype=dtype,
            p_threshold=p_threshold,
            loga_threshold=loga_threshold,
            initial_log_sigma2=initial_log_sigma2,
        )

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None, **settings: Any
    ) -> Self:
        """As `torch.nn.Embedding.from_pretrained`; frozen, the log variances are still learned.

        Args:
            embeddings: (num_embeddings, embedding_dim) the weights, copied.
            settings: thresholds and `initial_log_sigma2`, as the class takes them.

        Raises:
            AssertionError: embeddings of another number of dimensions, as torch. ValueError: a row at `padding_idx`
                that is not zero.
        """
        plain = nn.Embedding.from_pretrained(embeddings, freeze, padding_idx)
        if refusal := cls.refuses(plain):
            raise ValueError(refusal)
        rows, columns = plain.weight.shape
        layer = cls(rows, columns, plain.padding_idx, embeddings.device, embeddings.dtype, **settings)
        with torch.no_grad():
            layer.weight.copy_(embeddings)
        layer.weight.requires_grad_(not freeze)
        return layer

    @classmethod
    def refuses(cls, layer: nn.Module) -> str | None:
        changed = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}
        found = [name for name, usual in changed.items() if getattr(layer, name) != usual]
        if found:
            return f"a variational embedding has no {', '.join(found)}"
        padded = layer.padding_idx is not None and bool(layer.weight[layer.padding_idx].any())  # type: ignore[operator]
        return "the padding row of a variational embedding is zero" if padded else super().refuses(layer)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:  # of the rows that occur alone, for the others may be many
            weight, log_sigma2 = (functional.embedding(input, t) for t in (self.weight, self.log_sigma2))
            return Matrix("weight", weight, log_sigma2).masked(self.loga_threshold)
        if input.device.type != "cpu":  # which rows occur would have to be waited for, and a captured step never waits
            output = functional.embedding(input, self._samples()["weight"])
        else:
            rows, places = torch.unique(input, return_inverse=True)
            if len(rows) and not 0 <= rows[0] <= rows[-1] < self.num_embeddings:
                raise IndexError(f"indices are 0 to {self.num_embeddings - 1}, not {int(rows[0])} to {int(rows[-1])}")
            output = functional.embedding(places, self._samples(rows)["weight"])
        if self.padding_idx is None:
            return output
        return torch.where((input == self.padding_idx)[..., None], self.weight[self.padding_idx].detach(), output)
