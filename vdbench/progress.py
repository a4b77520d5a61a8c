"""What of a suite is done, running, failed, interrupted, stale or missing, and how far it is.

Everything is read from the files of the runs, so it is the same from any machine that sees them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vdbench import current, records
from vdbench.config import Suite
from vdbench.records import Record
from vdbench.running import Progress, clock, read_progress

QUIET_S = 120.0  # a job that has not said for so long that it is running, is not
ALL_DONE, NOT_YET, FAILED = 0, 1, 3  # exit statuses


@dataclass(frozen=True)
class State:
    """One job: `state` is done, diverged, failed, running, interrupted, stale or missing; `note` says more.

    `progress` is that of a job that is done, or has begun.
    """

    stage: str
    experiment: str
    method: str
    seed: int
    state: str
    note: str = ""
    progress: Progress | None = None

    @property
    def is_done(self) -> bool:
        """Whether there is a result; that a run diverged is one."""
        return self.state in ("done", "diverged")

    @property
    def run(self) -> str:
        return f"{self.experiment}/{self.method}/seed{self.seed}"


def states(suite: Suite, results: Path) -> list[State]:
    """The state of every job of a suite that leaves a record, in the order in which they can be run."""
    now = clock(results)
    return [State(*job, *_state(suite, results, job, now)) for job in suite.jobs()]


def exit_status(found: Iterable[State]) -> int:
    """0 when all is done, 3 when a job failed, 1 when there is something left to do and nothing failed."""
    found = list(found)
    if any(job.state == "failed" for job in found):
        return FAILED
    return ALL_DONE if all(job.is_done for job in found) else NOT_YET


Found = tuple[str, str, Progress | None]  # state, note, progress


def _state(suite: Suite, results: Path, job: tuple[str, str, str, int], now: float) -> Found:
    folder = records.run_folder(results, *job[1:])
    try:
        record, reason = current.find(results, suite, *job)
    except records.RecordError as error:
        return _unfinished(folder, job[0], now) or ("stale", str(error), None)
    if record is not None and reason is None:
        return ("done" if record.status == "ok" else record.status), record.message, _finished(record)
    begun = _unfinished(folder, job[0], now)
    return begun or (("missing", "", None) if record is None else ("stale", reason or "", None))


def _finished(record: Record) -> Progress:
    epochs = record.spec.get("recipe", {}).get("epochs")
    is_trained = record.stage == "train"
    return Progress(
        stage=record.stage,
        peak_rss_mb=record.peak_rss_mb,
        epoch=int(record.metrics.get("epoch", 0)) if is_trained else None,
        epochs=epochs if is_trained else None,
        loss=record.metrics.get("loss"),
        error=record.metrics.get("error"),
        perplexity=record.metrics.get("perplexity"),
        sparsity=record.size.sparsity if record.size else None,
    )


def _unfinished(folder: Path, stage: str, now: float) -> Found | None:
    """What became of a job that left no record; None where it has not begun since the last that did."""
    found = read_progress(folder)
    if found and found[0].stage == stage:
        progress, said_at = found
        if progress.state == "failed":
            return "failed", f"{progress.failure} (see {folder / stage}.log)", progress
        if now - said_at < QUIET_S:
            return "running", progress.process, progress
        return "interrupted", f"{progress.process}, silent for {(now - said_at) / 60:.0f} min", progress
    if stage == "train" and (folder / "resume.pt").exists():
        return "interrupted", "goes on from resume.pt", None
    return None


def describe(found: Iterable[State]) -> str:
    """A line a run for a terminal, then what needs saying about single jobs, then the counts."""
    found = list(found)
    runs: dict[str, list[State]] = {}
    for job in found:
        runs.setdefault(job.run, []).append(job)
    rows = [["run", *records.STAGES, "epoch", "loss", "error", "sparsity", "left", "peak memory"]]
    rows += [_row(name, jobs) for name, jobs in runs.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [f"{job.state}: {job.run} {job.stage}: {job.note}" for job in found if job.note]
    counts = Counter(job.state for job in found)
    lines.append(f"{len(found)} jobs: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return "\n".join(line.rstrip() for line in lines)


def _row(name: str, jobs: Sequence[State]) -> list[str]:
    states = {job.stage: job.state for job in jobs}
    facts: dict[str, float] = {}
    for job in jobs:  # a later stage knows better
        if job.progress:
            peak = max(facts.get("peak_rss_mb", 0.0), job.progress.peak_rss_mb)
            facts |= job.progress.model_dump(exclude_none=True) | {"peak_rss_mb": peak}
    return [
        name,
        *(states.get(stage, "-") for stage in records.STAGES),
        f"{facts['epoch']:.0f}/{facts['epochs']:.0f}" if "epochs" in facts and "epoch" in facts else "-",
        f"{facts['loss']:.4f}" if "loss" in facts else "-",
        _measured(facts),
        f"{100 * facts['sparsity']:.2f} %" if "sparsity" in facts else "-",
        duration(facts["seconds_left"]) if "seconds_left" in facts else "-",
        f"{facts['peak_rss_mb']:.0f} MB" if "peak_rss_mb" in facts else "-",
    ]


def _measured(facts: dict[str, float]) -> str:
    if "perplexity" in facts:
        return f"ppl {facts['perplexity']:.2f}"
    return f"{facts['error']:.2f} %" if "error" in facts else "-"


def duration(seconds: float) -> str:
    """In the unit that tells something: below two minutes in seconds, below two hours in minutes, else in hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
