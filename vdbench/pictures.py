"""Data sets of picture files, `train/<class>/<picture>` and `test/<class>/<picture>`, in a folder or a tar archive."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from vdbench.files import SETTING, DataError, Folders, FromFiles, PublishedPlain, obtain
from vdbench.images import Arrays, Split
from vdbench.mistakes import reason

PREFIX = "folder:"
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # others start programs, or have been known to
LARGEST_PICTURE = 1 << 24  # pixels
LARGEST_READ = 1 << 26  # bytes of a file in an archive, or of what an archive says of it
LARGEST_ARCHIVE = 4 << 30  # bytes of all of them
_UNPACKERS: dict[bytes, Callable[[BinaryIO], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")


class Tree:
    """Picture files by split and class, two classes at least, every one in both splits and none of them empty.

    What is hidden, and what lies outside `train` and `test`, are passed over; any other file counts as a picture.

    Raises:
        DataError: the tree is not as described; the message names the file or folder.
    """

    def __init__(self, where: str, folders: Sequence[str], files: Mapping[str, bytes | Path]) -> None:
        self.where, self.files = where, files
        self.names: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
        for name in folders:
            split, *rest = PurePosixPath(name).parts or ("",)
            if split in self.names and len(rest) == 1 and not rest[0].startswith("."):
                self.names[split].setdefault(rest[0], [])
        for name in sorted(files):
            split, *rest = PurePosixPath(name).parts
            if split not in self.names or any(part.startswith(".") for part in rest):
                continue
            if len(rest) != 2:
                raise DataError(f"{where}/{name}: pictures belong in {split}/<class>/, no higher and no deeper")
            self.names[split].setdefault(rest[0], []).append(name)
        self._check()

    def _check(self) -> None:
        for split, classes in self.names.items():
            if not classes:
                raise DataError(f"{self.where}: has no {split}/<class>/ at its top level")
            for name, files in classes.items():
                if not files:
                    raise DataError(f"{self.where}/{split}/{name}: a class without pictures; add some or delete it")
        for split, other in (("train", "test"), ("test", "train")):
            for name in sorted(self.names[other].keys() - self.names[split].keys()):
                raise DataError(f"{self.where}/{other}/{name}: a class that {split} does not have")
        if len(self.classes) == 1:
            raise DataError(f"{self.where}: {self.classes[0]} is the only class; two are the least to tell apart")

    @property
    def classes(self) -> list[str]:
        """Names of the classes; the place of a name is its label."""
        return sorted(self.names["train"])

    @property
    def examples(self) -> dict[str, int]:
        return {split: sum(map(len, classes.values())) for split, classes in self.names.items()}

    def read(self, split: Split) -> Arrays:
        """Images (N, H, W, 3) uint8, ordered by class and file name, and labels (N,) int64. Raises DataError."""
        names = [name for label in self.classes for name in self.names[split][label]]
        labels = np.repeat(np.arange(len(self.classes)), [len(self.names[split][label]) for label in self.classes])
        first = self.names["train"][self.classes[0]][0]
        size = self._decoded(first).shape
        try:
            images = np.empty((len(names), *size), np.uint8)
        except MemoryError:
            raise DataError(
                f"{self.where}: {len(names):,} pictures of {_size(size)} do not fit in memory; make them smaller"
            ) from None
        for place, name in enumerate(names):
            image = self._decoded(name)
            if image.shape != size:
                raise DataError(
                    f"{self.where}/{name}: {_size(image.shape)}, where {first} is {_size(size)}; "
                    "pictures must all be of one size"
                )
            images[place] = image
        return images, labels

    def _decoded(self, name: str) -> np.ndarray:
        from PIL import Image

        file = self.files[name]
        try:
            with Image.open(file if isinstance(file, Path) else io.BytesIO(file), formats=FORMATS) as image:
                if image.width * image.height > LARGEST_PICTURE:
                    raise ValueError(f"{image.width} x {image.height} pixels")
                if _has_more_than_8_bits(image):
                    raise ValueError("it has more than 8 bits a channel; convert it")
                return np.asarray(image.convert("RGB"))
        except Exception as error:  # every format's decoder has its own way of giving up
            raise DataError(
                f"{self.where}/{name}: not readable as a picture ({' '.join(str(error).split())}); replace or delete it"
            ) from None


def _has_more_than_8_bits(image: Any) -> bool:
    """Of 16 bits a colour Pillow makes 8; that there were more, only what it tells its decoder says."""
    return image.mode[0] in "IF" or any(
        ";16" in str(told) or (codec.startswith("ppm") and told[-1] > 255) for codec, _, _, told in image.tile
    )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels"


def in_folder(root: Path) -> Tree:
    """The pictures in a folder. Raises DataError."""
    folders: list[str] = []
    files: dict[str, bytes | Path] = {}
    for split in ("train", "test"):
        for place, inner, names in os.walk(root / split, onerror=_refuse, followlinks=True):
            here = Path(place).relative_to(root)
            inner[:] = [name for name in inner if not name.startswith(".")]
            folders += [(here / name).as_posix() for name in inner]
            files |= {(here / name).as_posix(): root / here / name for name in names}
            if len(here.parts) > 2 and any(not name.startswith(".") for name in names):
                break  # too deep, and refused: not worth following links for, which may go in circles
    return Tree(str(root), folders, files)


def _refuse(error: OSError) -> None:
    """A folder that is not there has its own message, later."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise DataError(f"{error.filename}: not readable ({error.strerror}); change its permissions") from None


