"""Pictures of the user's own, in a folder or a tar archive: what is in memory at the end, and what is refused."""

import hashlib
import io
import os
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from vdbench import data
from vdbench.config import SuiteError
from vdbench.data import DataError
from vdbench.files import PublishedPlain
from vdbench.pictures import CIFAR10_JPEG, PictureArchive

SIZE = (6, 5)  # width, height
NAMES = (
    *("train/cat/2.png", "train/cat/1.png", "train/cat/3.png", "train/cat/.hidden", "train/dog/b.png"),
    *("train/dog/a.png", "test/cat/9.png", "test/dog/8.png", "README.txt"),
)


def picture(seed: int, size: tuple[int, int] = SIZE, mode: str = "RGB", form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, form)
    return stream.getvalue()


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror folder with pictures of two kinds of pets: three and two to train on, one of each to test on."""
    monkeypatch.setenv("VDBENCH_MIRROR", str(tmp_path / "mirror"))
    for number, name in enumerate(NAMES):
        path = tmp_path / "mirror" / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number) if path.suffix == ".png" else b"no picture")
    return tmp_path / "mirror"


def packed(mirror: Path, suffix: str) -> None:
    """The folder as a tar archive in its stead."""
    mode = {".tar": "w", ".tgz": "w:gz", ".tar.xz": "w:xz"}[suffix]
    with tarfile.open(mirror / f"pets{suffix}", mode) as archive:  # type: ignore[call-overload]
        for split in ("train", "test"):
            archive.add(mirror / "pets" / split, split)
    shutil.rmtree(mirror / "pets")


@pytest.mark.parametrize("suffix", ["", ".tar", ".tgz", ".tar.xz"])
def test_folder_and_archive_give_the_pictures_by_class_and_name(mirror: Path, suffix: str) -> None:
    first = np.asarray(Image.open(mirror / "pets/train/cat/1.png"))
    if suffix:
        packed(mirror, suffix)
    loaded = data.load("folder:pets")
    assert loaded.name == "folder:pets" and loaded.num_classes == 2
    assert loaded.train_labels.tolist() == [0, 0, 0, 1, 1] and loaded.eval_labels.tolist() == [0, 1]
    assert loaded.train_images.shape == (5, 3, 5, 6) and loaded.eval_images.shape == (2, 3, 5, 6)
    np.testing.assert_array_equal(loaded.train_images[0].permute(1, 2, 0).numpy(), first)
    report = data.fetch("folder:pets")
    assert report["examples"] == {"train": 5, "test": 2} and data.available("folder:pets") == "in mirror"
    assert report["files"][f"pets{suffix}"]["bytes"] == 7 * 5 * 6 * 3


def test_hash_of_a_data_set_follows_its_pictures(mirror: Path) -> None:
    before = data.load("folder:pets").sha256()
    assert data.load("folder:pets").sha256() == before
    (mirror / "pets/train/dog/a.png").write_bytes(picture(99))
    assert data.load("folder:pets").sha256() != before


def test_grey_and_jpeg_pictures_are_colour_pictures_too(mirror: Path) -> None:
    (mirror / "pets/train/cat/1.png").write_bytes(picture(1, mode="L"))
    (mirror / "pets/train/cat/4.jpg").write_bytes(picture(2, form="JPEG"))
    images = data.load("folder:pets").train_images
    assert images.shape == (6, 3, 5, 6) and (images[0][0] == images[0][1]).all()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def deep(path: Path) -> None:
    """A PNG file of 6 x 5 pixels with 16 bits a colour, which Pillow does not write."""
    header = struct.pack(">IIBBBBB", 6, 5, 16, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(5 * bytes(1 + 6 * 3 * 2))), (b"IEND", b"")
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


WRONG = {
    "truncated": (lambda p: cut(p / "train/dog/a.png"), "train/dog/a.png: not readable as a picture"),
    "text": (lambda p: (p / "test/cat/9.png").write_text("hello"), "test/cat/9.png: not readable as a picture"),
    "empty file": (lambda p: (p / "test/cat/9.png").write_bytes(b""), "test/cat/9.png: not readable as a picture"),
    "stray file": (
        lambda p: (p / "train/x.png").write_bytes(picture(1)),
        "train/x.png: pictures belong in train/<class>/",
    ),
    "empty class": (lambda p: emptied(p / "train/dog"), "train/dog: a class without pictures"),
    "only tested": (lambda p: shutil.copytree(p / "test/cat", p / "test/cow"), "test/cow: a class that train does not"),
    "only trained": (
        lambda p: shutil.copytree(p / "test/cat", p / "train/cow"),
        "train/cow: a class that test does not",
    ),
    "one class": (
        lambda p: [shutil.rmtree(p / split / "dog") for split in ("train", "test")],
        "cat is the only class; two are the least",
    ),
    "no test": (lambda p: shutil.rmtree(p / "test"), "has no test/<class>/"),
    "other size": (
        lambda p: (p / "train/dog/b.png").write_bytes(picture(1, (6, 7))),
        "train/dog/b.png: 6 x 7 pixels, where train/cat/1.png is 6 x 5 pixels",
    ),
    "sixteen bits": (
        lambda p: Image.fromarray(np.full((5, 6), 40_000, np.uint16)).save(p / "train/dog/b.png"),
        "train/dog/b.png: not readable as a picture .it has more than 8 bits a channel; convert it",
    ),
    "sixteen bits a colour": (
        lambda p: deep(p / "train/dog/b.png"),
        "train/dog/b.png: not readable as a picture .it has more than 8 bits a channel",
    ),
    "ten bits a colour": (
        lambda p: (p / "train/dog/b.ppm").write_bytes(b"P6 6 5 1023\n" + bytes(2 * 3 * 30)),
        "train/dog/b.ppm: not readable as a picture .it has more than 8 bits a channel",
    ),
    "other test size": (
        lambda p: (p / "test/dog/8.png").write_bytes(picture(1, (7, 5))),
        "test/dog/8.png: 7 x 5 pixels",
    ),
}


@pytest.mark.parametrize("suffix", ["", ".tar"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(mirror: Path, wrong: str, suffix: str) -> None:
    spoil, found = WRONG[wrong]
    spoil(mirror / "pets")
    if wrong == "no test" and suffix:
        (mirror / "pets/test").mkdir()
    if suffix:
        packed(mirror, suffix)
    for use in (data.fetch, data.load):
        with pytest.raises(DataError, match=found):
            use("folder:pets")


def test_hidden_folders_are_no_classes(mirror: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(mirror / "pets" / split / "cat", mirror / "pets" / split / ".ipynb_checkpoints")
    assert data.load("folder:pets").num_classes == 2
    packed(mirror, ".tar")
    assert data.load("folder:pets").num_classes == 2


def test_links_within_a_folder_are_followed_and_broken_ones_named(mirror: Path) -> None:
    shutil.move(mirror / "pets/train/cat", mirror / "cats")
    (mirror / "pets/train/cat").symlink_to(mirror / "cats")
    assert len(data.load("folder:pets").train_labels) == 5
    (mirror / "cats/4.png").symlink_to(mirror / "nowhere.png")
    with pytest.raises(DataError, match=r"train/cat/4\.png: not readable as a picture"):
        data.load("folder:pets")


def test_links_in_circles_are_refused_and_not_followed_for_ever(mirror: Path) -> None:
    for name in ("cat", "dog"):
        (mirror / f"pets/train/{name}/up").symlink_to("..")
    with pytest.raises(DataError, match=r"train/\w+/up/\w+/\w\.png: pictures belong in train/<class>/"):
        data.load("folder:pets")


def test_hidden_folders_are_not_walked(mirror: Path) -> None:
    for name in ("cat", "dog"):
        (mirror / f"pets/train/{name}/.up").symlink_to("..")
    assert len(data.load("folder:pets").train_labels) == 5


def test_folders_that_may_not_be_read_are_named(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def guarded(path: str):
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataError, match=r"train/dog: not readable \(Permission denied\); change its permissions"):
        data.fetch("folder:pets")


@pytest.mark.parametrize("kind", ["symbolic", "hard", "above", "absolute", "device"])
def test_archives_with_links_or_ways_out_are_refused(mirror: Path, kind: str) -> None:
    packed(mirror, ".tar")
    name = {"above": "train/../../x.png", "absolute": "/train/cat/x.png"}.get(kind, "train/cat/x.png")
    member = tarfile.TarInfo(name)
    member.type = {"symbolic": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}.get(
        kind, tarfile.REGTYPE
    )
    member.linkname = "train/cat/1.png" if member.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    with tarfile.open(mirror / "pets.tar", "a") as archive:
        archive.addfile(member, io.BytesIO())
    with pytest.raises(DataError, match=f"pets.tar: {name}: links and paths that lead outside are refused"):
        data.load("folder:pets")


@pytest.mark.parametrize("suffix", [".tar", ".tgz", ".tar.xz"])
def test_truncated_archive_is_named(mirror: Path, suffix: str) -> None:
    packed(mirror, suffix)
    path = mirror / f"pets{suffix}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"pets{suffix}: not readable as a tar archive"):
        data.load("folder:pets")


def test_folder_that_is_not_there_says_where_it_is_looked_for(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"mirror has neither a folder plants nor .* \.tar, \.tar\.gz, "):
        data.load("folder:plants")
    monkeypatch.delenv("VDBENCH_MIRROR")
    with pytest.raises(DataError, match="looked for in the mirror folder; set the mirror setting"):
        data.load("folder:pets")


def test_validation_split_of_a_folder(mirror: Path) -> None:
    loaded = data.load("folder:pets", validation_size=2)
    assert len(loaded.train_labels) == 3 and len(loaded.eval_labels) == 2


def test_decoder_that_decodes_otherwise_is_refused(mirror: Path) -> None:
    packed(mirror, ".tar")
    content = (mirror / "pets.tar").read_bytes()
    file = PublishedPlain("", "pets.tar", len(content), hashlib.sha256(content).hexdigest())
    pixels = data.load("folder:pets").train_images.permute(0, 2, 3, 1).numpy()
    digests = {"train": hashlib.sha256(pixels.tobytes()).hexdigest(), "test": "0" * 64}
    source = PictureArchive("pets", 2, file, {"train": 5, "test": 2}, digests, lambda: ())
    np.testing.assert_array_equal(source.read("train", mirror, None)[0], pixels)
    with pytest.raises(DataError, match=r"expected pixels with sha256 000.*with Pillow"):
        source.read("test", mirror, None)


def test_archive_that_is_published_nowhere_says_what_to_have_where(tmp_path: Path, mirror: Path) -> None:
    with pytest.raises(DataError, match=r"a folder that has cifar10_jpeg/cifar10-jpeg\.tar\.xz"):
        CIFAR10_JPEG.read("test", tmp_path / "cache", None)


def test_images_that_do_not_fit_the_net_are_refused_before_training(mirror: Path, tmp_path: Path) -> None:
    spec = tiny.spec("dense", "vgglike_k025", batch_size=1).model_copy(update={"dataset": "folder:pets"})
    with pytest.raises(
        SuiteError, match=r"vgglike_k025 takes images \(3, 32, 32\).* those of folder:pets are \(3, 5, 6\)"
    ):
        tiny.train(spec, tmp_path / "run", data.load("folder:pets"))
