"""Every run, one row each: what came out, how long it took, with which code and on what."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from vdbench import outputs
from vdbench.config import Suite
from vdbench.records import Record
from vdbench.tables.render import NOTHING, Document, Section, percent, ratio_digits
from vdbench.tables.results import Sources, source_notes, state

SHOWN = {
    "source": "Source",
    "method": "Method",
    "seed": "Seed",
    "status": "Status",
    "error": "Error, %",
    "compression": "Compression",
    "sparsity_per_layer": "Sparsity per layer, %",
    "wall_s": "Wall time, s",
    "hardware": "Hardware",
}
LEGEND = "Wall time is of training; a diverged run's numbers are of its last good epoch."


def document(suite: Suite, sources: Sources, notes: Mapping[str, Sequence[str]]) -> Document:
    rows = [row for source, records in sources.items() for row in _rows(suite, source, records)]
    sections = []
    for name, experiment in suite.experiments.items():
        here = [row for row in rows if row["experiment"] == name]
        if here:
            frame = pd.DataFrame([{SHOWN[key]: _cell(key, row[key]) for key in SHOWN} for row in here])
            if outputs.measure(experiment) == "perplexity":
                frame = frame.rename(columns={SHOWN["error"]: "Perplexity"})
            sections.append(Section(f"{outputs.title(name, experiment)}, {outputs.error_name(experiment)}", frame))
    return Document(
        title=f"Every run ({suite.suite})",
        label="runs",
        numbers=pd.DataFrame(rows, columns=_columns()),
        sections=sections,
        notes=[*source_notes(sources, notes), LEGEND],
    )


def _rows(suite: Suite, source: str, records: Sequence[Record]) -> list[dict[str, Any]]:
    by_run: dict[tuple[str, str, int], dict[str, Record]] = {}
    for record in records:
        by_run.setdefault(record.run, {})[record.stage] = record
    return [_row(suite, source, by_run[run]) for run in suite.runs() if run in by_run]


def _row(suite: Suite, source: str, stages: dict[str, Record]) -> dict[str, Any]:
    train, prune = stages.get("train"), stages.get("prune")
    last = prune or train or next(iter(stages.values()))
    values: dict[str, Any] = dict.fromkeys(_columns())
    values |= {
        "source": source,
        "experiment": last.experiment,
        "dataset": last.dataset,
        "model": last.model,
        "method": last.method,
        "seed": last.seed,
        "status": state(stages.values()),
        "error_kind": outputs.error_name(suite.experiments[last.experiment]),
        "error": last.value if last.metrics else None,
        "top5_error": last.metrics.get("top5_error"),
        "cross_entropy": last.metrics.get("cross_entropy"),
        "sparsity_per_layer": " - ".join(f"{100 * layer.sparsity:.4f}" for layer in last.layers),
        "threshold": last.threshold,
        "wall_s": train.wall_s if train else None,
        "peak_rss_mb": train.peak_rss_mb if train else None,
        "stage_versions": " ".join(f"{name}={version}" for name, version in last.versions.items()),
        "spec_sha256": last.spec_sha256,
        "code_digest": last.code_digest,
        "message": "; ".join(record.message for record in stages.values() if record.message),
        "hardware": (train or last).provenance.hardware,
        "cpu": (train or last).provenance.cpu,
        "device": (train or last).provenance.device,
        "threads": (train or last).provenance.threads,
        "git_commit": (train or last).provenance.git_commit,
        "git_dirty": (train or last).provenance.git_dirty,
        "software": " ".join(f"{name}={version}" for name, version in (train or last).provenance.versions.items()),
    }
    if last.size:
        values |= {
            "compression": last.size.compression_ratio,
            "sparsity": 100 * last.size.sparsity,
            "nonzero_weights": last.size.nonzero_weights,
            "file_bytes": last.size.file_bytes,
        }
    if last.multiply_adds:
        values["theoretical_speedup"] = last.multiply_adds.theoretical_speedup
    return values


def _columns() -> list[str]:
    names = ["source", "experiment", "dataset", "model", "method", "seed", "status", "error_kind", "error"]
    names += ["top5_error", "cross_entropy", "compression", "sparsity", "sparsity_per_layer", "nonzero_weights"]
    names += ["theoretical_speedup", "threshold", "file_bytes", "wall_s", "peak_rss_mb", "stage_versions"]
    names += ["spec_sha256", "code_digest", "message", "hardware", "cpu", "device", "threads", "git_commit"]
    return [*names, "git_dirty", "software"]


def _cell(key: str, value: object) -> str:
    if value is None or value == "":
        return NOTHING
    if key == "method":
        return outputs.METHODS[str(value)]
    if key == "sparsity_per_layer":
        return " – ".join(percent(float(part)) for part in str(value).split(" - "))
    if isinstance(value, float):
        digits = {"error": 2, "wall_s": 0, "compression": ratio_digits(value)}[key]
        return f"{value:.{digits}f}"
    return str(value)