class _Bounded:
    """A stream that is not read far at once: neither a file of an archive nor the length it gives of one can be
    believed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._read = stream, 0

    def read(self, size: int) -> bytes:
        self._read += size
        if not 0 <= size <= LARGEST_READ or self._read > LARGEST_ARCHIVE:
            raise tarfile.ReadError(f"says that {size:,} bytes come next, after {self._read - size:,}")
        return self._stream.read(size)

    def seek(self, place: int) -> int:
        return self._stream.seek(place)

    def tell(self) -> int:
        return self._stream.tell()


def in_archive(stream: BinaryIO, where: str) -> Tree:
    """The pictures in a tar archive, compressed or not; nothing is unpacked to disk. Raises DataError."""
    folders: list[str] = []
    files: dict[str, bytes | Path] = {}
    start = stream.read(8)
    stream.seek(0)
    unpack = next((unpack for magic, unpack in _UNPACKERS.items() if start.startswith(magic)), None)
    try:
        source: Any = _Bounded(unpack(stream) if unpack else stream)
        with tarfile.open(fileobj=source, mode="r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                    raise DataError(
                        f"{where}: {member.name}: links and paths that lead outside are refused; pack plain files"
                    )
                if member.size > LARGEST_READ:
                    raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes, more than any picture")
                if member.isdir():
                    folders.append(path.as_posix())
                else:
                    files[path.as_posix()] = archive.extractfile(member).read()  # type: ignore[union-attr]
        while source.read(1 << 20):  # what comes last, a checksum for one
            pass
    except (tarfile.TarError, lzma.LZMAError, zlib.error, OSError, EOFError, ValueError, MemoryError) as error:
        raise DataError(f"{where}: not readable as a tar archive ({reason(error)}); pack it again") from None
    return Tree(where, folders, files)


@dataclass(frozen=True)
class PictureFolder:
    """Pictures of the user's own: a folder, or a tar archive, in the mirror folder."""

    name: str
    path: Path
    tree: Tree

    @classmethod
    def named(cls, name: str, mirror: Path | None) -> "PictureFolder":
        """The data set `folder:<name>`, from the mirror's `<name>` or `<name>.tar`, which may be compressed.

        Raises DataError: it is not there, or not as described in `Tree`.
        """
        wanted, root = name.removeprefix(PREFIX), Folders.in_force(None, mirror).mirror
        if root is None:
            raise DataError(
                f"{name}: a folder or tar archive {wanted} is looked for in the mirror folder; set {SETTING}"
            )
        for suffix in ("", *TAR_SUFFIXES):
            path = root / (wanted + suffix)
            if path.is_dir():
                return cls(name, path, in_folder(path))
            if path.is_file():
                with path.open("rb") as stream:
                    return cls(name, path, in_archive(stream, str(path)))
        raise DataError(
            f"{name}: the mirror folder {root} has neither a folder {wanted} nor an archive {wanted} with one of the "
            f"endings {', '.join(TAR_SUFFIXES)}; put it there"
        )

    @property
    def num_classes(self) -> int:
        return len(self.tree.classes)

    @property
    def examples(self) -> dict[str, int]:
        return self.tree.examples

    def fetch(self, cache: Path | None, mirror: Path | None) -> dict[str, dict[str, Any]]:
        """Reads every picture, so that one that is wrong is found before anything is trained."""
        images = [self.tree.read(split)[0] for split in ("train", "test")]
        digest = hashlib.sha256(b"".join(part.tobytes() for part in images)).hexdigest()
        size = sum(part.nbytes for part in images)
        return {self.path.name: {"sha256": digest, "bytes": size, "source": "mirror"}}

    def read(self, split: Split, cache: Path | None, mirror: Path | None) -> Arrays:
        return self.tree.read(split)

    def available(self, cache: Path | None, mirror: Path | None) -> str:
        return "in mirror"


@dataclass(frozen=True)
class PictureArchive(FromFiles):
    """A published tar archive of pictures, known also by what its pictures look like when decoded.

    `pixels_sha256` are digests of the images of each split: JPEG decoders may differ.
    """

    name: str
    num_classes: int
    file: PublishedPlain
    examples: dict[str, int]
    pixels_sha256: dict[str, str]
    servers: Callable[[], Sequence[str]]

    @property
    def all_files(self) -> list[PublishedPlain]:
        return [self.file]

    def read(self, split: Split, cache: Path | None, mirror: Path | None) -> Arrays:
        """Images (N, H, W, 3) uint8 and labels (N,) int64. Raises DataError."""
        content, _ = obtain(self.file, Folders.in_force(cache, mirror), self.servers)
        images, labels = in_archive(io.BytesIO(content), self.file.name).read(split)
        digest = hashlib.sha256(images.tobytes()).hexdigest()
        if digest != self.pixels_sha256[split]:
            import PIL

            raise DataError(
                f"{self.name}: refused: expected pixels with sha256 {self.pixels_sha256[split]}, found {digest} with "
                f"Pillow {PIL.__version__}; install another version of it, one that decodes JPEG with libjpeg-turbo"
            )
        return images, labels


CIFAR10_JPEG = PictureArchive(
    name="cifar10_jpeg",
    num_classes=10,
    file=PublishedPlain(
        "cifar10_jpeg",
        "cifar10-jpeg.tar.xz",
        18_546_844,
        "2c1d2f26013ac128cd623c2d7737a86995990e43fc3d850fe825a66d47d3b8a9",
    ),
    examples={"train": 50_000, "test": 10_000},
    pixels_sha256={
        "train": "bf3aabd52be912dae02a0435296c4dab5289524b57f55cd162dc4796935a611b",
        "test": "5a6aa8185204d80b65d3dfb540696dadd5f10d185ded226a96665d3e0fc6259f",
    },
    servers=lambda: (),  # nowhere: it is had from whoever has it, and known by its digest
)
