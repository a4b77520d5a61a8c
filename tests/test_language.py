"""Language models on texts: their batches and perplexity, and runs of every method, killed ones too."""

import math

import pytest
import tiny
import torch
from torch import nn

from vdbench import data, metrics, pruning, records, tasks, tensors, training
from vdbench.config import DenseRecipe, SuiteError
from vdbench.text import EOS, Text


def repeating(words: int = 600) -> Text:
    """A text that a net can learn: 0 1 2 0 1 2 ... with a fourth word now and then."""
    numbers = torch.arange(words) % 3
    numbers[::25] = 3
    return Text("topics", numbers, numbers[:200].clone(), ("a", "b", "c", EOS))


def spec(method: str, **recipe):
    recipe = {"batch_size": 4, "sequence_length": 10, "learning_rate": 1e-2, "gradient_clip": 5.0} | recipe
    return tiny.spec(method, "rnnlm_lstm_200", **recipe).model_copy(update={"dataset": "topics"})


# --- the task ---


def test_batches_are_columns_of_the_text_and_carry_the_state():
    text = Text("topics", torch.arange(31), torch.arange(5), tuple(map(str, range(31))))
    task = tasks.LanguageModelling(text, DenseRecipe(epochs=1, batch_size=3, sequence_length=4))
    assert (task.steps, task.num_examples) == (3, 31)
    seen, states = [], []
    for step, ((words, state), targets) in enumerate(task.batches(0)):
        assert torch.equal(targets, words + 1)
        seen.append(words)
        states.append(state)
        logits = torch.zeros(*words.shape, 31, requires_grad=True)
        task.loss((logits, torch.full((1,), float(step), requires_grad=True)), targets)
    assert torch.equal(torch.cat(seen), torch.arange(30).view(3, 10).t())
    assert states[0] is None and [float(state) for state in states[1:]] == [0.0, 1.0]
    assert not any(state.requires_grad for state in states[1:])
    assert float(next(iter(task.batches(1)))[0][1]) == 0.0  # no state, in the place of the one before


