"""What a pruned language model is left with: which words, units and gates still matter.

A unit matters if a path of nonzero weights leads from it to a word's logit; whatever else it does, its state changes no
output, and taking it out is exact. A word that is read matters if its embedding feeds a unit that does. A gate whose
incoming weights are all zero is a constant of its unit and stays, as a bias.
"""

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from vdbench import metrics
from vdbench.conversion import KINDS
from vdbench.language import RNNLM, OneHotRNNLM

GATES = {"LSTM": 4, "RNN_TANH": 1}

LanguageModel = RNNLM | OneHotRNNLM
_FORWARDS = {kind.forward for kind in (RNNLM, OneHotRNNLM, nn.Dropout, nn.GRU, *KINDS, *KINDS.values())}


@dataclass(frozen=True)
class Recurrence:
    """One recurrent layer: weights (gates, units, inputs) and (gates, units, units), the sum of the biases (gates,
    units), and which units matter, bool (units,)."""

    inputs: Tensor
    units: Tensor
    bias: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Structure:
    """A language model taken apart, its weights those of eval mode.

    Attributes:
        embedding: (words, dimensions); the transposed input weights have none where words come in one-hot.
        dimensions: bool, those of the embedding that feed a unit that matters.
        layers: the recurrent ones, from the first.
        output, bias: (words, units) and (words,).
    """

    embedding: Tensor | None
    dimensions: Tensor
    layers: list[Recurrence]
    output: Tensor
    bias: Tensor

    def words_read(self) -> Tensor:
        """Bool (words,): the words whose embedding is not zero."""
        if self.embedding is None:
            first = self.layers[0]
            return first.inputs[:, first.kept].any(dim=1).any(dim=0)
        return self.embedding[:, self.dimensions].any(dim=1)

    def words_predicted(self) -> Tensor:
        """Bool (words,): the words whose logit is not constant."""
        return self.output[:, self.layers[-1].kept].any(dim=1)

    def counts(self) -> dict[str, int]:
        """What is left: `words_read` and `words_predicted`; `dimensions` of the embedding; `units` and `gates` that
        have weights, by layer."""
        found = {"words_read": int(self.words_read().sum()), "words_predicted": int(self.words_predicted().sum())}
        if self.embedding is not None:
            found["dimensions"] = int(self.dimensions.sum())
        below = self.dimensions
        for number, layer in enumerate(self.layers):
            incoming = layer.inputs[:, layer.kept][:, :, below].any(dim=2)
            incoming |= layer.units[:, layer.kept][:, :, layer.kept].any(dim=2)
            found[f"units_l{number}"], found[f"gates_l{number}"] = int(layer.kept.sum()), int(incoming.sum())
            below = layer.kept
        return found


def told_words(kept: Tensor, vocabulary: tuple[str, ...], *, count: int = 12) -> dict[str, list[str]]:
    """Of a vocabulary, most frequent words first: the most frequent that are not `kept`, and the least frequent that
    are, `count` of each."""
    left, dropped = ([vocabulary[k] for k in mask.nonzero().flatten().tolist()] for mask in (kept, ~kept))
    return {"frequent_dropped": dropped[:count], "rare_kept": left[::-1][:count]}


def is_as_made(model: nn.Module) -> TypeGuard[LanguageModel]:
    """Whether a model is one of `language` and computes nothing else. A subclass, of it or of a layer, may have a
    forward pass of its own; hooks may do anything."""
    return isinstance(model, LanguageModel) and all(
        type(module).forward in _FORWARDS and not (module._forward_hooks or module._forward_pre_hooks)
        for module in model.modules()
    )


def structure(model: nn.Module) -> Structure:
    """What a language model is made of and left with, in eval mode.

    Raises:
        ValueError: the model is not one of `language`, or has hooks or a forward pass of its own; or its recurrent
            layer is neither an LSTM nor a tanh RNN that goes one way, without projection, over words (T, N).
    """
    if not is_as_made(model):
        raise ValueError(
            f"{type(model).__name__} is not a language model of vdbench: such is RNNLM or OneHotRNNLM, without hooks "
            "or a forward pass of its own"
        )
    if model.rnn.mode not in GATES:
        raise ValueError(f"a recurrent layer of kind {model.rnn.mode}: there are {' and '.join(GATES)}")
    for setting in ("batch_first", "bidirectional", "proj_size"):
        if getattr(model.rnn, setting):
            raise ValueError(f"the recurrent layer has {setting}={getattr(model.rnn, setting)}, which is not supported")
    rnn, weights = model.rnn, {name: weight.cpu() for name, weight in metrics.weights(model).items()}
    gates, units = GATES[rnn.mode], rnn.hidden_size
    matters = weights["output"].any(dim=0)
    layers: list[Recurrence] = []
    for number in reversed(range(rnn.num_layers)):
        hidden = weights[f"rnn.weight_hh_l{number}"].view(gates, units, units)
        inputs = weights[f"rnn.weight_ih_l{number}"].view(gates, units, -1)
        kept = _leading_to(matters, hidden)
        biases = [getattr(rnn, f"bias_{kind}_l{number}").detach().cpu() for kind in ("ih", "hh")] if rnn.bias else []
        bias = sum(biases, torch.zeros(gates * units)).view(gates, units)
        layers.insert(0, Recurrence(inputs, hidden, bias, kept))
        matters = inputs[:, kept].any(dim=0).any(dim=0)
    embedding, output, bias = weights.get("embedding"), weights["output"], model.output.bias
    bias = torch.zeros(len(output)) if bias is None else bias.detach().cpu()
    return Structure(embedding, matters, layers, output, bias)


def _leading_to(matters: Tensor, hidden: Tensor) -> Tensor:
    """The units that matter themselves, or feed one that does, over any number of timesteps."""
    feeds = hidden.any(dim=0)  # (to, from)
    while True:
        more = matters | feeds[matters].any(dim=0)
        if torch.equal(more, matters):
            return matters
        matters = more
