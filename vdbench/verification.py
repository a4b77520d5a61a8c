"""The shipped pruned nets against their records: to the last digit, but for rounding."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vdbench import data, metrics, pruning, records, shipping, tasks
from vdbench.config import VARIATIONAL_METHODS
from vdbench.data import DataError, Dataset
from vdbench.records import Record
from vdbench.tensors import state_sha256
from vdbench.text import Text

_ROUNDING = 1e-5


def verify(folders: Sequence[Path], *, cache_folder: Path | None = None, mirror: Path | None = None) -> int:
    """Print a line for every net recorded under `folders` (default: all that are shipped).

    Returns 0 if all agree with their records, else 1: one differs, or its data cannot be had. Raises RecordError if
    there is no net to verify, DataError if there is no data for any of them.
    """
    folders = folders or [shipping.recorded()]
    paths = [path for folder in folders for path in sorted(folder.glob("**/prune.json"))]
    found = [(path.with_name("pruned.npz"), records.read(path)) for path in paths]
    required = cache(_required)
    shipped = [(net, r) for net, r in found if net.exists() or r.run in required(net.resolve().parents[3])]
    if not shipped:
        raise records.RecordError(f"no recorded nets under {', '.join(map(str, folders))}")
    datasets = _datasets([r for _, r in shipped], cache_folder, mirror)
    agreeing = 0
    for path, record in shipped:
        dataset = datasets[_data_of(record)]
        if isinstance(dataset, DataError):
            verdict = f"NOT VERIFIED: {str(dataset).splitlines()[0].rstrip(':')}"
        elif differences := _differences(path, record, dataset):
            verdict = f"DIFFERS: {'; '.join(differences)}"
        else:
            verdict = f"agrees: {_summary(_recorded(record))}"
            agreeing += 1
        print(f"{record.suite} {record.experiment}/{record.method}/seed{record.seed} {verdict}")
    print(f"{agreeing} of {len(shipped)} nets agree with their records")
    return 0 if agreeing == len(shipped) else 1


def _data_of(record: Record) -> tuple[str, int]:
    return record.dataset, record.spec["validation_size"]


def _datasets(
    shipped: Sequence[Record], cache_folder: Path | None, mirror: Path | None
) -> dict[tuple[str, int], Dataset | Text | DataError]:
    """What the nets are evaluated on, or why it cannot be had. Raises DataError: none of it can."""
    found: dict[tuple[str, int], Dataset | Text | DataError] = {}
    for name, size in dict.fromkeys(map(_data_of, shipped)):
        try:
            found[name, size] = data.load(name, validation_size=size, cache=cache_folder, mirror=mirror)
        except DataError as error:
            found[name, size] = error
    errors = [value for value in found.values() if isinstance(value, DataError)]
    if len(errors) == len(found):
        raise errors[0]
    return found


def _required(suite: Path) -> set[tuple[str, str, int]]:
    """The variational runs of a recorded suite that have to come with their nets; others may."""
    found = [records.read(path) for path in suite.glob("*/*/*/prune.json")]
    return {run for run in shipping.shippable(found) if run[1] in VARIATIONAL_METHODS}


def _recorded(record: Record) -> dict[str, Any]:
    size = record.size.model_dump(include={"nonzero_weights", "sparsity", "compression_ratio"}) if record.size else {}
    name = records.judged_by(record.metrics)
    return {name: record.metrics.get(name), **size, "layers": {x.name: x.nonzero for x in record.layers}}


def _differences(path: Path, record: Record, dataset: Dataset | Text) -> list[str]:
    """What the net in `path` does otherwise than its record says; empty if nothing."""
    if not path.exists():
        return [f"{path} is missing"]
    model, meta = pruning.load_net(path)
    if meta.get("spec_sha256") != record.spec_sha256:
        return [f"{path} holds the net of another spec ({meta.get('spec_sha256')})"]
    size, evaluated = metrics.size(model), tasks.evaluate(model, dataset)
    name = records.judged_by(evaluated)
    measured = {
        name: evaluated[name],
        "nonzero_weights": size.nonzero_weights,
        "sparsity": size.sparsity,
        "compression_ratio": size.compression_ratio,
        "layers": {layer.name: layer.nonzero for layer in metrics.layers(model)},
    }
    recorded = _recorded(record) | {"weights_sha256": record.weights_sha256}
    measured["weights_sha256"] = state_sha256(model.state_dict())
    return [
        f"{key}: recorded {value}, measured {measured[key]}"
        for key, value in recorded.items()
        if not _agree(key, value, measured[key])
    ]


def _agree(key: str, recorded: Any, measured: Any) -> bool:
    """Errors, counts and hashes to the last digit; perplexities as far as processors sum in the same order."""
    if key == "perplexity" and None not in (recorded, measured):
        return math.isclose(recorded, measured, rel_tol=_ROUNDING)
    return recorded == measured


def _summary(numbers: dict[str, Any]) -> str:
    measured = f"error {numbers['error']:.2f} %" if "error" in numbers else f"perplexity {numbers['perplexity']:.2f}"
    return f"{measured}, {numbers['nonzero_weights']:,} weights, {numbers['compression_ratio']:.1f}x"
