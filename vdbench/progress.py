"""What of a suite is done, running, stale or missing."""

import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vdbench import records
from vdbench.config import Suite

QUIET_S = 600.0  # a job that has written nothing for so long is taken for dead
_FAILURE = re.compile(r"vdbench: error|[\w.]*(Error|Exception|Interrupt)\b")


@dataclass(frozen=True)
class State:
    """One job: `state` is done, diverged, failed, running, interrupted, stale or missing; `note` says more."""

    stage: str
    experiment: str
    method: str
    seed: int
    state: str
    note: str = ""

    @property
    def is_done(self) -> bool:
        """Whether there is a result; that a run diverged is one."""
        return self.state in ("done", "diverged")


def states(suite: Suite, results: Path) -> list[State]:
    """The state of every job of a suite that leaves a record, in the order in which they can be run."""
    return [State(*job, *_state(suite, results, job)) for job in suite.jobs()]


def _state(suite: Suite, results: Path, job: tuple[str, str, str, int]) -> tuple[str, str]:
    try:
        record, reason = records.find(results, suite, *job)
    except records.RecordError as error:
        return "stale", str(error)
    if record is None:
        return _unfinished(records.run_folder(results, *job[1:]), job[0])
    if reason:
        return "stale", reason
    return ("done", "") if record.status == "ok" else (record.status, record.message)


def _unfinished(folder: Path, stage: str) -> tuple[str, str]:
    """What became of a job without a record, from its log and, of training, from the side file it resumes from."""
    log, resume = folder / f"{stage}.log", folder / "resume.pt"
    written = [path.stat().st_mtime for path in ([log, resume] if stage == "train" else [log]) if path.exists()]
    if not written:
        return "missing", ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    failures = [line for line in lines if _FAILURE.match(line)]  # the message may go on in further lines
    if failures:
        return "failed", f"{failures[-1]} (see {log})"
    last = lines[-1] if lines else "nothing logged yet"
    return "running" if time.time() - max(written) < QUIET_S else "interrupted", last


def describe(found: Iterable[State]) -> str:
    """A table of runs and stages for a terminal, then what needs saying about single jobs, then the counts."""
    found = list(found)
    runs: dict[str, dict[str, str]] = {}
    for job in found:
        runs.setdefault(f"{job.experiment}/{job.method}/seed{job.seed}", {})[job.stage] = job.state
    width = max(map(len, runs))
    lines = [f"{'run':{width}}  " + "  ".join(f"{stage:11}" for stage in records.STAGES)]
    for name, cells in runs.items():
        lines.append(f"{name:{width}}  " + "  ".join(f"{cells.get(stage, '-'):11}" for stage in records.STAGES))
    lines += [
        f"{job.state}: {job.experiment}/{job.method}/seed{job.seed} {job.stage}: {job.note}"
        for job in found
        if job.note
    ]
    counts = Counter(job.state for job in found)
    lines.append(f"{len(found)} jobs: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return "\n".join(line.rstrip() for line in lines)
