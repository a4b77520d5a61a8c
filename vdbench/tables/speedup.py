"""Measured inference time of pruned nets, backend by backend, against dense torch."""

from collections.abc import Mapping, Sequence

import pandas as pd

from vdbench import outputs
from vdbench.config import Suite
from vdbench.records import Record
from vdbench.stats import Speedup, speedups
from vdbench.tables.render import NOTHING, Document, Section, fixed, ratio_digits
from vdbench.tables.results import Sources, source_notes

LEGEND = [
    "Time = median over interleaved samples of one call. Speedup = median over samples of (dense torch / backend) at "
    "the same batch size and number of threads, with the 95 % percentile bootstrap interval of that median: it says "
    "how steady this machine was, not how other machines would do.",
    "Every backend but the dense ones runs the pruned weights as sparse matrices; the dense ones run the same net with "
    "its zeros.",
]
_COLUMNS = ["experiment", "method", "seed", "source", "backend", "device", "threads", "batch_size", "n", "median_s"]
_COLUMNS += ["us_per_image", "speedup", "speedup_low", "speedup_high", "cpu"]


def document(suite: Suite, sources: Sources, notes: Mapping[str, Sequence[str]]) -> Document:
    numbers, sections, remarks = [], [], []
    for name, experiment in suite.experiments.items():
        everything = [(source, record) for source, records in sources.items() for record in records]
        timed = [(s, r) for s, r in everything if (r.experiment, r.stage) == (name, "time")]
        for source, record in timed:
            remarks += [
                f"{source}: {name}, {outputs.METHODS[record.method]}: {outputs.BACKENDS.get(backend, backend)} not "
                f"timed: {why}"
                for backend, why in record.missing_backends.items()
            ]
            found = speedups(record)
            if not found:
                continue
            numbers += [_numbers(source, record, item) for item in found]
            heading = f"{outputs.title(name, experiment)}, {outputs.METHODS[record.method]}, seed {record.seed}"
            sections.append(Section(f"{heading}, {source}, {record.provenance.cpu}", _frame(found)))
        if experiment.timed and not timed:
            remarks.append(f"{name}: no timings")
    return Document(
        title=f"Measured inference time ({suite.suite})",
        label="speedup",
        numbers=pd.DataFrame(numbers, columns=_COLUMNS),
        sections=sections,
        notes=[*remarks, *source_notes(sources, notes), *LEGEND],
    )


def _frame(found: Sequence[Speedup]) -> pd.DataFrame:
    ordered = sorted(found, key=lambda item: (item.timing.threads, item.timing.batch_size))
    return pd.DataFrame(
        {
            "Threads": str(item.timing.threads),
            "Batch": str(item.timing.batch_size),
            "Backend": outputs.BACKENDS.get(item.timing.backend, item.timing.backend),
            "Time a call, µs": f"{1e6 * item.seconds:.3g}" if item.seconds < 1e-3 else f"{1e6 * item.seconds:.0f}",
            "Time an image, µs": f"{1e6 * item.seconds / item.timing.batch_size:.3g}",
            "Speedup over dense torch": _ratio(item.ratio),
            "95 % interval": NOTHING if item.interval is None else " to ".join(map(_ratio, item.interval)),
            "Samples": str(len(item.timing.samples_s)),
        }
        for item in ordered
    )


def _ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{fixed(value, ratio_digits(value))}×"


def _numbers(source: str, record: Record, item: Speedup) -> dict[str, object]:
    timing = item.timing
    low, high = item.interval or (None, None)
    values = [record.experiment, record.method, record.seed, source, timing.backend, timing.device, timing.threads]
    values += [timing.batch_size, len(timing.samples_s), item.seconds, 1e6 * item.seconds / timing.batch_size]
    return dict(zip(_COLUMNS, [*values, item.ratio, low, high, record.provenance.cpu], strict=True))
