"""Measured inference time, engine by engine, against the fastest dense one and against dense torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import pandas as pd

from vdbench import outputs
from vdbench.config import Suite
from vdbench.config_timing import DENSE_BACKENDS
from vdbench.records import Record
from vdbench.stats import Ratio, Speedup, contestants, speedups
from vdbench.tables.render import NOTHING, Document, Section, fixed, percent, ratio_digits
from vdbench.tables.results import Sources, source_notes

LEGEND = [
    "Time = median over interleaved samples of a call among many, divided by its images or words. Batch = images, "
    "or texts, of each of which a call reads one word, or as many as follow ×. Over X = median over samples of (X / "
    "engine) in the same setting, with the 95 % percentile bootstrap interval of that median: it says how steady this "
    "machine was, not how other machines would do. Best dense = the fastest, in that very setting, of "
    + "; ".join(outputs.BACKENDS[backend] for backend in DENSE_BACKENDS)
    + ".",
    "Dense engines run the pruned net with its zeros; compacted, dense engines run it without its dead units; all "
    "others compute with sparse weights. Of limit = multiply-adds with weights that are not zero, against what the "
    "cores could do of them at most, operands in registers.",
]
_READING = "Language models read on where the call before ended; in vdbench calls with few words are one thread's."
_COLUMNS = ["experiment", "model", "method", "seed", "source", "density", "backend", "device", "threads", "batch_size"]
_COLUMNS += ["steps", "n", "median_s", "us_per_example", "best_dense", "speedup", "speedup_low", "speedup_high"]
_COLUMNS += ["over_torch", "gflops", "of_limit", "cpu"]
_IN_TERMINAL = ["Net", "Weights left", "Batch", "vdbench, µs", "Over best dense", "Best dense, µs", "Best other, µs"]


def document(suite: Suite, sources: Sources, notes: Mapping[str, Sequence[str]]) -> Document:
    numbers, sections, remarks, timed = [], [], [], []
    for name in outputs.timed(suite):
        records = list(_timed(sources, name))
        for source, record in records:
            numbers += [_numbers(source, record, item) for item in speedups(record)]
        remarks += _missing(name, records) if records else [f"{name}: no timings"]
        sections += _sections(suite, name, records)
        timed += records
    reads = any(
        experiment.timed and experiment.model in outputs.LANGUAGE_MODELS for experiment in suite.experiments.values()
    )
    return Document(
        title=f"Measured inference time ({suite.suite})",
        label="speedup",
        numbers=pd.DataFrame(numbers, columns=_COLUMNS),
        sections=sections,
        notes=[*remarks, *source_notes(sources, notes), *_limits(timed), *LEGEND, *([_READING] if reads else [])],
    )


def overview(suite: Suite, sources: Sources, name: str) -> Iterator[Section]:
    """One timed net or layer for a terminal, on the fewest threads: a table for every source that has timed it."""
    title = outputs.timed_title(suite, name) + (f" ({name})" if name in suite.cases() else "")
    for source, records in _by_source(_timed(sources, name)).items():
        yield from islice(by_threads(f"{title}, {source}", records), 1)


def by_threads(title: str, records: Sequence[Record]) -> Iterator[Section]:
    """vdbench beside the best of the others, for a terminal: a table for every number of threads, the fewest first."""
    frame = _contest(records)
    columns = [column for column in _IN_TERMINAL if column in frame]
    for threads in sorted({timing.threads for record in records for timing in record.timing}):
        on = f"{outputs.threads(threads)}, {records[0].provenance.cpu}"
        yield Section(f"{title}, {on}", frame.loc[frame["Threads"] == str(threads), columns])


def _timed(sources: Sources, name: str) -> Iterator[tuple[str, Record]]:
    for source, records in sources.items():
        for record in records:
            if (record.experiment, record.stage) == (name, "time"):
                yield source, record


def _by_source(records: Iterable[tuple[str, Record]]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for source, record in records:
        found.setdefault(source, []).append(record)
    return found


def _limits(timed: Iterable[tuple[str, Record]]) -> Iterator[str]:
    """What a core of every source could do."""
    for source, records in _by_source(timed).items():
        found = pd.DataFrame([record.limits for record in records if record.limits]).median()
        if len(found):
            rates = [f"{found[key]:.0f} from {place}" for key, place in outputs.OPERANDS.items() if key in found]
            yield (
                f"{source}: GFLOP/s of multiply-adds that one core of {records[0].provenance.cpu} reaches at most, by "
                f"where an operand comes from, measured with every timing, medians: {', '.join(rates)}."
            )


def _missing(name: str, records: Sequence[tuple[str, Record]]) -> list[str]:
    """A line for every reason why engines were not timed, and for the nets of a grid that it holds for."""
    nets: dict[tuple[str, str, str], list[str]] = {}  # by source, engine and reason
    for source, record in records:
        for backend, why in record.missing_backends.items():
            nets.setdefault((source, _engine(backend), why), []).append(_net(record))
    engines: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}  # by source, reason and nets
    for (source, engine, why), of in nets.items():
        engines.setdefault((source, why, tuple(of)), []).append(engine)
    lines = []
    for (source, why, of), left_out in engines.items():
        where = "" if len(of) == sum(own == source for own, _ in records) else f", {'; '.join(of)}"
        lines.append(f"{source}: {name}{where}: {'; '.join(left_out)} not timed: {why}")
    return lines


def _net(record: Record) -> str:
    method = outputs.method(record.method)
    return method if record.method.startswith("density") else f"{method}, seed {record.seed}"


def _sections(suite: Suite, name: str, records: Sequence[tuple[str, Record]]) -> Iterator[Section]:
    """A table of all engines for every net; for a layer at many densities one of the fastest engines."""
    title = outputs.timed_title(suite, name)
    if name in suite.synthetic.convolutions or name in suite.synthetic.linear:
        for source, own in _by_source(records).items():
            yield Section(f"{title}, {source}, {own[0].provenance.cpu}", _contest(own))
        return
    for source, record in records:
        found = speedups(record)
        if found:
            heading = f"{title}, {outputs.method(record.method)}, seed {record.seed}"
            yield Section(f"{heading}, {source}, {record.provenance.cpu}", _every_engine(found, record.model))


def _every_engine(found: Sequence[Speedup], model: str) -> pd.DataFrame:
    ordered = sorted(found, key=lambda item: (*item.timing.setting, item.seconds))
    return _without_empty(
        {
            "Threads": str(item.timing.threads),
            "Batch": item.timing.batch,
            "Engine": _engine(item.timing.backend),
            f"Time {outputs.example(model)}, µs": _microseconds(item),
            "Over best dense": _value(item.over_best),
            "95 % interval": _interval(item.over_best),
            "Best dense": _engine(item.over_best.reference) if item.over_best else NOTHING,
            "Over dense torch": _value(item.over_torch),
            "Of limit": _limit(item),
            "Samples": str(len(item.timing.samples_s)),
        }
        for item in ordered
    )


def _contest(records: Sequence[Record]) -> pd.DataFrame:
    """vdbench, the fastest dense engine and the fastest of all others, for every net and setting."""
    rows = []
    for record in records:
        net = NOTHING if len(records) == 1 or record.method.startswith("density") else _net(record)
        found = speedups(record)
        for setting in sorted({item.timing.setting for item in found}):
            here = [item for item in found if item.timing.setting == setting]
            ours, dense, other = contestants(here)
            rows.append(
                {
                    "Net": net,
                    "Weights left": _density(record),
                    "Threads": str(here[0].timing.threads),
                    "Batch": here[0].timing.batch,
                    "vdbench, µs": _microseconds(ours),
                    "Over best dense": _value(ours and ours.over_best),
                    "95 % interval": _interval(ours and ours.over_best),
                    "Over dense torch": _value(ours and ours.over_torch),
                    "Of limit": _limit(ours),
                    "Best dense, µs": _named(dense),
                    "Best other, µs": _named(other),
                }
            )
    return _without_empty(rows)


def _without_empty(rows: Iterator[dict[str, str]] | list[dict[str, str]]) -> pd.DataFrame:
    """Columns of which no record says anything are left out."""
    frame = pd.DataFrame(rows)
    return frame.loc[:, (frame != NOTHING).any()]


def _engine(backend: str) -> str:
    return outputs.BACKENDS.get(backend, backend)  # type: ignore[call-overload]


def _density(record: Record) -> str:
    return NOTHING if record.size is None else f"{percent(100 * (1 - record.size.sparsity))} %"


def _microseconds(item: Speedup | None) -> str:
    if item is None:
        return NOTHING
    value = 1e6 * item.seconds_an_example
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _named(item: Speedup | None) -> str:
    return NOTHING if item is None else f"{_microseconds(item)} ({_engine(item.timing.backend)})"


def _value(ratio: Ratio | None) -> str:
    return NOTHING if ratio is None else _times(ratio.value)


def _interval(ratio: Ratio | None) -> str:
    return NOTHING if ratio is None or ratio.interval is None else " to ".join(map(_times, ratio.interval))


def _times(value: float) -> str:
    return f"{fixed(value, ratio_digits(value))}×"


def _limit(item: Speedup | None) -> str:
    return NOTHING if item is None or item.limit is None else f"{100 * item.limit:.2g} %"


def _numbers(source: str, record: Record, item: Speedup) -> dict[str, object]:
    timing = item.timing
    density = None if record.size is None else 1 - record.size.sparsity
    values = [record.experiment, record.model, record.method, record.seed, source, density, timing.backend]
    values += [timing.device, *timing.setting, len(timing.samples_s), item.seconds]
    values += [1e6 * item.seconds_an_example, item.over_best.reference if item.over_best else None]
    best = item.over_best
    values += [best.value, *(best.interval or (None, None))] if best else [None, None, None]
    values += [item.over_torch.value if item.over_torch else None]
    return dict(zip(_COLUMNS, [*values, item.gflops, item.limit, record.provenance.cpu], strict=True))
