"""Pruned language models: what is left of them is counted right, taken out exactly, and computed with sparsely."""

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vdbench import metrics
from vdbench.baselines import GradualPruner
from vdbench.conversion import to_variational_dropout
from vdbench.language import RNNLM, OneHotRNNLM
from vdbench.sparse import SparseLanguageModel, to_cpu_sparse
from vdbench.sparse.language import MANY
from vdbench.structure import structure, told_words
from vdbench.variational import variational_matrices

MAKERS = {
    "lstm": lambda: RNNLM(50, units=24, dropout=0.5),
    "tanh": lambda: RNNLM(50, torch.nn.RNN, units=24, layers=3),
    "onehot": lambda: OneHotRNNLM(50, units=24),
}
WORDS = torch.randint(50, (9, 3), generator=torch.Generator().manual_seed(1))


def pruned(kind: str, kept: float = 0.01) -> torch.nn.Module:
    torch.manual_seed(7)
    net = MAKERS[kind]().eval()
    for name, parameter in net.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "bias" in name else 2.0)
    GradualPruner(net, {layer.name: round(kept * layer.total) for layer in metrics.layers(net)}).update(1.0)
    return net


def same_logits(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", MAKERS)
def test_batches_agree_with_the_dense_model(kind):
    net = pruned(kind)
    fast = to_cpu_sparse(net)
    assert isinstance(fast, SparseLanguageModel)
    assert fast.counts["units_l0"] < 24
    with torch.no_grad():
        same_logits(fast(WORDS)[0], net(WORDS)[0])


@pytest.mark.parametrize("kind", MAKERS)
def test_word_by_word_agrees_with_the_dense_model(kind):
    net = pruned(kind)
    fast, state = to_cpu_sparse(net), None
    with torch.no_grad():
        expected, last = net(WORDS)
        for word, logits in zip(WORDS, expected, strict=True):
            found, state = fast(word[None], state)
            same_logits(found[0], logits)
    states = (state, last) if kind == "tanh" else (state[0], last[0])
    for number, kept in enumerate(fast.kept):
        torch.testing.assert_close(states[0][number][:, kept], states[1][number][:, kept], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", MAKERS)
def test_states_can_be_handed_over_from_the_dense_model(kind):
    net = pruned(kind)
    with torch.no_grad():
        _, state = net(WORDS)
        same_logits(to_cpu_sparse(net)(WORDS, state)[0], net(WORDS, state)[0])


def test_a_variational_model_is_masked_at_its_threshold():
    net = to_variational_dropout(RNNLM(50, units=24), loga_threshold=1.0).eval()
    with torch.no_grad():
        for _, matrix in variational_matrices(net):
            matrix.weight.normal_()
            matrix.log_sigma2.uniform_(0, 8)
        fast = to_cpu_sparse(net)
        assert fast.counts["gates_l0"] < 96
        same_logits(fast(WORDS)[0], net(WORDS)[0])


def test_a_model_without_weights_says_its_biases():
    net = pruned("lstm", kept=0.0)
    fast = to_cpu_sparse(net)
    assert set(fast.counts.values()) == {0}
    logits, (hidden, _) = fast(WORDS)
    assert torch.equal(logits, net.output.bias.detach().expand(9, 3, 50)) and not hidden.any()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("threads", [1, 2])
def test_calls_with_many_words_agree_on_any_number_of_threads(kind, threads):
    net, words = pruned(kind), torch.randint(50, (9, 60), generator=torch.Generator().manual_seed(2))
    assert words.numel() > MANY
    same_logits(to_cpu_sparse(net, threads=threads)(words)[0], net(words)[0].detach())


@pytest.mark.parametrize("kind", MAKERS)
def test_any_number_of_texts_is_read_on_from_its_state(kind):
    net = pruned(kind)
    fast = to_cpu_sparse(net)
    for texts in (1, 2, 5, 16, 33, 70, 5):
        words = torch.randint(50, (6, texts), generator=torch.Generator().manual_seed(texts))
        with torch.no_grad():
            expected = net(words)[0]
            first, state = fast(words[:4])
            same_logits(torch.cat([first, fast(words[4:], state)[0]]), expected)


def test_threads_of_python_may_share_a_model():
    net = pruned("lstm")
    fast = to_cpu_sparse(net, threads=3)
    texts = [
        torch.randint(50, (40, n), generator=torch.Generator().manual_seed(n)) for n in (1, 3, 9, 40, 3, 70, 40, 1)
    ]
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        for words, (logits, _) in zip(texts, pool.map(fast, texts), strict=True):
            same_logits(logits, net(words)[0])


def test_no_words_leave_a_state_as_it_is():
    fast = to_cpu_sparse(pruned("lstm"))
    state = fast(WORDS)[1]
    for part, same in zip(fast(WORDS[:0], state)[1], state, strict=True):
        assert torch.equal(part, same) and part.any()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_words_have_no_logits_and_change_no_state(kind, shape):
    fast = to_cpu_sparse(pruned(kind))
    logits, state = fast(torch.zeros(shape, dtype=torch.int64))
    assert logits.shape == (*shape, 50)
    assert not any(part.any() for part in ((state,) if kind == "tanh" else state))
    same_logits(fast(WORDS)[0], pruned(kind)(WORDS)[0].detach())


def test_conversion_draws_no_random_numbers_and_copies_compile_anew():
    net, before = pruned("lstm"), torch.get_rng_state()
    fast = to_cpu_sparse(net)
    assert torch.equal(before, torch.get_rng_state())
    fast(WORDS)
    for same in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        same_logits(same(WORDS)[0], fast(WORDS)[0])


def test_what_is_left_is_counted_by_hand():
    net = RNNLM(4, torch.nn.RNN, units=3, layers=2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.output.weight[2, 0] = 1  # logit of word 2 <- unit 0 of layer 1
        net.rnn.weight_hh_l1[0, 1] = 1  # which its unit 1 feeds
        net.rnn.weight_hh_l1[2, 2] = 1  # unit 2 feeds itself alone
        net.rnn.weight_ih_l1[1, 2] = 1  # unit 1 of layer 1 <- unit 2 of layer 0
        net.rnn.weight_ih_l1[2, 0] = 1  # what feeds unit 2 matters no more than it does
        net.rnn.weight_ih_l0[2, 1] = 1  # <- dimension 1 of the embedding
        net.embedding.weight[3, 1] = net.embedding.weight[0, 0] = 1  # dimension 0 feeds nothing
    assert structure(net).counts() == {
        "words_read": 1,
        "words_predicted": 1,
        "dimensions": 1,
        "units_l0": 1,
        "gates_l0": 1,
        "units_l1": 2,
        "gates_l1": 2,
    }


@pytest.mark.parametrize(
    ("kind", "words", "state", "message"),
    [
        ("lstm", torch.zeros(4, dtype=torch.int64), None, "words are .T, N., not .4,."),
        ("lstm", WORDS, torch.zeros(2, 3, 24), "is .h, c., each .2, 3, 24., not .2, 3, 24."),
        ("lstm", WORDS, (torch.zeros(2, 1, 24),) * 2, "each .2, 3, 24., not .2, 1, 24. and .2, 1, 24."),
        ("tanh", WORDS, torch.zeros(2, 3, 24), "is h, .3, 3, 24., not .2, 3, 24."),
    ],
)
def test_words_and_states_of_another_shape_are_refused(kind, words, state, message):
    with pytest.raises(ValueError, match=message):
        to_cpu_sparse(pruned(kind))(words, state)


def test_weights_of_another_model_are_refused():
    one, other = to_cpu_sparse(pruned("lstm")), to_cpu_sparse(pruned("lstm"))
    assert not one.state_dict()
    with pytest.raises(RuntimeError, match="\tload the weights into the model that this was made from, and call"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match="\tload the weights into the model that net was made from, and call"):
        torch.nn.ModuleDict({"net": other}).load_state_dict({"net.rnn.weight": torch.zeros(1)})


def test_weights_that_are_no_numbers_are_refused():
    model = pruned("lstm")
    model.rnn.weight_hh_l0.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"rnn\.weight_hh_l0 holds NaN"):
        to_cpu_sparse(model)


def test_states_of_another_type_are_converted():
    fast, state = to_cpu_sparse(pruned("tanh")), torch.rand(3, 3, 24, dtype=torch.float64)
    assert torch.equal(fast(WORDS, state)[0], fast(WORDS, state.float())[0])


def test_recurrent_layers_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="of kind GRU: there are LSTM and RNN_TANH"):
        to_cpu_sparse(RNNLM(20, torch.nn.GRU, units=8))


class TwiceTheLogits(RNNLM):
    def forward(self, input, state=None):
        logits, state = super().forward(input, state)
        return 2 * logits, state


class TwiceTheOutput(torch.nn.LSTM):
    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return 2 * output, state


def hooked() -> RNNLM:
    model = RNNLM(50, units=8)
    model.rnn.register_forward_hook(lambda layer, inputs, found: (2 * found[0], found[1]))
    return model


@pytest.mark.parametrize("make", [lambda: TwiceTheLogits(50, units=8), lambda: RNNLM(50, TwiceTheOutput, 8), hooked])
def test_models_that_compute_something_else_are_not_taken_for_ours(make):
    model = make().eval()
    fast = to_cpu_sparse(model)
    with torch.no_grad():
        same_logits(fast(WORDS)[0], model(WORDS)[0])
    with pytest.raises(ValueError, match="without hooks or a forward pass of its own"):
        SparseLanguageModel(model)


def test_models_made_otherwise_are_ours():
    class Small(RNNLM):
        def __init__(self):
            super().__init__(50, units=8)

    assert isinstance(to_cpu_sparse(Small()), SparseLanguageModel)


@pytest.mark.parametrize("setting", [{"batch_first": True}, {"bidirectional": True}, {"proj_size": 4}])
def test_recurrent_layers_that_read_otherwise_are_refused(setting):
    model = RNNLM(20, functools.partial(torch.nn.LSTM, **setting), units=8)
    with pytest.raises(ValueError, match="the recurrent layer has {}={}".format(*next(iter(setting.items())))):
        to_cpu_sparse(model)


def test_layers_may_have_no_biases():
    model = RNNLM(50, functools.partial(torch.nn.LSTM, bias=False), units=8).eval()
    model.output = torch.nn.Linear(8, 50, bias=False)
    same_logits(to_cpu_sparse(model)(WORDS)[0], model(WORDS)[0].detach())


def test_words_are_told_by_how_frequent_they_are():
    told = told_words(
        torch.tensor([True, False, True, False, False, True]), ("the", "of", "and", "a", "to", "in"), count=2
    )
    assert told == {"frequent_dropped": ["of", "a"], "rare_kept": ["in", "and"]}
    every = told_words(torch.ones(2, dtype=torch.bool), ("the", "of"))
    assert every == {"frequent_dropped": [], "rare_kept": ["of", "the"]}


def test_words_out_of_range_and_other_models_are_refused():
    with pytest.raises(IndexError, match="words are numbers below 50, not 0 to 50"):
        to_cpu_sparse(pruned("lstm"))(torch.tensor([[0], [50]]))
    with pytest.raises(TypeError, match=r"words are a tensor of int64, not a tensor of torch\.float32"):
        to_cpu_sparse(pruned("lstm"))(torch.zeros(3, 1))
    with pytest.raises(TypeError, match="words are a tensor of int64, not a ndarray"):
        to_cpu_sparse(pruned("lstm"))(WORDS.numpy())
    with pytest.raises(ValueError, match="Linear is not a language model of vdbench"):
        structure(torch.nn.Linear(2, 2))
