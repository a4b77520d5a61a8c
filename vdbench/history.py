"""The epochs of a training: as a line of its log, as its progress, as a file."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdbench.mistakes import reason
from vdbench.records import RecordError, atomic_write

if TYPE_CHECKING:
    import pandas as pd


def _seconds_left(history: list[dict[str, float]], epochs: int) -> float:
    recent = [row["seconds"] for row in history[-5:]]
    return sum(recent) / len(recent) * (epochs - len(history))


def progress(history: list[dict[str, float]], epochs: int) -> dict[str, Any]:
    """The fields of `running.Progress` that only a training knows."""
    row = history[-1]
    return {
        "epoch": len(history),
        "epochs": epochs,
        "seconds_left": _seconds_left(history, epochs),
        **{key: row[key] for key in ("loss", "error", "perplexity", "sparsity") if key in row},
    }


def line(history: list[dict[str, float]], epochs: int) -> str:
    """The last epoch, for a log."""
    row, left = history[-1], _seconds_left(history, epochs)
    measured = f"error {row['error']:.2f} %" if "error" in row else f"perplexity {row['perplexity']:.2f}"
    return (
        f"epoch {row['epoch']:.0f}/{epochs}  loss {row['loss']:.4f}  {measured}  "
        f"sparsity {100 * row['sparsity']:.2f} %  compression {row['compression_ratio']:.1f}x  "
        f"{row['seconds']:.1f} s  {left / 60:.0f} min left"
    )


def write(path: Path, history: list[dict[str, float]]) -> None:
    """One row an epoch, CSV. Raises OSError."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        columns = dict.fromkeys(key for row in history for key in row)  # code that went on may know more than before
        writer = csv.DictWriter(file, list(columns) or ["epoch"], restval="nan")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in history)


def read(path: Path) -> "pd.DataFrame":
    """What `write` wrote: one row an epoch, all of them numbers. Raises RecordError."""
    import pandas as pd

    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file, strict=True)
        found = pd.DataFrame([dict(zip(header, map(float, row), strict=True)) for row in rows], columns=header)
        if "epoch" not in header:
            raise ValueError("no column epoch")
    except Exception as error:  # as many kinds as there are ways not to be a table of numbers
        raise RecordError(
            f"{path}: not the history of a training ({reason(error)}); delete train.json beside it and rerun its job"
        ) from None
    return found
