"""Tables, from records alone: CSV for machines, HTML, Markdown and LaTeX for readers, plain text for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vdbench import outputs
from vdbench.config import Suite
from vdbench.records import Record
from vdbench.tables import kept, render, runs, speedup, table1
from vdbench.tables.results import Sources, gaps, gather

TABLES = {"table1": table1.document, "runs": runs.document, "kept": kept.document, "speedup": speedup.document}
_NOTES_IN_TERMINAL = 8


def write_tables(suite: Suite, sources: Sources, notes: Mapping[str, Sequence[str]], output: Path) -> list[Path]:
    """Write every table of `outputs.table_names(suite)`.

    `sources` are the current records by where they come from, such as "recorded" and "this machine", in the order of
    the columns; `notes` are the lines `current.load` gave with them.
    """
    documents = [TABLES[name](suite, sources, notes) for name in outputs.tables(suite)]
    return [path for document in documents for path in render.write(document, output)]


def render_text(suite: Suite, sources: Sources, notes: Mapping[str, Sequence[str]]) -> str:
    """Table 1, and the fastest engines on every net that is timed, for a terminal of 110 columns."""
    results = gather(suite, sources)
    parts = []
    for name, experiment in suite.experiments.items():
        ours = [result for result in results if result.name == name]
        frame = table1.terminal(experiment, ours)
        body = "(no runs yet)" if frame.empty else render.to_text(frame)
        parts.append(f"{outputs.title(name, experiment)}, {outputs.error_name(experiment)}\n{body}")
    trained = dict.fromkeys(name for name, _, _ in suite.timed_runs())
    parts += [speeds(suite, sources, name) for name in (*trained, *suite.cases())]
    lines = gaps(sources, notes)
    if len(lines) > _NOTES_IN_TERMINAL:
        hidden = len(lines) - _NOTES_IN_TERMINAL
        lines = [*lines[:_NOTES_IN_TERMINAL], f"and {hidden} more such lines; all of them are in table1.md"]
    return "\n\n".join([*parts, "\n".join(lines)]).strip() + "\n"


def speeds(suite: Suite, sources: Sources, name: str) -> str:
    """One timed net on few threads, vdbench beside the best of the others, for a terminal of 110 columns."""
    return _text(speedup.overview(suite, sources, name)) or f"{outputs.timed_title(suite, name)}\n(no timings yet)"


def speeds_by_hand(record: Record) -> str:
    """The same of one record, on every number of threads."""
    return _text(speedup.by_threads(record.experiment, [record])) or "(no engine that was asked for runs this net here)"


def _text(sections: Iterable[render.Section]) -> str:
    return "\n\n".join(f"{section.heading}\n{render.to_text(section.frame)}" for section in sections)
