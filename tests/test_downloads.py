"""Where files come from, and what is refused. No network but 127.0.0.1."""

import errno
import gzip
import hashlib
import io
import json
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
from publishing import COUNTS, World

from vdbench import data, files
from vdbench.data import DataError


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


def test_what_is_published_nowhere_is_had_from_a_mirror_folder_alone(tmp_path: Path) -> None:
    assert data.available("cifar10_jpeg", tmp_path) == "only by mirror folder"
    with pytest.raises(DataError, match=r"cifar10-jpeg\.tar\.xz could not be had") as caught:
        data.fetch("cifar10_jpeg", cache=tmp_path)
    message = str(caught.value)
    assert "It is published nowhere: point the mirror setting" in message and "network" not in message


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
