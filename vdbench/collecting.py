"""Records as the rows of one CSV file, for whoever wants to make tables of their own."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vdbench.records import Record, atomic_write


def row(record: Record) -> dict[str, Any]:
    """One record, its scalars alone: curves, histograms, layers and timing samples stay in the record."""
    parts = {
        "": record.model_dump(
            include={"suite", "experiment", "dataset", "model", "method", "seed", "stage", "status", "message"}
        ),
        "metrics.": record.metrics,
        "size.": record.size.model_dump() if record.size else {},
        "multiply_adds.": record.multiply_adds.model_dump() if record.multiply_adds else {},
        "work.": record.work.model_dump() if record.work else {},
        "kept.": record.kept,
        "limits.": record.limits,
        "control.": record.control.model_dump() if record.control else {},
        " ": record.model_dump(include={"threshold", "spec_sha256", "code_digest", "wall_s", "peak_rss_mb"}),
        "provenance.": record.provenance.model_dump(),
    }
    return {
        f"{prefix.strip()}{key}": json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
        for prefix, values in parts.items()
        for key, value in values.items()
    }


def write_csv(records: Iterable[Record], path: Path) -> None:
    """One row a record, every column that any record has; an empty cell means that the record does not say."""
    rows = [row(record) for record in records]
    columns = dict.fromkeys(key for one in rows for key in one)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
