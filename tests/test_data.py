"""Data sets: where files come from, what is refused, and what is in memory at the end. No network but 127.0.0.1."""

import errno
import gzip
import hashlib
import http.server
import io
import json
import random
import struct
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from vdbench import config, data, files
from vdbench.data import DataError, IdxArchive, IdxFile

COUNTS = {"train": 30, "test": 10}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


def entry(name: str, array: np.ndarray) -> IdxFile:
    return IdxFile.of("mnist", name, array.shape, hashlib.sha256(idx(array)).hexdigest())


class Server:
    """Files over HTTP; `script[path]` is consumed a request at a time before the file itself is served."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents
        self.script: dict[str, list[int | bytes]] = {}
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                queue = outer.script.get(self.path, [])
                answer = queue.pop(0) if queue else outer.contents.get(self.path.rpartition("/")[2], 404)
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def address(self, folder: str) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/{folder}/"

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


class World:
    """A small `mnist`, the two servers that publish it, a cache and a mirror folder (both empty)."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.arrays = {
            name: (rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 10)
            for name, n in COUNTS.items()
        }
        self.entries = {
            name: (entry(f"{name}-images", images), entry(f"{name}-labels", labels))
            for name, (images, labels) in self.arrays.items()
        }
        self.raw = {
            file.name: idx(array)
            for name in COUNTS
            for file, array in zip(self.entries[name], self.arrays[name], strict=True)
        }
        self.cache, self.mirror = folder / "cache", folder / "mirror"
        self.mirror.mkdir()
        self.server = Server({f"{name}.gz": gzip.compress(content) for name, content in self.raw.items()})
        self.archive = IdxArchive("mnist", 10, self.entries, self.servers)  # type: ignore[arg-type]

    def servers(self) -> list[str]:
        return [self.server.address("one"), self.server.address("two")]

    def fill(self, root: Path, *, gzipped: bool) -> None:
        (root / "mnist").mkdir(parents=True, exist_ok=True)
        for name, content in self.raw.items():
            path = root / "mnist" / (f"{name}.gz" if gzipped else name)
            path.write_bytes(gzip.compress(content) if gzipped else content)

    def fetch(self, mirror: bool = False) -> dict:
        return data.fetch("mnist", cache=self.cache, mirror=self.mirror if mirror else None)

    def load(self, validation_size: int = 0) -> data.Dataset:
        return data.load("mnist", validation_size=validation_size, cache=self.cache)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, listed and not waited."""
    seen: list[float] = []
    monkeypatch.setattr(files.time, "sleep", seen.append)
    return seen


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[World]:
    made = World(tmp_path)
    monkeypatch.setitem(data.DATASETS, "mnist", made.archive)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("VDBENCH_MIRROR", raising=False)
    monkeypatch.delenv("VDBENCH_CACHE", raising=False)
    yield made
    made.server.close()


def sources(report: dict) -> set[str]:
    return {entry["source"].rpartition("/")[0] or entry["source"] for entry in report["files"].values()}


# --- where files come from ---------------------------------------------------------------------------------------


def test_download_fills_the_cache_with_the_published_content_and_is_reported(world: World) -> None:
    report = world.fetch()
    assert report["dataset"] == "mnist" and report["examples"] == COUNTS
    for name, content in world.raw.items():
        assert (world.cache / "mnist" / name).read_bytes() == content
        assert report["files"][name] == {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "source": f"{world.servers()[0]}{name}.gz",
        }
    assert json.loads(json.dumps(report)) == report
    assert sorted(path.name for path in (world.cache / "mnist").iterdir()) == sorted(world.raw)  # nothing temporary


def test_cache_is_used_without_network_or_mirror(world: World) -> None:
    world.fetch()
    world.server.requests.clear()
    assert sources(world.fetch(mirror=True)) == {"cache"}
    world.load()
    assert world.server.requests == []


@pytest.mark.parametrize("gzipped", [True, False])
def test_mirror_comes_before_download_gzipped_or_plain(world: World, gzipped: bool) -> None:
    world.fill(world.mirror, gzipped=gzipped)
    assert sources(world.fetch(mirror=True)) == {"mirror"}
    assert world.server.requests == []
    assert sources(world.fetch()) == {"cache"}  # kept: the mirror is not needed again


def test_a_recompressed_archive_is_the_same_data(world: World) -> None:
    world.fill(world.mirror, gzipped=True)
    for name, content in world.raw.items():
        (world.mirror / "mnist" / f"{name}.gz").write_bytes(gzip.compress(content, compresslevel=1))
    assert sources(world.fetch(mirror=True)) == {"mirror"}


def test_only_what_the_mirror_lacks_is_downloaded(world: World) -> None:
    world.fill(world.mirror, gzipped=True)
    (world.mirror / "mnist" / "test-labels.gz").unlink()
    world.fetch(mirror=True)
    assert world.server.requests == ["/one/test-labels.gz"]


def test_environment_variable_overrides_the_mirror_setting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.fill(world.mirror, gzipped=True)
    monkeypatch.setenv("VDBENCH_MIRROR", str(world.mirror))
    report = data.fetch("mnist", cache=world.cache, mirror=world.mirror / "overridden")
    assert sources(report) == {"mirror"}


def test_default_cache_is_the_environment_variable_else_in_the_home_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data.fetch("mnist")
    assert (tmp_path / "home/.cache/vdbench/mnist/test-labels").exists()
    monkeypatch.setenv("VDBENCH_CACHE", str(tmp_path / "elsewhere"))
    data.fetch("mnist")
    assert (tmp_path / "elsewhere/mnist/test-labels").exists()


@pytest.mark.parametrize("by_environment", [True, False])
def test_mirror_that_does_not_exist_is_an_error_even_with_a_full_cache(
    world: World, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    world.fetch()
    missing = world.mirror / "nowhere"
    if by_environment:
        monkeypatch.setenv("VDBENCH_MIRROR", str(missing))
    with pytest.raises(DataError, match="does not exist") as caught:
        data.load("mnist", cache=world.cache, mirror=None if by_environment else missing)
    assert str(missing) in str(caught.value) and "VDBENCH_MIRROR" in str(caught.value)


def test_cache_that_cannot_be_written_says_which_setting_to_change(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "atomic_write", full)
    with pytest.raises(DataError, match=r"train-images: cannot be written \(No space left.*VDBENCH_CACHE"):
        world.fetch()


def test_available_follows_the_files(world: World) -> None:
    def now() -> str:
        return data.available("mnist", world.cache, world.mirror)

    assert now() == "to download"
    world.fill(world.mirror, gzipped=True)
    assert now() == "in mirror"
    world.fetch(mirror=True)
    assert now() == "cached"
    (world.cache / "mnist" / "test-labels").unlink()
    assert now() == "in mirror"
    (world.mirror / "mnist" / "test-labels.gz").unlink()
    assert now() == "to download"
    assert data.available("digits") == "embedded"


# --- downloads that fail -----------------------------------------------------------------------------------------


def test_server_error_is_tried_again_at_the_same_server(world: World, waits: list[float]) -> None:
    world.server.script["/one/train-images.gz"] = [500, 503]
    assert sources(world.fetch()) == {world.servers()[0].rstrip("/")}
    assert world.server.requests[:3] == ["/one/train-images.gz"] * 3
    assert waits == list(files.WAITS_S[:2]) and waits[1] == 2 * waits[0]


def test_broken_bodies_are_tried_again(world: World) -> None:
    good = world.server.contents["train-images.gz"]
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    world.server.script["/one/train-images.gz"] = [good[: len(good) // 2], bytes(flipped)]
    world.fetch()
    assert (world.cache / "mnist" / "train-images").read_bytes() == world.raw["train-images"]


def test_next_server_serves_what_the_first_has_not(world: World, waits: list[float]) -> None:
    world.server.script["/one/train-images.gz"] = [404]
    report = world.fetch()
    assert report["files"]["train-images"]["source"] == f"{world.servers()[1]}train-images.gz"
    assert waits == []  # a missing file is not asked for twice


def test_failed_download_names_every_source_and_why_and_the_mirror_setting(world: World) -> None:
    del world.server.contents["train-images.gz"]
    world.server.script["/two/train-images.gz"] = [500] * (1 + len(files.WAITS_S))
    with pytest.raises(DataError) as caught:
        world.fetch(mirror=True)
    message = str(caught.value)
    lines = {line.strip().partition(": ")[0].partition(" (")[0]: line for line in message.splitlines()}
    one, two = (f"{server}train-images.gz" for server in world.servers())
    assert "404" in lines[one] and "500" in lines[two] and "4 attempts" in lines[two]
    assert str(world.cache) in message and str(world.mirror) in message
    assert "VDBENCH_MIRROR" in message and "mnist/train-images.gz" in message
    assert not world.cache.exists()


def test_server_that_cannot_be_reached_is_named(world: World, waits: list[float]) -> None:
    world.server.close()
    with pytest.raises(DataError) as caught:
        world.fetch()
    message = str(caught.value)
    assert all(server in message for server in world.servers()) and "refused" in message and "not set" in message
    assert waits == [*files.WAITS_S] * 2


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (lambda raw: gzip.compress(raw)[:-400], "gzip file that ends after"),
        (lambda raw: gzip.compress(raw[:-1]), f"{16 + 30 * 784 - 1:,} bytes"),
        (lambda raw: gzip.compress(raw + b"\0"), "more than that"),
        (lambda raw: gzip.compress(raw[:-1] + bytes([raw[-1] ^ 1])), "sha256"),
        (lambda raw: b"<html>sign in to the network</html>", "no intact gzip file"),
        (lambda raw: b"", "gzip file that ends after 0 bytes"),
    ],
    ids=["truncated", "short", "long", "other", "html", "empty"],
)
def test_wrong_bodies_from_all_servers_are_refused_and_nothing_is_kept(world: World, body, found: str) -> None:
    world.server.contents["train-images.gz"] = body(world.raw["train-images"])
    with pytest.raises(DataError, match=found) as caught:
        world.fetch()
    message = str(caught.value)
    assert message.count(f"expected {len(world.raw['train-images']):,} bytes") == 2
    assert world.entries["train"][0].sha256 in message
    assert not world.cache.exists()


def test_an_archive_that_unpacks_to_far_too_much_is_not_unpacked(world: World) -> None:
    bomb = io.BytesIO(gzip.compress(bytes(900_000)))  # less than a kilobyte
    tracemalloc.start()
    with pytest.raises(DataError, match="more than that"):
        world.entries["test"][1].verified(bomb, gzipped=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_an_endless_file_is_not_read_to_its_end(world: World) -> None:
    file = world.entries["test"][1]
    for gzipped in (True, False):
        stream = io.BytesIO(gzip.compress(random.Random(0).randbytes(50_000)))
        with pytest.raises(DataError, match="more than that"):
            file.verified(stream, gzipped=gzipped)
        assert stream.tell() < 2_000


# --- files in folders that are wrong -----------------------------------------------------------------------------


WRONG = {
    "truncated": lambda content: content[: len(content) // 2],
    "corrupted": lambda content: content[:-20] + bytes([content[-20] ^ 0x55]) + content[-19:],
    "longer": lambda content: content[:20] + content,
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("gzipped", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("place", ["cache", "mirror"])
def test_wrong_file_is_refused_and_never_replaced_by_another_source(
    world: World, place: str, gzipped: bool, wrong: str
) -> None:
    root = world.cache if place == "cache" else world.mirror
    world.fill(root, gzipped=gzipped)
    path = root / "mnist" / ("train-images.gz" if gzipped else "train-images")
    path.write_bytes(WRONG[wrong](path.read_bytes()))
    before = path.read_bytes()
    for use in (data.fetch, data.load):
        with pytest.raises(DataError, match=r"refused: expected .* bytes of content with sha256 .*, found") as caught:
            use("mnist", cache=world.cache, mirror=world.mirror)
        assert str(path) in str(caught.value)
        assert ("delete it and run again" if place == "cache" else "VDBENCH_MIRROR") in str(caught.value)
    assert world.server.requests == [] and path.read_bytes() == before


def test_right_file_of_another_name_is_refused(world: World) -> None:
    world.fill(world.mirror, gzipped=False)
    folder = world.mirror / "mnist"
    (folder / "test-images").replace(folder / "train-images")
    with pytest.raises(DataError, match=f"found {len(world.raw['test-images']):,} bytes"):
        world.fetch(mirror=True)


def test_deleting_a_refused_file_heals_the_cache(world: World) -> None:
    world.fetch()
    path = world.cache / "mnist" / "test-labels"
    path.write_bytes(b"wrong")
    with pytest.raises(DataError):
        world.load()
    path.unlink()
    world.load()
    assert path.read_bytes() == world.raw["test-labels"]


def test_folder_in_the_place_of_a_file_is_refused(world: World) -> None:
    (world.mirror / "mnist" / "train-images").mkdir(parents=True)
    with pytest.raises(DataError, match="train-images: cannot be read"):
        world.fetch(mirror=True)


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        (lambda raw: b"\0\0\x08\x01" + raw[4:], "magic number 00000803, found 00000801"),
        (lambda raw: b"\0\0\x0d\x03" + raw[4:], "found 00000d03"),
        (lambda raw: b"", "magic number"),
        (lambda raw: raw[:4] + struct.pack(">3I", 29, 28, 28) + raw[16:], r"found \(29, 28, 28\)"),
        (lambda raw: raw[:4] + struct.pack(">3I", 2**32 - 1, 28, 28) + raw[16:], r"found \(4294967295, 28, 28\)"),
        (lambda raw: raw[:-1], "bytes of IDX, found"),
        (lambda raw: raw[:10], "bytes of IDX, found 10"),
    ],
)
def test_idx_that_lies_is_refused(world: World, lie, found: str) -> None:
    with pytest.raises(DataError, match=found):
        world.entries["train"][0].parse(lie(world.raw["train-images"]))


# --- data sets in memory -----------------------------------------------------------------------------------------


def test_load_gives_the_published_values(world: World) -> None:
    loaded = world.load()
    for images, labels, split in (
        (loaded.train_images, loaded.train_labels, "train"),
        (loaded.eval_images, loaded.eval_labels, "test"),
    ):
        raw_images, raw_labels = world.arrays[split]
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.shape == (COUNTS[split], 1, 28, 28)
        np.testing.assert_array_equal((images[:, 0] * 255).round().numpy(), raw_images)
        np.testing.assert_array_equal(labels.numpy(), raw_labels)
        assert images.min() == 0 and images.max() == 1


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_validation_examples_are_training_examples_and_the_test_set_is_not_read(world: World) -> None:
    world.fetch()
    full = world.load()
    (world.cache / "mnist" / "test-images").write_bytes(b"whoever reads this is refused")
    split = world.load(validation_size=8)
    held_out, kept = rows(split.eval_images), rows(split.train_images)
    assert len(held_out) == 8 and len(kept) == 22
    assert held_out | kept == rows(full.train_images) and not held_out & kept
    labels = {image.numpy().tobytes(): int(y) for image, y in zip(full.train_images, full.train_labels, strict=True)}
    for images, ys in ((split.eval_images, split.eval_labels), (split.train_images, split.train_labels)):
        assert [labels[image.numpy().tobytes()] for image in images] == ys.tolist()


def test_validation_split_is_shuffled_and_the_same_under_any_seed(world: World) -> None:
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        splits.append(world.load(validation_size=8))
        assert torch.initial_seed() == seed
    assert torch.equal(splits[0].eval_images, splits[1].eval_images)
    assert torch.equal(splits[0].train_images, splits[1].train_images)
    assert rows(splits[0].eval_images) != rows(world.load().train_images[-8:])


@pytest.mark.parametrize("size", [-1, 30, 31])
def test_validation_size_that_leaves_nothing_is_an_error(world: World, size: int) -> None:
    with pytest.raises(DataError, match=f"validation_size is {size}: mnist has 30 training examples"):
        world.load(validation_size=size)


def test_digits_are_the_scans_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    monkeypatch.setenv("VDBENCH_MIRROR", "/nowhere")  # embedded: no folder is looked at
    loaded = data.load("digits")
    scans: Any = load_digits()
    everything = torch.cat([loaded.train_images, loaded.eval_images])
    assert everything.shape == (1797, 1, 28, 28) and everything.min() == 0 and everything.max() == 1
    small = everything[:, 0, 3:-2:3, 3:-2:3]  # the middle of every 3 x 3 block
    originals = {image.astype(np.float32).tobytes(): y for image, y in zip(scans.images, scans.target, strict=True)}
    ys = torch.cat([loaded.train_labels, loaded.eval_labels])
    assert [originals[(image * 16).numpy().tobytes()] for image in small] == ys.tolist()
    blocks = small.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
    assert torch.equal(torch.nn.functional.pad(blocks, (2, 2, 2, 2)), everything[:, 0])


def test_digits_split_is_fixed_disjoint_and_balanced() -> None:
    first, second = data.load("digits"), data.load("digits")
    assert torch.equal(first.train_images, second.train_images) and torch.equal(first.eval_images, second.eval_images)
    assert not rows(first.train_images) & rows(first.eval_images)  # all 1,797 scans differ
    train, test = Counter(first.train_labels.tolist()), Counter(first.eval_labels.tolist())
    assert {label: (train[label] + test[label]) // 5 for label in range(10)} == test
    assert data.fetch("digits") == {
        "dataset": "digits",
        "files": {},
        "examples": {"train": train.total(), "test": test.total()},
    }


def test_digits_other_than_expected_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets

    scans: Any = sklearn.datasets.load_digits()
    scans.images[0, 0, 0] += 1
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: scans)
    with pytest.raises(DataError, match=r"expected scans with sha256 .* found .* in scikit-learn"):
        data.load("digits")


def test_unknown_data_set_is_an_error_that_lists_the_known() -> None:
    for use in (data.load, data.fetch, data.available):
        with pytest.raises(DataError, match="no data set named mnits; there are: mnist, digits"):
            use("mnits")


def test_a_suite_can_name_every_data_set_and_no_other() -> None:
    assert set(get_args(config.DatasetName)) == set(data.DATASETS)


def test_mnist_is_what_torchvision_publishes() -> None:
    from torchvision.datasets import MNIST

    assert {f"{file.name}.gz" for file in data.MNIST.all_files} == {name for name, _ in MNIST.resources}
    assert list(data.MNIST.servers()) == MNIST.mirrors


@pytest.mark.real_data
def test_real_mnist() -> None:
    where = data.available("mnist")
    if where == "to download":
        pytest.skip("MNIST is neither in the cache nor in VDBENCH_MIRROR")
    loaded = data.load("mnist")
    assert loaded.train_images.shape == (60_000, 1, 28, 28) and loaded.eval_images.shape == (10_000, 1, 28, 28)
    # Known of MNIST: mean 0.1307 and standard deviation 0.3081; the first digits are 5, 0, 4 and 7, 2, 1.
    assert round(loaded.train_images.mean().item(), 4) == 0.1307
    assert round(loaded.train_images.std().item(), 4) == 0.3081
    assert loaded.train_labels[:3].tolist() == [5, 0, 4] and loaded.eval_labels[:3].tolist() == [7, 2, 1]
    assert torch.bincount(loaded.eval_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
