"""Records of one method gathered over its seeds, with none of the runs that diverged lost from sight."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vdbench.config import Experiment, Suite
from vdbench.records import STAGES, Record
from vdbench.stats import Summary, paired_differences, summarise

Sources = Mapping[str, Sequence[Record]]


@dataclass(frozen=True)
class MethodResult:
    """One method of one experiment from one source: `states` has one entry a planned seed, `good` the finished nets."""

    name: str
    experiment: Experiment
    method: str
    source: str
    states: dict[int, str]
    good: list[Record]
    dense_errors: dict[int, float]

    @property
    def errors(self) -> dict[int, float]:
        return {record.seed: record.value for record in self.good}

    @property
    def error(self) -> Summary | None:
        return summarise(list(self.errors.values()))

    @property
    def compression(self) -> Summary | None:
        return summarise([record.size.compression_ratio for record in self.good if record.size])

    @property
    def speedup(self) -> Summary | None:
        return summarise([r.multiply_adds.theoretical_speedup for r in self.good if r.multiply_adds])

    @property
    def sparsities(self) -> list[float]:
        """Mean sparsity of each layer in percent."""
        return [100 * float(m) for m in np.mean([[x.sparsity for x in r.layers] for r in self.good], axis=0)]

    @property
    def control(self) -> Summary | None:
        """Error of the dense nets these runs are compared with, seed by seed."""
        return summarise([self.dense_errors[seed] for seed in self.errors if seed in self.dense_errors])

    @property
    def versus_dense(self) -> Summary | None:
        return None if self.method == "dense" else summarise(paired_differences(self.errors, self.dense_errors))

    @property
    def n(self) -> str:
        """Text such as 5, or 3 of 5: 1 diverged, 1 missing."""
        counts = Counter(state for state in self.states.values() if state != "ok")
        if not counts:
            return str(len(self.states))
        return f"{len(self.good)} of {len(self.states)}: {', '.join(f'{n} {s}' for s, n in counts.items())}"


def state(records: Iterable[Record]) -> str:
    """What became of one run: "ok" once its pruned net is evaluated, else "diverged" or "missing"."""
    stages = {record.stage: record for record in records if record.stage != "time"}
    for record in stages.values():
        if record.status != "ok":
            return record.status
    return "ok" if "prune" in stages else "missing"


def gather(suite: Suite, sources: Sources) -> list[MethodResult]:
    """Experiment by experiment, method by method, source by source; a source without any run of it is left out."""
    results = []
    for name, experiment in suite.experiments.items():
        for method in experiment.present_methods():
            for source, records in sources.items():
                here = [record for record in records if record.experiment == name]
                if here:
                    results.append(_result(name, experiment, method, source, here))
    return results


def _result(name: str, experiment: Experiment, method: str, source: str, records: Sequence[Record]) -> MethodResult:
    ours = [r for r in records if r.method == method]
    seeds = experiment.method_seeds(method)  # type: ignore[arg-type]
    states = {seed: state(r for r in ours if r.seed == seed) for seed in seeds}
    good = [r for r in ours if r.stage == "prune" and states.get(r.seed) == "ok"]
    dense = {r.seed: r.value for r in records if (r.method, r.stage, r.status) == ("dense", "prune", "ok")}
    controls = {r.seed: r.control.value for r in good if r.control}
    return MethodResult(name, experiment, method, source, states, good, dense | controls)


def source_notes(sources: Sources, notes: Mapping[str, Sequence[str]]) -> list[str]:
    """The gaps, then lines on stages whose records were made by more than one state of the code."""
    return [*gaps(sources, notes), *_states_of_the_code(sources)]


def gaps(sources: Sources, notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines on what is missing, stale or diverged, or trained on data that changed in between."""
    lines = []
    for source, records in sources.items():
        own = notes.get(source, [])
        if not records:
            lines.append(f"{source}: no records")
            lines += [f"{source}: {note}" for note in own if not note.startswith("missing")]
            continue
        lines += [f"{source}: {note}" for note in own]
        bad = {record.run: record for record in reversed(records) if record.status != "ok"}
        for (experiment, method, seed), record in reversed(bad.items()):
            why = f" ({record.message})" if record.message else ""
            lines.append(f"{source}: {experiment}/{method}/seed{seed}: {record.status}{why}; not in any mean")
        trained_on: dict[tuple[str, str], set[str]] = {}
        for record in records:
            if record.stage == "train" and "data" in record.inputs:
                trained_on.setdefault((record.experiment, record.dataset), set()).add(record.inputs["data"])
        for (experiment, dataset), contents in trained_on.items():
            if len(contents) > 1:
                lines.append(
                    f"{source}: {experiment}: {dataset} changed between its runs: their numbers are of {len(contents)} "
                    "sets of data; delete the older results"
                )
    return lines


def _states_of_the_code(sources: Sources) -> Iterator[str]:
    for source, records in sources.items():
        for stage in STAGES:
            digests = Counter(record.code_digest[:12] for record in records if record.stage == stage)
            if len(digests) > 1:
                counts = ", ".join(f"{digest} ({n})" for digest, n in digests.items())
                yield (
                    f"{source}: {stage} records come from {len(digests)} states of the code: {counts}; their stage "
                    "versions are the same, so their numbers should be too"
                )
