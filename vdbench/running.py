"""A job at work in its folder: alone there, and saying how far it is to whoever reads its progress file.

Both go through the file system alone, so that they hold for jobs of a cluster: a lock that the kernel drops when its
holder dies, however it dies, and a small file that is written anew every few seconds.
"""

import contextlib
import fcntl
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict, ValidationError

from vdbench.mistakes import in_one_line
from vdbench.provenance import peak_rss_mb
from vdbench.records import PART, write_json

BEAT_S = 15.0
PROGRESS, LOCK = "progress.json", ".lock"
KEPT_LOGS = 9

log = logging.getLogger("vdbench")


class Progress(BaseModel):
    """How far a job is: `error` in percent, `failure` what it failed of."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    stage: str
    state: Literal["running", "failed"] = "running"
    process: str = ""
    started_at: str = ""
    peak_rss_mb: float = 0.0
    epoch: int | None = None
    epochs: int | None = None
    loss: float | None = None
    error: float | None = None
    perplexity: float | None = None
    sparsity: float | None = None
    seconds_left: float | None = None
    failure: str = ""


def read_progress(folder: Path) -> tuple[Progress, float] | None:
    """What the last job in a folder left unfinished, and when it said so; None where none did, or it is unreadable."""
    path = folder / PROGRESS
    try:
        return Progress.model_validate_json(path.read_bytes()), path.stat().st_mtime
    except (OSError, ValidationError):
        return None


def clock(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder; on a shared file system that is not this machine's."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


@dataclass(frozen=True)
class AtWork:
    """A job at work: `report` says how far it is; `waited`, that another one was in its folder until now."""

    report: Callable[[dict[str, Any]], None]
    waited: bool


@contextlib.contextmanager
def at_work(folder: Path, stage: str) -> Iterator[AtWork]:
    """Be the only job in `folder`, after waiting for the one that is there, and keep its progress file up to date.

    The file is gone after a job that succeeded; one that failed leaves its error there, one that was killed a file
    that grows old. What killed jobs were in the middle of writing is removed. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as waited:
        for path in folder.glob(f".*{PART}"):
            path.unlink(missing_ok=True)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        facts: dict[str, Any] = {"stage": stage, "process": _process(), "started_at": started}

        def write(**more: Any) -> None:
            with contextlib.suppress(OSError):  # no room: the job's own files will say so
                now = Progress(**facts, **more, peak_rss_mb=peak_rss_mb())
                write_json(folder / PROGRESS, now.model_dump(exclude_defaults=True))

        over = threading.Event()
        beat = threading.Thread(target=_beat, args=(write, over), daemon=True)
        write()
        beat.start()
        try:
            yield AtWork(facts.update, waited)
        except BaseException as error:
            over.set()
            beat.join()
            write(state="failed", failure=in_one_line(error))
            raise
        over.set()
        beat.join()
        (folder / PROGRESS).unlink(missing_ok=True)


def _beat(write: Callable[[], None], over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        write()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; gives whether it had to be waited for. The file stays: one deleted is one held twice."""
    with (folder / LOCK).open("a+") as file:
        waited = False
        try:
            waited = not _taken(file)
            if waited:
                found = read_progress(folder)
                who = f"the {found[0].stage} job of {found[0].process}" if found else "another job"
                log.warning("%s: %s is at work here: waiting for its end", folder, who)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning(
                "%s: no locks on this file system (%s): see to it that no other job is in here", folder, error.strerror
            )
        yield waited


def _taken(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def log_to(path: Path) -> None:
    """From now on what this process says goes to `<path>.1`, and `path` is a link to it: Snakemake deletes the log of
    the run before, but no more than the link. The logs of runs before this one are `<path>.2` and on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [path.with_name(f"{path.name}.{number}") for number in range(1, KEPT_LOGS + 1)]
    for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
        if newer.exists():
            newer.replace(older)
    path.unlink(missing_ok=True)
    path.symlink_to(names[0].name)
    descriptor = os.open(names[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
