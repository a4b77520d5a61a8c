"""Texts as data sets: words and vocabulary, unknown words, and what is refused."""

import hashlib
import logging
import re

import pytest
import torch

from vdbench import data
from vdbench.files import DataError
from vdbench.text import EOS, UNK, encode, split_words, vocabulary_of


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
