"""Colour images: CIFAR archives in the published format, normalisation, shifts and mirror images."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vdbench import data, images
from vdbench.data import DataError, Dataset
from vdbench.files import PublishedPlain
from vdbench.images import CifarArchive, Normalisation, shifted_and_flipped
from vdbench.pictures import CIFAR10_JPEG

TRAIN, TEST = 12, 5


def tar(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


class Cifar:
    """A small archive as published: planar bytes behind one label byte, or behind a coarse and a fine one."""

    def __init__(self, folder: Path, label_bytes: int) -> None:
        rng = np.random.default_rng(label_bytes)
        self.pixels = rng.integers(0, 256, (TRAIN + TEST, 3, 32, 32), np.uint8)
        labels = np.stack(
            [np.arange(TRAIN + TEST) % (20 if label_bytes == 2 else 10), np.arange(TRAIN + TEST) % 100], 1
        )
        self.labels = labels[:, :label_bytes].astype(np.uint8)
        rows = np.concatenate([self.labels, self.pixels.reshape(len(labels), -1)], axis=1)
        self.files = {"x/one.bin": rows[:7].tobytes(), "x/two.bin": rows[7:TRAIN].tobytes(), "x/meta.txt": b"names"}
        self.files["x/test.bin"] = rows[TRAIN:].tobytes()
        self.mirror, self.cache, self.label_bytes = folder / "mirror", folder / "cache", label_bytes

    def source(self, content: bytes | None = None, label: int = 0, classes: int = 100) -> CifarArchive:
        """The archive in the mirror folder, as a data set `cifar100` under its true checksum."""
        content = tar(self.files) if content is None else content
        (self.mirror / "x").mkdir(parents=True, exist_ok=True)
        (self.mirror / "x" / "x.tar.gz").write_bytes(content)
        file = PublishedPlain("x", "x.tar.gz", len(content), hashlib.sha256(content).hexdigest())
        batches = {"train": {"one.bin": 7, "two.bin": 5}, "test": {"test.bin": 5}}
        return CifarArchive("cifar100", classes, file, batches, self.label_bytes, label, lambda: ())  # type: ignore[arg-type]


@pytest.fixture(params=[1, 2])
def cifar(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cifar:
    monkeypatch.delenv("VDBENCH_MIRROR", raising=False)
    return Cifar(tmp_path, request.param)


def test_archive_gives_the_published_images_and_the_chosen_labels(cifar: Cifar) -> None:
    for label in range(cifar.label_bytes):
        source = cifar.source(label=label)
        pixels, labels = source.read("train", cifar.cache, cifar.mirror)
        np.testing.assert_array_equal(pixels.transpose(0, 3, 1, 2), cifar.pixels[:TRAIN])
        np.testing.assert_array_equal(labels, cifar.labels[:TRAIN, label])
        np.testing.assert_array_equal(source.read("test", cifar.cache, None)[1], cifar.labels[TRAIN:, label])
        assert source.examples == {"train": TRAIN, "test": TEST}


def test_archive_is_fetched_as_it_is_and_available_follows(cifar: Cifar, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tar(cifar.files)
    monkeypatch.setitem(data.DATASETS, "cifar100", cifar.source(content))
    where = {"cache": cifar.cache, "mirror": cifar.mirror}
    assert data.available("cifar100", **where) == "in mirror"
    report = data.fetch("cifar100", **where)
    sha256 = hashlib.sha256(content).hexdigest()
    assert report["files"] == {"x.tar.gz": {"sha256": sha256, "bytes": len(content), "source": "mirror"}}
    assert (cifar.cache / "x" / "x.tar.gz").read_bytes() == content
    assert data.available("cifar100", **where) == "cached"


@pytest.mark.parametrize(
    "wrong", [lambda c: c[:-50], lambda c: c[:99] + bytes([c[99] ^ 1]) + c[100:], lambda c: c + b"x"]
)
def test_archive_that_is_not_the_published_one_is_refused(cifar: Cifar, wrong) -> None:
    source = cifar.source()
    path = cifar.mirror / "x" / "x.tar.gz"
    path.write_bytes(wrong(path.read_bytes()))
    with pytest.raises(DataError, match=r"refused: expected .* sha256 .* found .*VDBENCH_MIRROR"):
        source.read("train", cifar.cache, cifar.mirror)


def test_download_asks_for_the_archive_by_its_own_name(cifar: Cifar, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cifar.source()
    object.__setattr__(source, "servers", lambda: ("http://127.0.0.1:9/there/",))
    monkeypatch.setattr("vdbench.files.WAITS_S", ())
    with pytest.raises(DataError, match=r"http://127.0.0.1:9/there/x.tar.gz: .*\n.*a folder that has x/x.tar.gz"):
        source.read("train", cifar.cache, None)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda files: files.pop("x/two.bin"), "expected one file two.bin, found 0"),
        (lambda files: files.update({"y/two.bin": b""}), "expected one file two.bin, found 2"),
        (
            lambda files: files.update({"x/one.bin": files["x/one.bin"][:-1]}),
            r"one.bin: expected 7 records of 3,07\d bytes",
        ),
    ],
)
def test_archive_of_another_layout_is_refused(cifar: Cifar, change, found: str) -> None:
    change(cifar.files)
    with pytest.raises(DataError, match=found):
        cifar.source().read("train", cifar.cache, cifar.mirror)


def test_labels_beyond_the_classes_and_files_that_are_no_archive_are_refused(cifar: Cifar) -> None:
    with pytest.raises(DataError, match=r"class \d+ where there are 5, from 0"):
        cifar.source(classes=5).read("train", cifar.cache / "a", cifar.mirror)
    for content in (b"no archive", tar(cifar.files)[:-3000]):
        with pytest.raises(DataError, match="not readable as an archive"):
            cifar.source(content).read("train", cifar.cache / "b", cifar.mirror)
        (cifar.cache / "b" / "x" / "x.tar.gz").unlink()


def test_cifar_archives_are_those_that_are_published() -> None:
    from torchvision.datasets import CIFAR10

    known = {source.name: source for source in images.CIFAR}
    assert CIFAR10.url.startswith("https://www.cs.toronto.edu/~kriz/")
    assert all(source.servers() == ("https://www.cs.toronto.edu/~kriz",) for source in known.values())
    assert {source.file.name for source in known.values()} == {"cifar-10-binary.tar.gz", "cifar-100-binary.tar.gz"}
    assert all(source.examples == {"train": 50_000, "test": 10_000} for source in known.values())
    fine, coarse = known["cifar100"], known["cifar100_coarse"]
    assert (fine.num_classes, fine.label, coarse.num_classes, coarse.label) == (100, 1, 20, 0)
    assert CIFAR10_JPEG.name not in known


# --- normalisation -----------------------------------------------------------------------------------------------


def small(count: int = 30, size: int = 8) -> Dataset:
    pixels = torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    pixels[:, 1] //= 3
    labels = torch.arange(count) % 10
    normalisation = Normalisation.of(pixels)
    return Dataset("cifar10", pixels, labels, normalisation(pixels[:5]), labels[:5], 10, normalisation)


def test_every_channel_is_normalised() -> None:
    dataset = small()
    batch, labels = dataset.train_batch(torch.arange(30))
    assert batch.dtype == torch.float32 and torch.equal(labels, dataset.train_labels)
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3), correction=0), torch.ones(3))
    assert torch.equal(dataset.eval_images, batch[:5])


def test_normalisation_of_one_value_is_finite() -> None:
    grey = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    assert torch.equal(Normalisation.of(grey)(grey), torch.zeros(2, 3, 4, 4))


def test_data_set_in_memory_is_normalised_with_the_training_part(cifar: Cifar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.DATASETS, "cifar100", cifar.source())
    full = data.load("cifar100", cache=cifar.cache, mirror=cifar.mirror)
    assert full.train_images.dtype == torch.uint8 and full.train_images.shape == (TRAIN, 3, 32, 32)
    assert full.eval_images.dtype == torch.float32 and full.eval_images.shape == (TEST, 3, 32, 32)
    part = data.load("cifar100", validation_size=4, cache=cifar.cache)
    assert part.normalisation and part.train_images.shape[0] == TRAIN - 4
    expected = Normalisation.of(part.train_images)
    assert torch.equal(part.normalisation.mean, expected.mean) and torch.equal(part.normalisation.std, expected.std)
    moved = part.to("cpu")
    assert moved.normalisation and torch.equal(moved.normalisation.mean, expected.mean)


# --- shifts and mirror images ------------------------------------------------------------------------------------


def test_augmentation_is_a_shift_with_reflection_and_perhaps_a_mirror_image() -> None:
    pixels = small(200, 10).train_images
    found = shifted_and_flipped(pixels, torch.arange(200), torch.Generator().manual_seed(0))
    assert found.shape == pixels.shape and found.is_contiguous(memory_format=torch.channels_last)
    padded = np.pad(pixels.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    seen = set()
    for place in range(200):
        for down in range(9):
            for right in range(9):
                window = padded[place, :, down : down + 10, right : right + 10]
                for mirrored, view in ((False, window), (True, window[:, :, ::-1])):
                    if (view == found[place].numpy()).all():
                        seen.add((place, down, right, mirrored))
    assert {place for place, *_ in seen} == set(range(200))  # every image is some window of its own padding
    assert {down for _, down, _, _ in seen} == {right for _, _, right, _ in seen} == set(range(9))
    assert 70 <= sum(mirrored for *_, mirrored in seen) <= 130


def test_augmentation_follows_its_generator_and_leaves_the_images_and_torchs_own_alone() -> None:
    dataset, indices = small(), torch.tensor([3, 1, 1, 20])
    before = dataset.train_images.clone()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    draws = [dataset.train_batch(indices, torch.Generator().manual_seed(seed))[0] for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][1], draws[0][2])  # the same image twice, shifted twice
    assert torch.equal(dataset.train_images, before) and torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("size", [5, 6])
def test_augmentation_of_the_smallest_images(size: int) -> None:
    pixels = small(8, size).train_images
    found = shifted_and_flipped(pixels, torch.arange(8), torch.Generator().manual_seed(0))
    assert all(set(a.flatten().tolist()) <= set(b.flatten().tolist()) for a, b in zip(found, pixels, strict=True))


@pytest.mark.real_data
def test_real_cifar10_as_jpeg() -> None:
    if data.available("cifar10_jpeg") == "only by mirror folder":
        pytest.skip("CIFAR-10 as JPEG is neither in the cache nor in VDBENCH_MIRROR")
    pixels, labels = CIFAR10_JPEG.read("test", None, None)
    assert pixels.shape == (10_000, 32, 32, 3) and np.bincount(labels).tolist() == [1000] * 10
