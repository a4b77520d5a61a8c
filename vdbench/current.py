"""Which records of a suite still hold: those made by the suite and the code as they stand now."""

from collections import Counter
from pathlib import Path

from vdbench import records
from vdbench.config import Suite, spec_sha256
from vdbench.records import Record
from vdbench.stages import stage_versions


def load(results: Path, suite: Suite) -> tuple[list[Record], list[str]]:
    """The records of a suite under `results` that are current, and a line for what is missing or stale.

    A record is stale when it was made under another spec or another stage version, lies in another run's place, or
    was made from other weights than those trained last. Raises RecordError for a file that is not a record.
    """
    found, stale, missing = [], [], []
    jobs = list(suite.jobs())
    for job in jobs:
        record, reason = find(results, suite, *job)
        if record is None:
            missing.append(job)
        elif reason:
            stale.append(f"stale: {_names(*job)[-1]}: {reason}")
        else:
            found.append(record)
    planned, absent = (Counter(name for job in some for name in _names(*job)) for some in (jobs, missing))
    # an experiment, a method or a run of which there is nothing takes one line
    widest = (next(name for name in _names(*job) if absent[name] == planned[name]) for job in missing)
    return found, [*(f"missing: {name}" for name in dict.fromkeys(widest)), *stale]


def _names(stage: str, experiment: str, method: str, seed: int) -> tuple[str, str, str, str]:
    """What a job is part of, the widest first, and itself."""
    run = f"{experiment}/{method}/seed{seed}"
    return experiment, f"{experiment}/{method}", run, f"{run} {stage}"


def find(
    results: Path, suite: Suite, stage: str, experiment: str, method: str, seed: int
) -> tuple[Record | None, str | None]:
    """The record in the place of this job, None where there is none, and why it is stale, None where it is not.

    Raises RecordError for a file that is not a record.
    """
    path, train = (records.run_folder(results, experiment, method, seed) / f"{name}.json" for name in (stage, "train"))
    if not path.exists():
        return None, None
    record = records.read(path)
    reason = _staleness(record, suite, stage, experiment, method, seed)
    if reason is None and stage == "prune" and train.exists():
        same = records.read(train).weights_sha256 == record.trained_sha256
        reason = None if same else "made from other weights than those trained last"
    return record, reason


def _staleness(record: Record, suite: Suite, stage: str, experiment: str, method: str, seed: int) -> str | None:
    """Why a record is not that of this job of the suite as it stands now; None when it is."""
    if (record.stage, *record.run) != (stage, experiment, method, seed):
        return f"the record of {record.experiment}/{record.method}/seed{record.seed} {record.stage}"
    if record.spec_sha256 != spec_sha256(suite.spec_of(stage, experiment, method, seed)):
        return "made under another spec"
    expected = stage_versions(record.stage, record.method)
    # baselines' train records once left `prune` out: what a record does not name is the first version
    if dict.fromkeys(expected, 1) | record.versions != expected:
        return f"made by versions {record.versions}, now {expected}"
    return None
