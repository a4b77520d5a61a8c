"""What every pruned language model is left with: words, units, gates."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from vdbench import outputs
from vdbench.config import Suite
from vdbench.records import Record
from vdbench.tables.render import NOTHING, Document, Section
from vdbench.tables.results import Sources, source_notes

LEGEND = (
    "Counted are words whose embedding feeds a unit (read) or whose logit depends on one (predicted), units from which "
    "a path of weights leads to a logit, and their gates that have incoming weights. Taking out the rest is exact."
)


def document(suite: Suite, sources: Sources, notes: Mapping[str, Sequence[str]]) -> Document:
    rows, sections = [], []
    for name, experiment in suite.experiments.items():
        here = [
            (source, record)
            for source, records in sources.items()
            for record in records
            if record.experiment == name and record.stage == "prune" and record.kept
        ]
        if here:
            title = outputs.title(name, experiment)
            rows += [_row(source, record) for source, record in here]
            sections.append(Section(f"{title}, what is left", pd.DataFrame([_shown(*each) for each in here])))
            told = [words for each in here for words in _words(*each)]
            sections += [Section(f"{title}, words", pd.DataFrame(told))] if told else []
    return Document(
        title=f"What language models are left with ({suite.suite})",
        label="kept",
        numbers=pd.DataFrame(rows),
        sections=sections,
        notes=[*source_notes(sources, notes), LEGEND],
    )


def _row(source: str, record: Record) -> dict[str, Any]:
    named = {"source": source, "experiment": record.experiment, "method": record.method, "seed": record.seed}
    return named | record.kept


def _shown(source: str, record: Record) -> dict[str, str]:
    def count(kind: str) -> str:
        found = [f"{number:,}" for key, number in record.kept.items() if key == kind or key.startswith(f"{kind}_l")]
        return " – ".join(found) or NOTHING

    return {
        "Source": source,
        "Method": outputs.method(record.method),
        "Seed": str(record.seed),
        "Words read": count("words_read"),
        "Words predicted": count("words_predicted"),
        "Dimensions": count("dimensions"),
        "Units": count("units"),
        "Gates": count("gates"),
    }


def _words(source: str, record: Record) -> list[dict[str, str]]:
    return [
        {
            "Source": source,
            "Method": outputs.method(record.method),
            "Seed": str(record.seed),
            "Words": kind,
            "Most frequent dropped": " ".join(words.frequent_dropped),
            "Rarest kept": " ".join(words.rare_kept),
        }
        for kind, words in record.words.items()
        if words.frequent_dropped
    ]
