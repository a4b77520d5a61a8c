"""No room, or a folder that cannot be written, during every kind of write: one line that says what to do, nothing lost.

A disk of one's own, a tmpfs, needs root; without it, a limit on the size of files stands in for a full disk.
"""

import errno
import hashlib
import logging
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import factory
import numpy as np
import pandas
import pytest
import tiny
import torch
from matplotlib.figure import Figure

from vdbench import cli, collecting, config, files, netfile, records, shipping, tensors, training
from vdbench.checkpoint import Checkpoint, Identity
from vdbench.mistakes import in_one_line
from vdbench.plots import style
from vdbench.running import at_work, log_to
from vdbench.tables import render

SUITE = factory.suite(fc=factory.experiment(seeds=[0]))
RECORD = factory.record(SUITE, "fc", "dense", 0, "train")
CONTENT = np.random.default_rng(0).normal(size=200_000)


def mount(folder: Path, *options: str) -> bool:
    return subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode == 0


class Disk:
    """A small disk that can be filled, or be made read-only, and put right again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        with (self.folder / ".ballast").open("wb") as ballast, pytest.raises(OSError):
            while True:
                os.write(ballast.fileno(), bytes(4096))

    def protect(self) -> None:
        assert mount(self.folder, "-o", "remount,ro")

    def repair(self) -> None:
        assert mount(self.folder, "-o", "remount,rw")
        (self.folder / ".ballast").unlink(missing_ok=True)


class Limit:
    """In the place of a full disk where one cannot be had: no file may grow beyond a kilobyte."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._before = folder, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, self._before[1]))

    def protect(self) -> None:
        pytest.skip("needs root, to make a file system read-only")

    def repair(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk | Limit]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or not mount(folder, "-t", "tmpfs", "-o", "size=24m", "tmpfs"):
        limit = Limit(folder)
        yield limit
        limit.repair()
        return
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def identity() -> Identity:
    return Identity.of(tiny.spec("dense"), "code", {}, "cpu")


def tensors_of(seed: int) -> dict[str, Any]:
    return {"weight": torch.full((500, 500), float(seed))}


def figure(seed: int) -> Figure:
    made = Figure()
    made.add_subplot().plot(CONTENT[seed : seed + 3000])
    return made


def cached(folder: Path, seed: int) -> None:
    mirror = folder.parent / "mirror"
    content, name = f"{seed}".encode() * 100_000, f"file{seed}"
    (mirror / "set").mkdir(parents=True, exist_ok=True)
    (mirror / "set" / name).write_bytes(content)
    published = files.PublishedPlain("set", name, len(content), hashlib.sha256(content).hexdigest())
    files.obtain(published, files.Folders(folder, mirror), tuple)


def recorded(folder: Path, seed: int) -> None:
    results = folder.parent / "results"
    if not results.exists():
        factory.write_results(results, SUITE, factory.all_records(SUITE))
    factory.write_history(records.run_folder(results, "fc", "dense", 0) / "history.csv", RECORD, epochs=60 + seed)
    shipping.record(SUITE, results, folder / "recorded")


WRITES: dict[str, Callable[[Path, int], object]] = {
    "resume.pt": lambda folder, seed: Checkpoint(folder / "resume.pt", identity()).save(
        {"model": tensors_of(seed), "history": []}, 1.0
    ),
    "weights.pt": lambda folder, seed: tensors.save_tensors(folder / "weights.pt", tensors_of(seed)),
    "history.csv": lambda folder, seed: training.history.write(folder / "history.csv", [{"epoch": seed}] * 20_000),
    "train.json": lambda folder, seed: records.write(
        RECORD.model_copy(update={"seed": seed, "message": "long " * 10_000}), folder / "train.json"
    ),
    "pruned.npz": lambda folder, seed: netfile.write_arrays(folder / "pruned.npz", {"w": CONTENT + seed}, {}, {}),
    "collected.csv": lambda folder, seed: collecting.write_csv([RECORD] * (200 + seed), folder / "collected.csv"),
    "runs.csv": lambda folder, seed: render.write(
        render.Document("Runs", "runs", pandas.DataFrame({"x": CONTENT[seed:20_000]}), [], []), folder
    ),
    "figure.png": lambda folder, seed: style.save(figure(seed), folder, "figure"),
    "data": cached,
    "recorded": recorded,
}


def seen(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".ballast"
    }


@pytest.mark.parametrize("fault", ["fill", "protect"])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_fails_says_what_to_do_and_leaves_what_was_there(name, fault, disk):
    write = WRITES[name]
    write(disk.folder, 0)
    before = seen(disk.folder)
    getattr(disk, fault)()
    with pytest.raises((OSError, files.DataError)) as caught:
        write(disk.folder, 1)
    message = in_one_line(caught.value)
    disk.repair()
    assert "\n" not in message
    assert str(disk.folder) in message
    assert any(remedy in message for remedy in ("make room", "make it writable"))
    assert seen(disk.folder) == before
    write(disk.folder, 1)
    assert seen(disk.folder) != before


def test_training_stops_with_one_line_and_goes_on_when_there_is_room(
    disk, tmp_path, monkeypatch, capsys, caplog, one_thread
):
    spec = config.canonical(tiny.spec("dense", epochs=4, batch_size=200).content())
    command = ["train", "--suite", "tiny", "--spec", spec, "--output"]
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    assert cli.main([*command, str(tmp_path / "undisturbed")]) == 0
    caplog.set_level(logging.INFO, "vdbench")
    real, output = Checkpoint.save, disk.folder / "run"

    def save(self, state, seconds):
        if len(state["history"]) == 3 and self.path.is_relative_to(disk.folder):
            disk.fill()
        real(self, state, seconds)

    monkeypatch.setattr(Checkpoint, "save", save)
    capsys.readouterr()
    assert cli.main([*command, str(output)]) == 2
    monkeypatch.setattr(Checkpoint, "save", real)
    disk.repair()
    said = capsys.readouterr()
    assert said.err.startswith(f"vdbench: error: {output}/resume.pt: ") and said.err.count("\n") == 1
    assert "make room there and run the same command again" in said.err
    assert cli.main([*command, str(output)]) == 0
    assert "resumed after epoch 2" in caplog.text
    made, wanted = (records.read(folder / "train.json") for folder in (output, tmp_path / "undisturbed"))
    assert made.weights_sha256 == wanted.weights_sha256
    left = {".lock", "train.json", "weights.pt", "history.csv", "resume.pt"}  # the last until the run is pruned
    assert {path.name for path in output.iterdir()} == left


def test_a_job_in_a_folder_that_cannot_be_written_says_so_at_once(disk):
    (disk.folder / "run").mkdir()
    disk.protect()
    with pytest.raises(OSError) as caught, at_work(disk.folder / "run", "train"):
        raise AssertionError("it should not have begun")
    assert caught.value.errno == errno.EROFS
    assert "make it writable" in in_one_line(caught.value)
    with pytest.raises(OSError, match="Read-only"):
        log_to(disk.folder / "run" / "train.log")


def test_no_room_for_the_progress_file_stops_no_job(disk):
    disk.fill()
    with at_work(disk.folder, "train") as work:
        work.report({"epoch": 1})
