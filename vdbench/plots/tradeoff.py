"""Error against compression: every net, every variational run's curve over thresholds, published points."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from vdbench import outputs, published
from vdbench.plots.style import COLOURS, MARKERS, NoData, View, marker_handles, plain_log_axis
from vdbench.records import Record

PUBLISHED_MARKERS = {"Original": "P", "Pruning (Han)": "X", "DNS (Guo)": "d", "SWS (Ullrich)": "p", "Sparse VD": "*"}
THIRD_PARTY_LABEL = "Sparse VD, as others report it"
_TOP = 2.5  # of the lowest error: the axis ends there, what lies above is named at the edge


def error_vs_compression(*views: View) -> Figure:
    """One panel an experiment, with the dense nets of all that have the same model and data set.

    One that has no other net than those has none of its own, unless it is the only one of its kind.
    """
    present = [view for view in views if view.of("prune")]
    if not present:
        raise NoData("no run is pruned and evaluated yet")
    sparse = [view for view in present if any(net.method != "dense" for net in view.of("prune"))]
    shown = {outputs.comparable(view.experiment) for view in sparse}
    drawn = [view for view in present if view in sparse or outputs.comparable(view.experiment) not in shown]
    columns = min(2, len(drawn))
    lines = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(6.2 * columns, 4.3 * lines + 1))
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    dense = [_dense_of_others(view, present) for view in drawn]
    several = len({view.experiment.threshold for view in sparse}) > 1
    for axis, view, others in zip(axes, drawn, dense, strict=False):
        _panel(axis, view, others)
        at = f", log α ≥ {view.experiment.threshold:g}" if several and view in sparse else ""
        axis.set_title(f"{view.title} ({view.source}{at})")
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    handles = _handles(drawn, elsewhere=any(dense))
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if columns == 2 else 2)
    return figure


def _dense_of_others(view: View, views: Sequence[View]) -> set[float]:
    """Errors of the dense nets, of this model and data set, that are runs of other experiments: what this one's are
    compared with may be among them."""
    found = {net.control.value for net in view.of("prune") if net.control}
    for other in views:
        if outputs.comparable(other.experiment) == outputs.comparable(view.experiment):
            found |= {net.value for net in other.of("prune", ["dense"])}
    return found - {net.value for net in view.of("prune", ["dense"])}


def _panel(axis: Axes, view: View, dense: set[float]) -> None:
    nets = view.of("prune")
    paper = [(row, "black") for row in published.rows("published", view.experiment)]
    others = [(row, "#707070") for row in published.rows("third_party", view.experiment)]
    errors = [net.value for net in nets] + [float(row.error_pct) for row, _ in paper] + sorted(dense)
    top = _TOP * min(errors)
    plain_log_axis(axis, "x")
    for net in nets:
        points = sorted(net.curve, key=lambda point: point.compression_ratio)
        ratios, curve = [p.compression_ratio for p in points], [p.value for p in points]
        axis.plot(ratios, curve, ".-", color=COLOURS[net.method], linewidth=0.9, markersize=4, alpha=0.55, zorder=2)
        look = {"color": COLOURS[net.method], "markeredgecolor": "white", "markersize": 7}
        axis.plot(_ratio(net), net.value, MARKERS[net.method], **look, zorder=4)
    if dense:
        axis.plot([1] * len(dense), sorted(dense), MARKERS["dense"], color=COLOURS["dense"], mfc="white", zorder=3)
    for row, colour in [*others, *paper]:
        marker = PUBLISHED_MARKERS[row.method] if row.kind == "published" else "x"
        size = 13 if row.method == published.SPARSE_VD and row.kind == "published" else 8
        edge = colour if marker == "x" else "white"
        look = {"color": colour, "markeredgecolor": edge, "markersize": size}
        axis.plot(float(row.compression), float(row.error_pct), marker, **look, zorder=5)
    axis.set_ylim(0.8 * min(errors), top)
    axis.set_xlim(0.75, max(axis.get_xlim()[1], 10))  # nothing is compressed less than not at all
    seeds = Counter(net.method for net in nets)
    above = [(_ratio(net), net.value, net.method) for net in nets]
    above += [(float(row.compression), float(row.error_pct), "") for row, _ in others]
    unit = outputs.error_unit(view.experiment)
    _name_what_is_above(axis, [point for point in above if point[1] > top], top, seeds, unit)
    axis.set(xlabel="Compression, |W| / |W ≠ 0|", ylabel=view.error_label)


def _name_what_is_above(
    axis: Axes, points: Sequence[tuple[float, float, str]], top: float, seeds: Mapping[str, int], unit: str
) -> None:
    """One marker a method under the upper edge, a line each, with the runs and errors that it stands for."""
    for line, method in enumerate(dict.fromkeys(method for *_, method in points)):
        ratios = sorted(ratio for ratio, _, name in points if name == method)
        errors = [error for _, error, name in points if name == method]
        middle = ratios[len(ratios) // 2]
        span = " to ".join(dict.fromkeys(f"{end:.1f}" for end in (min(errors), max(errors))))
        name = f"{outputs.METHODS[method]}, {len(errors)} of {seeds[method]} seeds" if method else THIRD_PARTY_LABEL
        colour = COLOURS.get(method, "#707070")
        down = -15 - 14 * line  # points, clear of what lies just under the edge
        lowered = axis.transData + ScaledTranslation(0, down / 72, axis.figure.dpi_scale_trans)
        axis.plot(middle, top, MARKERS.get(method, "x"), color=colour, ms=7, transform=lowered, zorder=5)
        left_half = middle < math.prod(axis.get_xlim()) ** 0.5
        axis.annotate(
            f"{name}: {span}{unit} ↑",
            (middle, top),
            xytext=(8 if left_half else -8, down),
            textcoords="offset points",
            ha="left" if left_half else "right",
            va="center",
            color=colour,
            fontsize="small",
        )


def _ratio(net: Record) -> float:
    return net.size.compression_ratio if net.size else math.nan


def _handles(views: Sequence[View], *, elsewhere: bool) -> list[Line2D]:
    present = {net.method for view in views for net in view.of("prune")}
    curves = any(net.curve for view in views for net in view.of("prune"))
    handles = marker_handles([method for method in outputs.METHODS if method in present], markersize=7)
    if elsewhere:
        (hollow,) = marker_handles(["dense"], markerfacecolor="white")
        hollow.set_label("dense, of another experiment")
        handles.insert(int("dense" in present), hollow)
    if curves:
        handles.append(Line2D([], [], marker=".", color="#808080", linewidth=1, label="one run, threshold varied"))
    rows = {row.method: row for view in views for row in published.rows("published", view.experiment)}
    for method in rows:
        style = {"marker": PUBLISHED_MARKERS[method], "linestyle": "", "color": "black", "markersize": 9}
        handles.append(Line2D([], [], **style, label=f"{method}, published"))
    if any(published.rows("third_party", view.experiment) for view in views):
        handles.append(Line2D([], [], marker="x", linestyle="", color="#707070", label=THIRD_PARTY_LABEL))
    return handles
