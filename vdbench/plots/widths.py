"""The paper's figure of the VGG-like net: error and compression against its width."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vdbench import outputs, published
from vdbench.config import VARIATIONAL_METHODS, VGG_WIDTHS
from vdbench.plots.style import COLOURS, MARKERS, NoData, View, marker_handles, plain_log_axis
from vdbench.stats import Summary, summarise

_GREY = "#707070"
_PUBLISHED = {"Original": ("--", "P"), published.SPARSE_VD: ("-", "*")}


def error_and_compression_by_width(*views: View) -> Figure:
    """A row for each data set, validation errors apart: means of our nets with their intervals, and published points.

    What is published for CIFAR-10 is drawn, named for what it is, beside results on CIFAR-10 as JPEG too.
    """
    rows: dict[tuple[str, str], list[View]] = {}
    for view in views:
        if view.of("prune"):
            rows.setdefault((view.experiment.dataset, view.error_label), []).append(view)
    if not rows:
        raise NoData("no net is pruned and evaluated yet")
    figure = Figure(figsize=(11.5, 4.4 * len(rows)))
    for part, ((dataset, label), group) in zip(
        figure.subfigures(len(rows), 1, squeeze=False).ravel(), rows.items(), strict=True
    ):
        error, compression = part.subplots(1, 2)
        source = dataset.removesuffix("_jpeg") if not group[0].experiment.validation_size else ""
        handles = _published(error, compression, source)
        methods = [m for m in outputs.METHODS if any(view.of("prune", [m]) for view in group)]
        for method in methods:
            _ours(error, group, method, "error")
            if method != "dense":
                _ours(compression, group, method, "compression")
        plain_log_axis(compression, "y")
        error.set_ylim(bottom=0)
        error.set(xlabel="Width k", ylabel=label)
        compression.set(xlabel="Width k", ylabel="Compression, |W| / |W ≠ 0|")
        compression.set_title(_thresholds(group), fontsize="small")
        part.suptitle(f"{outputs.dataset(group[0].experiment)} ({', '.join(sorted({v.source for v in group}))})")
        part.legend(handles=[*marker_handles(methods), *handles], loc="outside lower center", ncols=3)
    return figure


def _thresholds(group: Sequence[View]) -> str:
    """Where weights are removed, if it is not the same at all widths."""
    widths: dict[float, set[float]] = {}
    for view in group:
        if view.of("prune", VARIATIONAL_METHODS):
            widths.setdefault(view.experiment.threshold, set()).add(VGG_WIDTHS[view.experiment.model])
    if len(widths) < 2:
        return ""
    parts = [f"≥ {threshold:g} (k = {', '.join(f'{k:g}' for k in sorted(ks))})" for threshold, ks in widths.items()]
    return f"removed at log α {', '.join(parts)}"


def _published(error: Axes, compression: Axes, dataset: str) -> list[Line2D]:
    """Draw what is published for a data set, if anything is, and say what that is."""
    handles = []
    for method, (line, marker) in _PUBLISHED.items():
        found = published.by_width(dataset, method)
        if not found:
            continue
        widths = [VGG_WIDTHS[row.network] for row in found]
        look = {"linestyle": line, "marker": marker, "color": _GREY, "markersize": 9, "linewidth": 1}
        error.plot(widths, [float(row.error_pct) for row in found], **look)
        if method == published.SPARSE_VD:
            compression.plot(widths, [float(row.compression) for row in found], **look)
        handles.append(Line2D([], [], **look, label=f"{method}, published for {outputs.DATASETS[dataset]}"))
    return handles


def _ours(axis: Axes, group: Sequence[View], method: str, quantity: str) -> None:
    """A point an experiment. No line joins them: a width may have several, by recipes of their own."""
    points: list[tuple[float, Summary]] = []
    for view in group:
        nets = view.of("prune", [method])
        values = [
            net.metrics["error"] if quantity == "error" else net.size.compression_ratio for net in nets if net.size
        ]
        summary = summarise(values)
        if summary:
            points.append((VGG_WIDTHS[view.experiment.model], summary))
    points.sort(key=lambda point: point[0])
    means = [summary.mean for _, summary in points]
    ends = [summary.interval or (summary.mean, summary.mean) for _, summary in points]
    spread = [[m - low for m, (low, _) in zip(means, ends, strict=True)],
              [high - m for m, (_, high) in zip(means, ends, strict=True)]]  # fmt: skip
    look = {"color": COLOURS[method], "marker": MARKERS[method], "markersize": 6, "capsize": 3, "linestyle": ""}
    axis.errorbar([width for width, _ in points], means, yerr=spread, **look)
