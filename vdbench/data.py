"""Data sets in memory, by name; MNIST from its published files, and the digits that come with scikit-learn."""

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdbench.files import DataError, Folders, FromFiles, PublishedFile, obtain
from vdbench.images import CIFAR, Arrays, CifarArchive, Normalisation, Split, shifted_and_flipped
from vdbench.pictures import CIFAR10_JPEG, PREFIX, PictureArchive, PictureFolder
from vdbench.tensors import state_sha256
from vdbench.text import TEXT_PREFIX, TEXTS, FolderText, Text, TextSource

__all__ = ["DATASETS", "DataError", "Dataset", "available", "fetch", "load"]

VALIDATION_SEED = 20170806  # never a run's own seed: every run of every method sees the same split


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory: images (N, C, H, W) and labels int64 (N,).

    Grey images are float32 in [0, 1]. Colour images are normalised channel by channel: those evaluated on are, float32,
    and those trained on, kept as bytes, are so by `train_batch`.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    eval_images: Tensor
    eval_labels: Tensor
    num_classes: int
    normalisation: Normalisation | None = None

    @property
    def example(self) -> Tensor:
        """An input of one image."""
        return self.eval_images[:1]

    def to(self, device: str) -> "Dataset":
        """The same data on a device."""
        names = ["train_images", "train_labels", "eval_images", "eval_labels"]
        if self.normalisation is not None:
            names.append("normalisation")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def sha256(self) -> str:
        """Hash of all images and labels."""
        names = ("train_images", "train_labels", "eval_images", "eval_labels")
        return state_sha256({name: getattr(self, name) for name in names})

    def train_batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Training examples as a net takes them, and their labels.

        Args:
            indices: (B,) int64. generator: of the data's device; with it images are shifted and flipped at random.
        """
        if generator is None:
            images = self.train_images[indices]
        else:
            images = shifted_and_flipped(self.train_images, indices, generator)
        return self.normalisation(images) if self.normalisation else images, self.train_labels[indices]


@dataclass(frozen=True)
class IdxFile(PublishedFile):
    """An array of unsigned bytes in LeCun's IDX format: magic number, dimensions, values."""

    shape: tuple[int, ...]

    @classmethod
    def of(cls, folder: str, name: str, shape: tuple[int, ...], sha256: str) -> "IdxFile":
        return cls(folder, name, 4 + 4 * len(shape) + math.prod(shape), sha256, shape)

    def parse(self, content: bytes) -> np.ndarray:
        """The array, uint8. Raises DataError where magic number, dimensions or size are not as expected."""
        rank = len(self.shape)
        magic = struct.pack(">I", 0x0800 | rank)  # 0x08: unsigned byte
        if content[:4] != magic:
            raise DataError(f"{self.name}: expected IDX magic number {magic.hex()}, found {content[:4].hex()}")
        if len(content) != self.size:
            raise DataError(f"{self.name}: expected {self.size:,} bytes of IDX, found {len(content):,}")
        shape = struct.unpack_from(f">{rank}I", content, offset=4)
        if shape != self.shape:
            raise DataError(f"{self.name}: expected IDX dimensions {self.shape}, found {shape}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


@dataclass(frozen=True)
class IdxArchive(FromFiles):
    """Images and labels of every split in IDX files."""

    name: str
    num_classes: int
    files: dict[Split, tuple[IdxFile, IdxFile]]
    servers: Callable[[], Sequence[str]]

    @property
    def examples(self) -> dict[str, int]:
        return {split: images.shape[0] for split, (images, _) in self.files.items()}

    @property
    def all_files(self) -> list[IdxFile]:
        return [file for pair in self.files.values() for file in pair]

    def read(self, split: Split, cache: Path | None, mirror: Path | None) -> Arrays:
        folders = Folders.in_force(cache, mirror)
        images, labels = (file.parse(obtain(file, folders, self.servers)[0]) for file in self.files[split])
        return images / np.float32(255), labels


@dataclass(frozen=True)
class EmbeddedDigits:
    """The 1,797 scans of handwritten digits in scikit-learn, 8 x 8 with 17 grey levels (UCI; Alpaydin and Kaynak 1998).

    Every pixel becomes 3 x 3, with a border of two: 28 x 28. Within each class, in the order in which they are stored,
    every fifth scan is a test example and the others are training examples; a writer can appear in both.
    """

    name: str
    num_classes: int
    examples: dict[str, int]
    sha256: str

    def fetch(self, cache: Path | None, mirror: Path | None) -> dict[str, dict[str, Any]]:
        self._scans()
        return {}

    def read(self, split: Split, cache: Path | None, mirror: Path | None) -> Arrays:
        images, labels = self._scans()
        in_test = np.zeros(len(labels), bool)
        for label in range(self.num_classes):
            in_test[np.flatnonzero(labels == label)[4::5]] = True
        chosen = in_test if split == "test" else ~in_test
        images = images[chosen].repeat(3, axis=1).repeat(3, axis=2)
        return np.pad(images, ((0, 0), (2, 2), (2, 2))) / np.float32(16), labels[chosen]

    def available(self, cache: Path | None, mirror: Path | None) -> str:
        return "embedded"

    def _scans(self) -> Arrays:
        """Images (1797, 8, 8) and labels, uint8, the very ones expected. Raises DataError."""
        import sklearn
        from sklearn.datasets import load_digits

        scans: Any = load_digits()
        images, labels = scans.images.astype(np.uint8), scans.target.astype(np.uint8)
        digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        if digest != self.sha256:
            raise DataError(
                f"{self.name}: refused: expected scans with sha256 {self.sha256}, found {digest} in scikit-learn "
                f"{sklearn.__version__}; install another version of it"
            )
        return images, labels


def _mnist_servers() -> Sequence[str]:
    from torchvision.datasets import MNIST

    return MNIST.mirrors


# The digests are of the content: the archives also circulate recompressed, so that their own digests say little.
MNIST = IdxArchive(
    name="mnist",
    num_classes=10,
    files={
        "train": (
            IdxFile.of(
                "mnist",
                "train-images-idx3-ubyte",
                (60_000, 28, 28),
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            ),
            IdxFile.of(
                "mnist",
                "train-labels-idx1-ubyte",
                (60_000,),
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            ),
        ),
        "test": (
            IdxFile.of(
                "mnist",
                "t10k-images-idx3-ubyte",
                (10_000, 28, 28),
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            ),
            IdxFile.of(
                "mnist",
                "t10k-labels-idx1-ubyte",
                (10_000,),
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        ),
    },
    servers=_mnist_servers,
)
DIGITS = EmbeddedDigits(
    name="digits",
    num_classes=10,
    examples={"train": 1442, "test": 355},
    sha256="87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826",
)
Source = IdxArchive | EmbeddedDigits | CifarArchive | PictureArchive | PictureFolder | TextSource
DATASETS: dict[str, Source] = {source.name: source for source in (MNIST, DIGITS, *CIFAR, CIFAR10_JPEG, *TEXTS)}
OWN_DATA = (PREFIX, TEXT_PREFIX)


def _source(name: str, mirror: Path | None) -> Source:
    if name.startswith(PREFIX):
        return PictureFolder.named(name, mirror)
    if name.startswith(TEXT_PREFIX):
        return FolderText.named(name, mirror)
    if name not in DATASETS:
        raise DataError(f"no data set named {name}; there are: {', '.join(DATASETS)}, {PREFIX}NAME, {TEXT_PREFIX}NAME")
    return DATASETS[name]


def examples(name: str) -> dict[str, int]:
    """Training and test examples of a data set, words of a text. Raises DataError."""
    return _source(name, None).examples


def available(name: str, cache: Path | None = None, mirror: Path | None = None) -> str:
    """`embedded`, `cached`, `in mirror`, `to download` or `only by mirror folder`, by looking and not by reading.
    Raises DataError."""
    return _source(name, mirror).available(cache, mirror)


def fetch(name: str, *, cache: Path | None = None, mirror: Path | None = None) -> dict[str, Any]:
    """See to it that the verified files of a data set are in the cache, and report them.

    Returns `{"dataset", "files": {name: {"sha256", "bytes", "source"}}, "examples": {"train", "test"}}`: sha256 and
    bytes of the decompressed content; source `cache`, `mirror` or an address. An embedded data set has no files.
    Raises DataError.
    """
    source = _source(name, mirror)
    return {"dataset": name, "files": source.fetch(cache, mirror), "examples": source.examples}


def load(
    name: str, *, validation_size: int = 0, cache: Path | None = None, mirror: Path | None = None
) -> Dataset | Text:
    """A data set in memory, its files verified: training set and test set.

    With `validation_size`, that many training examples are held out and evaluated on instead: the last ones of a
    shuffle under a fixed seed. The test set is then not even read. A text has a validation text of its own, of which
    so many words are evaluated on. Raises DataError.
    """
    source = _source(name, mirror)
    if isinstance(source, TextSource):
        return source.load(validation_size, cache, mirror)
    count = source.examples["train"]
    if not 0 <= validation_size < count:
        raise DataError(f"validation_size is {validation_size}: {name} has {count:,} training examples to take it from")
    train_images, train_labels = _tensors(source.read("train", cache, mirror))
    if validation_size:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(VALIDATION_SEED))
        kept, held_out = order[:-validation_size], order[-validation_size:]
        eval_images, eval_labels = train_images[held_out], train_labels[held_out]
        train_images, train_labels = train_images[kept], train_labels[kept]
    else:
        eval_images, eval_labels = _tensors(source.read("test", cache, mirror))
    normalisation = None
    if train_images.dtype == torch.uint8:
        normalisation = Normalisation.of(train_images)
        eval_images = normalisation(eval_images)
    return Dataset(name, train_images, train_labels, eval_images, eval_labels, source.num_classes, normalisation)


def _tensors(arrays: Arrays) -> tuple[Tensor, Tensor]:
    """Images (N, H, W) or, in colour, (N, H, W, 3), as (N, C, H, W); labels as int64."""
    images, labels = torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1].astype(np.int64))
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2), labels
