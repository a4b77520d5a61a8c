"""Published numbers: one row a result, with where it was read and how sure we are of it."""

import csv
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from vdbench.config import VGG_WIDTHS, Experiment

SPARSE_VD = "Sparse VD"
_FOLDERS = (Path(__file__).parent / "reference", Path(__file__).parent.parent / "configs" / "reference")


@dataclass(frozen=True)
class Published:
    """One row of table1.csv, numbers as printed: "0.80" stays "0.80", "1.0" stays "1.0".

    `kind` is "published" (the paper's own table, and for recurrent nets that of Chirkova et al. 2018, whose errors are
    perplexities), "third_party" (someone else's run of Sparse VD on the same net) or
    "related" (a slightly different net, or a quotation: for a table with its remark, not for a figure).
    `confidence` is "read" (in the named source) or "derived" (computed from what was read; `remark` says how).
    """

    kind: str
    network: str
    dataset: str
    architecture: str
    method: str
    error_pct: str
    sparsity_per_layer_pct: str
    compression: str
    source: str
    confidence: str
    remark: str


def reference_file(name: str) -> Path:
    """A file of published numbers, in an installed package or in a checkout. Raises FileNotFoundError."""
    for folder in _FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, _FOLDERS))}; reinstall vdbench")


@cache
def table1() -> tuple[Published, ...]:
    """The LeNet rows of the paper's Table 1, others' results with its method, then the paper's VGG-like nets."""
    with reference_file("table1.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        names = [field.name for field in fields(Published)]
        if reader.fieldnames != names:
            raise ValueError(f"table1.csv: columns {reader.fieldnames}, expected {names}")
        return tuple(Published(**row) for row in reader)


def rows(kind: str, experiment: Experiment) -> list[Published]:
    """The rows of one kind measured like this experiment: same network, same data set, error on the test set.

    None, therefore, for an experiment that measures a validation error.
    """
    if experiment.validation_size:
        return []
    wanted = kind, experiment.model, experiment.dataset
    return [row for row in table1() if (row.kind, row.network, row.dataset) == wanted]


@dataclass(frozen=True)
class Epoch:
    """One row of rnn_curves.csv: a language model after an epoch of its training, as its authors logged it."""

    network: str
    dataset: str
    method: str
    epoch: int
    validation_perplexity: float
    test_perplexity: float
    compression: float
    source: str


@cache
def _curves() -> tuple[Epoch, ...]:
    with reference_file("rnn_curves.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        kinds = {field.name: field.type for field in fields(Epoch)}
        if reader.fieldnames != list(kinds):
            raise ValueError(f"rnn_curves.csv: columns {reader.fieldnames}, expected {list(kinds)}")
        return tuple(Epoch(**{name: kinds[name](text) for name, text in row.items()}) for row in reader)  # type: ignore


def curves(experiment: Experiment) -> dict[str, list[Epoch]]:
    """What was published of the training of this experiment's net on its data set, by method."""
    found: dict[str, list[Epoch]] = {}
    for row in _curves():
        if (row.network, row.dataset) == (experiment.model, experiment.dataset):
            found.setdefault(row.method, []).append(row)
    return found


def by_width(dataset: str, method: str) -> list[Published]:
    """The paper's results with the VGG-like net on a data set, narrow nets first; none for one it does not have."""
    found = [row for row in table1() if (row.kind, row.dataset, row.method) == ("published", dataset, method)]
    return sorted((row for row in found if row.network in VGG_WIDTHS), key=lambda row: VGG_WIDTHS[row.network])


def sparse_vd(experiment: Experiment) -> Published | None:
    """The paper's own result for its method; None where it published none that compares."""
    return next((row for row in rows("published", experiment) if row.method == SPARSE_VD), None)
