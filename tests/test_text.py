"""Texts as data sets, and language models trained and evaluated on them."""

import hashlib
import logging
import math
import re

import pytest
import tiny
import torch
from torch import nn

from vdbench import data, metrics, pruning, records, tasks, tensors, training
from vdbench.config import DenseRecipe, SuiteError
from vdbench.files import DataError
from vdbench.text import EOS, UNK, Text, encode, split_words, vocabulary_of


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes the text data set `text:mine` in a mirror folder, and returns its name."""
    monkeypatch.setenv("VDBENCH_MIRROR", str(tmp_path))

    def make(**texts):
        (tmp_path / "mine").mkdir()
        for split in ("train", "valid", "test"):
            content = texts.get(split, "the cat saw the dog\nthe dog saw\n")
            (tmp_path / "mine" / f"{split}.txt").write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
        return "text:mine"

    return make


def repeating(words: int = 600) -> Text:
    """A text that a net can learn: 0 1 2 0 1 2 ... with a fourth word now and then."""
    numbers = torch.arange(words) % 3
    numbers[::25] = 3
    return Text("topics", numbers, numbers[:200].clone(), ("a", "b", "c", EOS))


def spec(method: str, **recipe):
    recipe = {"batch_size": 4, "sequence_length": 10, "learning_rate": 1e-2, "gradient_clip": 5.0} | recipe
    return tiny.spec(method, "rnnlm_lstm_200", **recipe).model_copy(update={"dataset": "topics"})


# --- data ---


def test_every_line_ends_in_a_word_of_its_own():
    assert split_words([" the cat \n", "", "sat\tdown"]) == ["the", "cat", EOS, EOS, "sat", "down", EOS]


def test_files_of_other_editors(made):
    """A byte order mark is no part of a word, and only ends of lines are ends of lines."""
    text = data.load(made(train=b"\xef\xbb\xbfthe cat\r\nsaw\x0cthe\xe2\x80\xa8dog\n", test="the dog"))
    assert [text.vocabulary[word] for word in text.train_words] == ["the", "cat", EOS, "saw", "the", "dog", EOS]
    assert [text.vocabulary[word] for word in text.eval_words] == ["the", "dog", EOS]


def test_vocabulary_is_ranked_and_limited():
    words = ["b", "a", "b", "c", "a", "b"]
    assert vocabulary_of(words) == ("b", "a", "c")
    assert vocabulary_of(words, 2) == ("b", UNK)
    assert vocabulary_of(["b", UNK, UNK, "c", "b", "d"], 2) == ("b", UNK)


def test_any_folder_with_texts_is_a_data_set(made, tmp_path):
    name = made(test="the dog\n")
    assert data.available(name) == "in mirror"
    text = data.load(name)
    assert text.vocabulary == ("the", "saw", "dog", EOS, "cat", UNK)
    words = [text.vocabulary[n] for n in text.train_words]
    assert words == f"the cat saw the dog {EOS} the dog saw {EOS}".split()
    assert [text.vocabulary[n] for n in text.eval_words] == ["the", "dog", EOS]
    report = data.fetch(name)
    assert report["examples"] == {"train": 10, "test": 3}
    content = (tmp_path / "mine" / "test.txt").read_bytes()
    told = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "source": "mirror"}
    assert list(report["files"]) == ["train.txt", "valid.txt", "test.txt"] and report["files"]["test.txt"] == told


def test_validation_evaluates_on_the_validation_text_and_does_not_read_the_test_text(made, tmp_path):
    name = made(valid="dog cat\nsaw\n")
    (tmp_path / "mine" / "test.txt").unlink()
    text = data.load(name, validation_size=2)
    assert [text.vocabulary[n] for n in text.eval_words] == ["dog", "cat"]
    with pytest.raises(DataError, match=r"validation_size is 6: .* has 5 words of validation text"):
        data.load(name, validation_size=6)
    with pytest.raises(DataError, match=r"test\.txt: cannot be read .*a folder with train\.txt, valid\.txt and"):
        data.load(name)


def test_unknown_words_are_counted_as_one_and_said(made, caplog):
    caplog.set_level(logging.WARNING, "vdbench")
    text = data.load(made(test="the bird saw the bird fly\n"))
    assert [text.vocabulary[n] for n in text.eval_words] == f"the {UNK} saw the {UNK} {UNK} {EOS}".split()
    assert re.search("3 of the 7 words evaluated on, 2 distinct ones, are not in the vocabulary", caplog.text)
    assert "each costs dearly" in caplog.text  # for nothing was learned of it
    assert text.num_classes == 6 == data.load("text:mine", validation_size=5).num_classes


def test_a_text_that_has_a_word_for_the_unknown_uses_it(caplog):
    caplog.set_level(logging.WARNING, "vdbench")
    text = encode(["a", UNK], ["b", "a"], "mine")
    assert "1 of the 2 words" in caplog.text and "costs dearly" not in caplog.text
    assert text.vocabulary == ("a", UNK) and text.eval_words.tolist() == [1, 0]


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_text_without_words_is_refused(made, split, content):
    with pytest.raises(DataError, match=f"the {split} text has no words"):
        data.load(made(**{split: content}))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize(("content", "said"), [("", "no words"), ("caf\xe9".encode("latin-1"), "not UTF-8")])
def test_all_three_texts_are_looked_at_before_anything_is_trained(made, split, content, said):
    with pytest.raises(DataError, match=f"{split}.*{said}"):
        data.fetch(made(**{split: content}))


def test_a_text_in_another_encoding_is_refused_saying_where(made):
    with pytest.raises(DataError, match=r"train\.txt: not UTF-8: byte 0xe9 at position 3; save it as UTF-8"):
        data.load(made(train="caf\xe9 au lait".encode("latin-1")))


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf_16_without_its_mark_is_refused(made, order):
    with pytest.raises(
        DataError, match=r"train\.txt: a null character at position [01], as in UTF-16; save it as UTF-8"
    ):
        data.load(made(train="the cat".encode(f"utf-16-{order}")))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_in_any_of_three_ways(made, end):
    text = data.load(made(train=f"the cat{end}a cat{end}".encode()))
    assert [text.vocabulary[n] for n in text.train_words] == f"the cat {EOS} a cat {EOS}".split()


def test_one_word_cannot_be_evaluated_on(made):
    with pytest.raises(DataError, match="two are the least"):
        data.load(made(), validation_size=1)


def test_pythons_help_texts_are_there():
    text = data.load("topics")
    assert text.num_classes == 2000 and UNK in text.vocabulary
    assert len(text.train_words) > 50_000 and len(text.eval_words) > 1_000
    assert data.available("topics") == "embedded" and data.fetch("topics")["files"] == {}
    assert not torch.equal(data.load("topics", validation_size=500).eval_words, text.eval_words[:500])


@pytest.mark.real_data
def test_penn_treebank_is_what_the_literature_uses(tmp_path):
    if data.available("ptb", tmp_path) == "to download":
        pytest.skip("Penn Treebank is not in VDBENCH_MIRROR")
    text = data.load("ptb", cache=tmp_path)
    assert (len(text.train_words), len(text.eval_words), text.num_classes) == (929_589, 82_430, 10_000)
    assert len(data.load("ptb", validation_size=73_760, cache=tmp_path).eval_words) == 73_760
    assert data.fetch("ptb", cache=tmp_path)["files"]["ptb.train.txt"]["source"] == "cache"


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
