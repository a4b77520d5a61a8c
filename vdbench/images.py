"""Colour images: the CIFAR archives, normalisation, and shifts and mirror images of what is trained on."""

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vdbench.files import DataError, Folders, FromFiles, PublishedPlain, obtain

Split = Literal["train", "test"]
Arrays = tuple[np.ndarray, np.ndarray]

SHIFT = 4  # pixels, the largest either way


@dataclass(frozen=True)
class Normalisation:
    """Mean 0 and standard deviation 1 for every channel of the images it was made from.

    Attributes:
        mean, std: (C, 1, 1) float32, of bytes.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Tensor) -> "Normalisation":
        """From uint8 images (N, C, H, W). Sums of whole numbers: the same on every machine."""
        values = torch.arange(256, dtype=torch.float64)
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
        shares = counts.double() / counts.sum(1, keepdim=True)
        mean = shares @ values
        std = (shares @ values.square() - mean.square()).clamp_min(1.0).sqrt()  # a channel of one value stays finite
        return cls(*(moment.float()[:, None, None] for moment in (mean, std)))

    def __call__(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std

    def to(self, device: str) -> "Normalisation":
        return Normalisation(self.mean.to(device), self.std.to(device))


def shifted_and_flipped(images: Tensor, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Some of the images, each shifted by up to 4 pixels either way and, one in two, mirrored left to right.

    What a shift leaves free is filled with the image's reflection at its edge. On the images' device, without waiting
    for it.

    Args:
        images: (N, C, H, W). indices: (B,) int64. generator: of the images' device; what it draws decides all.

    Returns:
        (B, C, H, W), in the memory order `channels_last`.
    """
    count, (height, width), device = len(indices), images.shape[-2:], images.device
    shifts = torch.randint(-SHIFT, SHIFT + 1, (2, count, 1), generator=generator, device=device)
    mirrored = torch.randint(2, (count, 1), generator=generator, device=device, dtype=torch.bool)
    rows, columns = (
        _reflected(torch.arange(size, device=device) + shift, size)
        for size, shift in zip((height, width), shifts, strict=True)
    )
    columns = torch.where(mirrored, width - 1 - columns, columns)
    picked = images.permute(0, 2, 3, 1)[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def _reflected(places: Tensor, size: int) -> Tensor:
    """Places outside 0 ... size - 1 as their mirror images inside."""
    return (size - 1 - (size - 1 - places.abs()).abs()).abs()


@dataclass(frozen=True)
class CifarArchive(FromFiles):
    """CIFAR in its binary version: records of one or two label bytes, then 32 x 32 red, green and blue bytes
    (Krizhevsky 2009). The Python version is not used, because unpickling it could execute code.

    `batches` gives the number of records of every file; of a record's `label_bytes` labels, number `label` is used.
    """

    name: str
    num_classes: int
    file: PublishedPlain
    batches: dict[Split, dict[str, int]]
    label_bytes: int = 1
    label: int = 0
    servers: Callable[[], Sequence[str]] = lambda: ("https://www.cs.toronto.edu/~kriz",)

    @property
    def examples(self) -> dict[str, int]:
        return {split: sum(batches.values()) for split, batches in self.batches.items()}

    @property
    def all_files(self) -> list[PublishedPlain]:
        return [self.file]

    def read(self, split: Split, cache: Path | None, mirror: Path | None) -> Arrays:
        """Images (N, 32, 32, 3) and labels (N,), uint8. Raises DataError."""
        content, _ = obtain(self.file, Folders.in_force(cache, mirror), self.servers)
        try:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                records = np.concatenate([self._records(archive, *batch) for batch in self.batches[split].items()])
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{self.file.name}: not readable as an archive ({error})") from None
        labels = records[:, self.label]
        if labels.max() >= self.num_classes:
            raise DataError(f"{self.file.name}: class {labels.max()} where there are {self.num_classes}, from 0")
        images = records[:, self.label_bytes :].reshape(-1, 3, 32, 32)
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels

    def _records(self, archive: tarfile.TarFile, name: str, count: int) -> np.ndarray:
        found = [member for member in archive if member.isfile() and Path(member.name).name == name]
        if len(found) != 1:
            raise DataError(f"{self.file.name}: expected one file {name}, found {len(found)}")
        size = self.label_bytes + 3 * 32 * 32
        if found[0].size != count * size:
            raise DataError(
                f"{self.file.name}: {name}: expected {count:,} records of {size:,} bytes, found {found[0].size:,} bytes"
            )
        content = archive.extractfile(found[0]).read()  # type: ignore[union-attr]
        return np.frombuffer(content, np.uint8).reshape(count, size)


_CIFAR100 = PublishedPlain(
    "cifar100",
    "cifar-100-binary.tar.gz",
    168_513_733,
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
)
_CIFAR100_BATCHES: dict[Split, dict[str, int]] = {"train": {"train.bin": 50_000}, "test": {"test.bin": 10_000}}
CIFAR = (
    CifarArchive(
        name="cifar10",
        num_classes=10,
        file=PublishedPlain(
            "cifar10",
            "cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
        batches={
            "train": {f"data_batch_{number}.bin": 10_000 for number in range(1, 6)},
            "test": {"test_batch.bin": 10_000},
        },
    ),
    CifarArchive("cifar100", 100, _CIFAR100, _CIFAR100_BATCHES, label_bytes=2, label=1),
    # the 20 superclasses, which the paper's authors' loader reads
    CifarArchive("cifar100_coarse", 20, _CIFAR100, _CIFAR100_BATCHES, label_bytes=2, label=0),
)
