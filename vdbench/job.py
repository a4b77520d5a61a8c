"""A job under way: what it was asked for and since when, and the record it leaves."""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from vdbench.config import RunSpec, spec_sha256
from vdbench.config_timing import NetSpec
from vdbench.provenance import Code, code, peak_rss_mb, provenance
from vdbench.records import Record
from vdbench.stages import stage_versions


@dataclass(frozen=True)
class Job:
    """One stage of one run. Made when the job starts, so that it knows how long it took and what code it ran."""

    stage: Literal["train", "prune", "time"]
    spec: RunSpec | NetSpec
    suite: str
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    started: float = field(default_factory=time.perf_counter)
    code: Code = field(default_factory=code)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def record(self, *, device: str, seconds_before: float = 0.0, **results: Any) -> Record:
        """The record of this job, with its results; `seconds_before` were spent before it was resumed."""
        content, recipe = self.spec.content(), getattr(self.spec, "recipe", None)
        return Record(
            suite=self.suite,
            experiment=self.spec.experiment,
            dataset=self.spec.dataset,
            model=self.spec.model,
            method=self.spec.method,
            stage=self.stage,
            seed=self.spec.seed,
            spec=content,
            spec_sha256=spec_sha256(content),
            versions=stage_versions(self.stage, self.spec.method),
            code_digest=self.code.digest,
            wall_s=round(seconds_before + self.seconds, 3),
            peak_rss_mb=peak_rss_mb(),
            provenance=provenance(
                self.code, device, self.started_at, f"vdbench {self.stage}", getattr(recipe, "matmul_precision", None)
            ),
            **results,
        )
