"""Recurrent language models: which word comes next, from all the words before."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

State = Tensor | tuple[Tensor, Tensor]
INITIAL_RANGE = 0.1


class RNNLM(nn.Module):
    """Embedding, recurrent layers and a linear layer over the words (Zaremba, Sutskever, Vinyals 2014, arXiv
    1409.2329, whose dropout is on the non-recurrent connections alone).

    Weights start uniform in [-0.1, 0.1], biases at 0, but 1 for the forget gates of an LSTM.

    Args:
        num_classes: words in the vocabulary.
        recurrent: `nn.LSTM` or `nn.RNN`.
        units: of the embedding and of every recurrent layer.
        layers: recurrent layers.
        dropout: rate after the embedding and after every recurrent layer.

    Shape: input (T, N) int64 words and the state after those before, None for none; output logits (T, N, num_classes)
    and the state after the last word.
    """

    def __init__(
        self,
        num_classes: int,
        recurrent: Callable[..., nn.RNNBase] = nn.LSTM,
        units: int = 650,
        layers: int = 2,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, units)
        self.dropout = nn.Dropout(dropout)
        self.rnn = recurrent(units, units, layers, dropout=dropout if layers > 1 else 0.0)
        self.output = nn.Linear(units, num_classes)
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if "bias" in name else nn.init.uniform_(parameter, -INITIAL_RANGE, INITIAL_RANGE)
        _remember(self.rnn)

    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        hidden, state = self.rnn(self.dropout(self.embedding(input)), state)
        return self.output(self.dropout(hidden)), state  # type: ignore[return-value]


class OneHotRNNLM(nn.Module):
    """One LSTM layer straight on the words, one-hot, and a linear layer over them: the word-level model of Chirkova et
    al. 2018 (arXiv 1810.10927). Orthogonal weights, biases 0, forget gates 1; 13.06 million weights for 10,000 words
    and 256 units.

    Args:
        num_classes: words in the vocabulary. units: of the LSTM.

    Shape: as `RNNLM`.
    """

    def __init__(self, num_classes: int, units: int = 256) -> None:
        super().__init__()
        self.words = num_classes
        self.rnn = nn.LSTM(num_classes, units)
        self.output = nn.Linear(units, num_classes)
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                for gate in parameter.chunk(4 if name.startswith("rnn") else 1):
                    nn.init.orthogonal_(gate)
        _remember(self.rnn)

    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        one_hot = functional.one_hot(input, self.words).to(self.output.weight.dtype)
        hidden, state = self.rnn(one_hot, state)
        return self.output(hidden), state  # type: ignore[return-value]


def _remember(rnn: nn.RNNBase) -> None:
    """Forget gates of an LSTM start open: bias 1."""
    if isinstance(rnn, nn.LSTM) and rnn.bias:
        for layer in range(rnn.num_layers):
            with torch.no_grad():
                getattr(rnn, f"bias_ih_l{layer}")[rnn.hidden_size : 2 * rnn.hidden_size] = 1.0


LANGUAGE_MODELS: dict[str, Callable[[int], nn.Module]] = {
    "rnnlm_tanh": functools.partial(RNNLM, recurrent=nn.RNN),
    "rnnlm_tanh_200": functools.partial(RNNLM, recurrent=nn.RNN, units=200, dropout=0.25),
    "rnnlm_lstm": RNNLM,
    "rnnlm_lstm_200": functools.partial(RNNLM, units=200, dropout=0.25),
    "rnnlm_lstm_onehot": OneHotRNNLM,
}
