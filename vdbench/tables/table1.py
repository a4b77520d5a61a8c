"""Error, sparsity and compression beside the published numbers: the paper's Table 1 and ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from vdbench import outputs, published
from vdbench.config import VARIATIONAL_METHODS, Experiment, Suite
from vdbench.published import Published
from vdbench.stats import Summary
from vdbench.tables.remarks import remarks_on
from vdbench.tables.render import NOTHING, Document, Section, interval, percent, plus_minus, ratio, signed
from vdbench.tables.results import MethodResult, Sources, gather, source_notes

LEGEND = [
    "Every result of ours is of the last epoch: mean ± sample standard deviation over n seeds, with the 95 % "
    "percentile bootstrap interval of the mean, which at n of 3 to 5 covers less than it says. Published numbers are "
    "single values; their authors give no spread.",
    "Compression = weights / weights that are not zero, mean over seeds of the ratio; biases are not counted, weights "
    "of units that no longer matter are. Theoretical speedup = multiply-adds / multiply-adds left.",
    "Against the paper, for the two variational methods: our mean error or perplexity minus its, in points, and our "
    "mean compression over its. Against dense: error or perplexity minus that of the dense net of the same seed, in "
    "points, mean ± sample standard deviation of the paired differences.",
]


def document(suite: Suite, sources: Sources, notes: Mapping[str, Sequence[str]]) -> Document:
    results = gather(suite, sources)
    rows, sections, remarks = [], [], []
    for name, experiment in suite.experiments.items():
        ours = [result for result in results if result.name == name]
        paper = published.rows("published", experiment)
        others = published.rows("third_party", experiment) + published.rows("related", experiment)
        if not (ours or paper or others):
            continue
        title = outputs.title(name, experiment)
        rows += [_published_numbers(name, experiment, row) for row in [*paper, *others]]
        rows += [_numbers(result) for result in ours]
        sections += [
            Section(f"{title}: side by side", side_by_side(experiment, ours, list(sources))),
            Section(f"{title}: in detail", detail(experiment, ours)),
        ]
        if others:
            sections.append(Section(f"{title}: what others report for Sparse VD", _others(others)))
        remarks += remarks_on(name, suite, results)
    cited = dict.fromkeys(row.source for e in suite.experiments.values() for row in published.rows("published", e))
    return Document(
        title=f"Error, sparsity and compression ({suite.suite})",
        label="table1",
        numbers=pd.DataFrame(rows, columns=list(_numbers_template())),
        sections=sections,
        notes=[
            *remarks,
            *source_notes(sources, notes),
            *LEGEND,
            *(f"Published numbers: {source}." for source in cited),
        ],
    )


def side_by_side(experiment: Experiment, ours: Sequence[MethodResult], sources: Sequence[str]) -> pd.DataFrame:
    """Error % at compression: published, then one column a source."""
    paper = {row.method: row for row in published.rows("published", experiment)}
    own = {"dense": "Original"} | dict.fromkeys(VARIATIONAL_METHODS, published.SPARSE_VD)
    rows = [
        {"Method": row.method, "Published": _published_cell(row, experiment)} | dict.fromkeys(sources, NOTHING)
        for row in paper.values()
        if row.method not in own.values()
    ]
    for method in experiment.present_methods():
        cells = {result.source: _cell(result) for result in ours if result.method == method}
        row = paper.get(own.get(method, ""))
        label = outputs.METHODS[method] + (f" ({row.method})" if row and method == "dense" else "")
        rows.append(
            {"Method": label, "Published": _published_cell(row, experiment) if row else NOTHING}
            | {source: cells.get(source, NOTHING) for source in sources}
        )
    columns = {"Method": "Method", "Published": "Published"} | {s: s[0].upper() + s[1:] for s in sources}
    return pd.DataFrame(rows, columns=list(columns)).rename(columns=columns)


def detail(experiment: Experiment, ours: Sequence[MethodResult]) -> pd.DataFrame:
    """Published rows first, then every method and source in full."""
    error_name = outputs.error_name(experiment).capitalize() + outputs.error_unit(experiment).replace(" ", ", ")
    rows = [
        {
            "Method": row.method,
            "Source": "published",
            error_name: row.error_pct,
            "Sparsity per layer, %": _dashed(row),
            "Compression": row.compression,
        }
        for row in published.rows("published", experiment)
    ]
    for result in ours:
        error, dense = result.error, result.versus_dense
        error_change, compression_factor = against_paper(result)
        rows.append(
            {
                "Method": outputs.METHODS[result.method],
                "Source": result.source,
                error_name: plus_minus(error, 2),
                "95 % interval": interval(error.interval if error else None, 2),
                "n": result.n,
                "Sparsity per layer, %": sparsity_text(result),
                "Compression": ratio(result.compression),
                "Error against paper": signed(error_change, 2),
                "Compression against paper": NOTHING if compression_factor is None else f"{compression_factor:.2f}×",
                "Error against dense": _paired(dense, error),
                "Dense error, %": plus_minus(result.control, 2),
                "Theoretical speedup": ratio(result.speedup),
            }
        )
    columns = ["Method", "Source", error_name, "95 % interval", "n", "Sparsity per layer, %", "Compression"]
    columns += ["Error against paper", "Compression against paper"] if published.sparse_vd(experiment) else []
    columns += ["Error against dense", "Dense error, %", "Theoretical speedup"]
    frame = pd.DataFrame([{column: row.get(column, NOTHING) for column in columns} for row in rows], columns=columns)
    if outputs.measure(experiment) == "error":
        return frame
    names = {f"Error against {other}": f"Against {other}" for other in ("paper", "dense")}
    return frame.rename(columns=names | {"Dense error, %": "Dense perplexity"})


def against_paper(result: MethodResult) -> tuple[float | None, float | None]:
    """Error minus the paper's in points, compression over the paper's; None where the two do not compare."""
    paper = published.sparse_vd(result.experiment)
    error, compression = result.error, result.compression
    if paper is None or error is None or compression is None or result.method not in VARIATIONAL_METHODS:
        return None, None
    return error.mean - float(paper.error_pct), compression.mean / float(paper.compression)


def _dashed(row: Published) -> str:
    return row.sparsity_per_layer_pct.replace(" - ", " – ") or NOTHING


def sparsity_text(result: MethodResult) -> str:
    return " – ".join(map(percent, result.sparsities)) if result.good else NOTHING


def _paired(difference: Summary | None, error: Summary | None) -> str:
    if difference is None or error is None:
        return NOTHING
    spread = "" if difference.std is None else f" ± {difference.std:.2f}"
    pairs = "" if difference.n == error.n else f" ({difference.n} pair{'' if difference.n == 1 else 's'})"
    return f"{signed(difference.mean, 2)}{spread}{pairs}"


def _cell(result: MethodResult) -> str:
    if not result.good:
        return result.n
    compression = result.compression
    at = "" if compression is None else f" at {ratio(compression)}×"
    return f"{plus_minus(result.error, 2)}{outputs.error_unit(result.experiment)}{at} (n = {result.n})"


def _published_cell(row: Published, experiment: Experiment) -> str:
    return f"{row.error_pct}{outputs.error_unit(experiment)} at {row.compression}×"


def _others(rows: Sequence[Published]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "Net": row.architecture,
            "Error, %": row.error_pct,
            "Sparsity per layer, %": _dashed(row),
            "Compression": row.compression,
            "Where": row.source,
            "Confidence": row.confidence,
            "Remark": row.remark or NOTHING,
        }
        for row in rows
    )


def _published_numbers(name: str, experiment: Experiment, row: Published) -> dict[str, Any]:
    return _numbers_template() | {
        "experiment": name,
        "dataset": row.dataset,
        "model": experiment.model,
        "method": row.method,
        "source": row.kind,
        "error_kind": outputs.error_name(experiment),
        "error_mean": float(row.error_pct),
        "sparsity_per_layer": row.sparsity_per_layer_pct,
        "compression_mean": float(row.compression),
        "reference": row.source,
        "confidence": row.confidence,
        "remark": "; ".join(filter(None, [f"net: {row.architecture}", row.remark])),
    }


def _numbers(result: MethodResult) -> dict[str, Any]:
    error_change, compression_factor = against_paper(result)
    experiment = result.experiment
    states = list(result.states.values())
    return _numbers_template() | {
        "experiment": result.name,
        "dataset": experiment.dataset,
        "model": experiment.model,
        "method": result.method,
        "source": result.source,
        "error_kind": outputs.error_name(experiment),
        "threshold": experiment.threshold,
        "seeds": len(states),
        "n": len(result.good),
        "diverged": states.count("diverged"),
        "missing": states.count("missing"),
        **_spread("error", result.error),
        "sparsity_per_layer": " - ".join(f"{value:.3f}" for value in result.sparsities) if result.good else "",
        **_spread("compression", result.compression),
        "error_minus_paper": error_change,
        "compression_over_paper": compression_factor,
        **_spread("error_minus_dense", result.versus_dense),
        "pairs_with_dense": result.versus_dense.n if result.versus_dense else None,
        "dense_error": result.control.mean if result.control else None,
        **_spread("theoretical_speedup", result.speedup),
    }


def _spread(name: str, summary: Summary | None) -> dict[str, float | None]:
    low, high = summary.interval if summary and summary.interval else (None, None)
    return {
        f"{name}_mean": summary.mean if summary else None,
        f"{name}_std": summary.std if summary else None,
        f"{name}_low": low,
        f"{name}_high": high,
    }


def _numbers_template() -> dict[str, Any]:
    """Every column of the CSV, in order, empty."""
    names = ["experiment", "dataset", "model", "method", "source", "error_kind", "threshold"]
    names += ["seeds", "n", "diverged", "missing", *_spread("error", None), "sparsity_per_layer"]
    names += [*_spread("compression", None), "error_minus_paper", "compression_over_paper"]
    names += [*_spread("error_minus_dense", None), "pairs_with_dense", "dense_error"]
    names += [*_spread("theoretical_speedup", None), "reference", "confidence", "remark"]
    return dict.fromkeys(names)


def terminal(experiment: Experiment, ours: Sequence[MethodResult]) -> pd.DataFrame:
    """The few columns that fit a terminal."""
    rows = [
        {"method": row.method, "source": "published", "error %": row.error_pct, "compression": f"{row.compression}×"}
        | {"sparsity per layer %": _dashed(row), "n": NOTHING}
        for row in published.rows("published", experiment)
    ]
    for result in ours:
        rows.append(
            {
                "method": outputs.METHODS[result.method],
                "source": result.source,
                "error %": plus_minus(result.error, 2),
                "compression": f"{ratio(result.compression)}×" if result.good else NOTHING,
                "sparsity per layer %": sparsity_text(result),
                "n": f"{len(result.good)}/{len(result.states)}",
            }
        )
    frame = pd.DataFrame(rows, columns=["method", "source", "error %", "compression", "sparsity per layer %", "n"])
    return frame if outputs.measure(experiment) == "error" else frame.rename(columns={"error %": "perplexity"})
