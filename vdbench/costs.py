"""What the recorded runs took, and what a reproduction with five seeds takes on some nodes: part of docs/cluster.md.

`python -m vdbench.costs` writes it there.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

from vdbench import current, pages, planning, records, shipping
from vdbench.config import Suite, load_suite
from vdbench.estimates import Past
from vdbench.records import Record

PAGE = Path("docs/cluster.md")
SUITES = ("configs/paper.yaml",)  # those whose every run is recorded
SEEDS, NODES = 5, (1, 2, 4, 8, 16, 32)


def render(root: Path = Path()) -> str:
    """The tables, in Markdown, from the records under `results/recorded` of a checkout."""
    parts = []
    for file in SUITES:
        suite = load_suite(root / file)
        found, _ = current.load(root / shipping.FOLDER / suite.suite, suite)
        parts += [_taken(file, found), _reproduction(file, suite, found)]
    return "\n\n".join(parts)


def _taken(file: str, found: Sequence[Record]) -> str:
    """What was measured: a row an experiment and kind of job."""
    cpus = Counter(record.provenance.cpu for record in found)
    rows = [
        [
            experiment,
            kind,
            len(alike),
            f"{sum(r.wall_s for r in alike) / len(alike) / 60:.2g}",
            f"{sum(r.wall_s for r in alike) / 3600:.2f}",
            f"{max(r.peak_rss_mb for r in alike):,.0f}",
            _hours([r for r in alike if r.provenance.device != "cpu"]),
        ]
        for experiment, kind, alike in _by_kind(found)
    ]
    headers = ["experiment", "job", "recorded", "minutes each", "hours together", "peak memory, MB", "GPU hours"]
    on_gpu = any(record.provenance.device != "cpu" for record in found)
    told = f"`{file}`, recorded on {' and '.join(cpus)}, one thread a training."
    return f"{told}{'' if on_gpu else ' None of these runs was recorded on a GPU.'}\n\n{_table(rows, headers)}"


def _hours(found: Sequence[Record]) -> str:
    return f"{sum(record.wall_s for record in found) / 3600:.2f}" if found else "–"


def _by_kind(found: Iterable[Record]) -> Iterator[tuple[str, str, list[Record]]]:
    kinds: dict[tuple[str, str], list[Record]] = {}
    for record in found:
        kind = f"train, {record.method}" if record.stage == "train" else record.stage
        kinds.setdefault((record.experiment, kind), []).append(record)
    order = list(dict.fromkeys(experiment for experiment, _ in kinds))
    for (experiment, kind), alike in sorted(kinds.items(), key=lambda item: order.index(item[0][0])):
        yield experiment, kind, alike


def _reproduction(file: str, suite: Suite, found: Sequence[Record]) -> str:
    """How long five seeds of everything take, from the medians of what was recorded."""
    seeds = list(range(SEEDS))
    experiments = {n: e.model_copy(update={"seeds": seeds, "seeds_of": {}}) for n, e in suite.experiments.items()}
    (cpu, _), *_ = Counter(record.provenance.cpu for record in found).most_common()
    planned = planning.jobs(suite.model_copy(update={"experiments": experiments}), Path("none"), Past(found, cpu))
    planned = [job for job in planned if job.name[0] in records.STAGES]  # of the others nothing is recorded
    one_a_node = [replace(job, alone=False) for job in planned]
    rows = [[nodes, f"{planning.makespan(one_a_node, nodes) / 3600:.1f}"] for nodes in NODES]
    total = sum(job.seconds for job in planned) / 3600
    told = (
        f"All of `{file}` with {SEEDS} seeds of every method is {len(planned)} jobs besides the tables and figures, and"
        f" {total:.1f} hours of work; on nodes that run one job at a time, not counting the time in the queue:"
    )
    return f"{told}\n\n{_table(rows, ['nodes', 'hours'])}"


def _table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    pages.rewrite(PAGE, "costs", render())