class Bigram(nn.Module):
    """The logarithms of given probabilities of the next word, and the number of words so far as state."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input, state=None):
        return self.table.log()[input], (state or 0) + len(input)


def test_perplexity_by_hand(monkeypatch):
    table = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    words = torch.tensor([0, 1, 1, 2, 0])
    expected = math.exp(-sum(map(math.log, (0.25, 0.8, 0.1, 0.2))) / 4)
    text = Text("topics", words, words, ("a", "b", "c"))
    for piece in (2000, 1, 3):
        monkeypatch.setattr(metrics, "EVALUATION_WORDS", piece)
        found = tasks.evaluate(Bigram(table), text)
        assert found["perplexity"] == pytest.approx(expected, rel=1e-6)
        assert found["cross_entropy"] == pytest.approx(math.log(expected), rel=1e-6)


def test_evaluation_carries_the_state(monkeypatch):
    torch.manual_seed(0)
    net = training.build_model(spec("dense"), 4, None)
    words = repeating().eval_words
    whole = metrics.text_cross_entropy(net, words)
    monkeypatch.setattr(metrics, "EVALUATION_WORDS", 7)
    assert metrics.text_cross_entropy(net, words) == pytest.approx(whole, rel=1e-5)
    assert net.training


# --- runs ---


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    output = tmp_path_factory.mktemp("dense")
    tiny.train(spec("dense"), output, repeating())
    return output


def test_a_language_model_learns_and_says_its_perplexity(dense):
    record = records.read(dense / "train.json")
    assert record.metrics["perplexity"] < 2 and "error" not in record.metrics
    assert (dense / "history.csv").read_text().splitlines()[0].split(",")[6] == "perplexity"


def test_a_text_that_changes_is_another_data_set(made, tmp_path, monkeypatch, caplog):
    """Between a kill and the next start training begins anew, and what was trained is not evaluated on another text."""
    name, text = made(), tmp_path / "mine" / "test.txt"
    wanted = spec("dense", sequence_length=2, batch_size=2).model_copy(update={"dataset": name})
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)

    real = training.Training.run_epoch

    def killed(self, epoch, bar):
        if epoch:
            raise KeyboardInterrupt
        return real(self, epoch, bar)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "run_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny.train(wanted, tmp_path, data.load(name))
    text.write_text("the dog saw the dog\n")
    assert (tmp_path / "resume.pt").exists()
    tiny.train(wanted, tmp_path, data.load(name))
    assert "comes from another spec, stage version or input" in caplog.text
    text.write_text("the cat saw the cat\n")
    with pytest.raises(records.RecordError, match=f"{name} has changed since .*weights.pt was trained on it"):
        pruning.prune(wanted, suite="tiny", output=tmp_path, data=data.load(name), weights=tmp_path / "weights.pt")


@pytest.mark.parametrize("method", ["vd_finetune", "vd_warmup", "magnitude"])
def test_every_method_trains_and_prunes_a_language_model(method, dense, tmp_path):
    wanted = spec(method, dropout=0.3)
    inputs = {}
    if method != "vd_warmup":
        inputs["pretrained"] = dense / "weights.pt"
    if method == "magnitude":
        shapes = metrics.layers(training.build_model(wanted, 4, None))
        example = pruning.prune(
            spec("dense"), suite="tiny", output=tmp_path / "m", data=repeating(), weights=dense / "weights.pt"
        )
        half = [layer.model_copy(update={"nonzero": layer.total // 2}) for layer in shapes]
        records.write(example.model_copy(update={"layers": half}), tmp_path / "matched.json")
        inputs["matched"] = tmp_path / "matched.json"
    record = tiny.train(wanted, tmp_path, repeating(), **inputs)
    assert record.status == "ok" and math.isfinite(record.metrics["perplexity"])

    pruned = pruning.prune(
        wanted, suite="tiny", output=tmp_path, data=repeating(), weights=tmp_path / "weights.pt", control=None
    )
    assert [layer.name for layer in pruned.layers][:3] == ["embedding", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert pruned.multiply_adds.dense == 4 * 200 * 200 * 4 + 200 * 4  # a word: what is looked up is not multiplied
    assert 0 < pruned.kept["units_l0"] <= 200 and pruned.kept["words_read"] <= 4
    assert {"read", "predicted"} == set(pruned.words)
    assert set(pruned.words["read"].rare_kept) <= {"a", "b", "c", EOS}
    if method == "magnitude":
        assert pruned.size.compression_ratio == pytest.approx(2.0, rel=1e-3)
    else:
        assert all(point.perplexity > 1 and point.error is None for point in pruned.curve)
        assert [histogram.name for histogram in pruned.log_alpha_histogram] == [x.name for x in pruned.layers]
    net, meta = pruning.load_net(tmp_path / "pruned.npz")
    assert meta["model"] == "rnnlm_lstm_200"
    assert tasks.evaluate(net, repeating())["perplexity"] == pruned.metrics["perplexity"]


@pytest.mark.parametrize("method", ["dense", "vd_warmup"])
def test_resumed_run_ends_with_the_same_weights(method, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    wanted = spec(method)
    tiny.train(wanted, tmp_path / "undisturbed", repeating())
    real, taken = training.Training.run_epoch, []

    def killed_in_the_third(self, epoch, bar):
        taken.append(epoch)
        if epoch == 2:
            raise KeyboardInterrupt
        return real(self, epoch, bar)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Training, "run_epoch", killed_in_the_third)
        tiny.train(wanted, tmp_path / "disturbed", repeating())
    assert taken == [0, 1, 2]
    tiny.train(wanted, tmp_path / "disturbed", repeating())
    ours, theirs = (tensors.load_tensors(tmp_path / run / "weights.pt") for run in ("disturbed", "undisturbed"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_dropout_is_as_the_recipe_says_and_off_in_variational_methods_where_it_says_nothing():
    def rates(method, **recipe):
        net = training.build_model(spec(method, **recipe), 4, None)
        return net.dropout.p, net.rnn.dropout

    assert rates("dense") == (0.25, 0.25)
    assert rates("dense", dropout=0.4) == (0.4, 0.4)
    assert rates("vd_warmup") == (0.0, 0.0)
    assert rates("vd_warmup", dropout=0.4) == (0.4, 0.4)


def test_what_does_not_fit_together_is_refused(tmp_path):
    with pytest.raises(SuiteError, match="language models are for texts"):
        tiny.train(tiny.spec("dense", "rnnlm_lstm_200"), tmp_path)
    with pytest.raises(SuiteError, match="language models are for texts"):
        tiny.train(tiny.spec("dense"), tmp_path, repeating())
    with pytest.raises(SuiteError, match="batch_size 2000 exceeds the 600 training examples"):
        tiny.train(spec("dense", batch_size=2000), tmp_path, repeating())
