"""How long an image, or a word, takes, engine by engine."""

import itertools

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vdbench import outputs
from vdbench.config_timing import DENSE_BACKENDS
from vdbench.plots.style import PALETTE, NoData, Timed, plain_log_axis
from vdbench.stats import Speedup, speedups

# How an engine goes about it: colour, marker and label.
_KINDS = {
    "vdbench": (PALETTE[3], "D", "vdbench"),
    "dense": ("#707070", "s", "dense"),
    "compacted": (PALETTE[0], "^", "dense, without dead units"),
    "sparse": (PALETTE[2], "o", "sparse"),
}


def _kind(backend: str) -> str:
    if backend in ("vdbench", *DENSE_BACKENDS):
        return "vdbench" if backend == "vdbench" else "dense"
    return "compacted" if backend.endswith("_compacted") else "sparse"


def time_per_image(net: Timed) -> Figure:
    """Rows of panels are nets and numbers of threads, columns batches; in each, engines by time, fastest on top."""
    if not net.records:
        raise NoData(f"no net of {net.name} is timed yet")
    found = [(record, item) for record in net.records for item in speedups(record)]
    threads = sorted({item.timing.threads for _, item in found})
    batches = sorted({(item.timing.batch_size, item.timing.steps, item.timing.batch) for _, item in found})
    engines = len({item.timing.backend for _, item in found})
    rows = list(itertools.product(net.records, threads))
    figure = Figure(figsize=(1 + 4.1 * len(batches), (1 + 0.24 * engines) * len(rows) + 1))
    axes = figure.subplots(len(rows), len(batches), sharex="col", squeeze=False)
    for line, (record, count) in zip(axes, rows, strict=True):
        for axis, (*call, batch) in zip(line, batches, strict=True):
            _panel(axis, [i for r, i in found if r is record and i.timing.setting == (count, *call)])
            title = f"{outputs.method(record.method)}, {outputs.threads(count)}, batch {batch}"
            axis.set_title(title, fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel(f"Time {outputs.example(net.records[0].model)} (µs)")
        low, high = axis.get_xlim()
        axis.set_xlim(low / (high / low) ** 0.05, high * (high / low) ** 0.6)  # room for the labels of the slowest
        plain_log_axis(axis, "x", (1,) if np.ptp(np.log10(axis.get_xlim())) > 1.5 else (1, 2, 5))
    kinds = {_kind(item.timing.backend) for _, item in found}
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
        for kind, (colour, marker, label) in _KINDS.items()
        if kind in kinds
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    cpu = net.records[0].provenance.cpu
    figure.suptitle(f"{net.title} ({net.source}), {cpu}; × = times as fast as the fastest dense engine")
    return figure


def _panel(axis: Axes, found: list[Speedup]) -> None:
    ordered = sorted(found, key=lambda item: item.seconds)
    for place, item in enumerate(ordered):
        colour, marker, _ = _KINDS[_kind(item.timing.backend)]
        time = 1e6 * item.seconds_an_example
        axis.plot(time, place, marker, color=colour, ms=7)
        ratio = f", {_short(item.over_best.value)}×" if item.over_best else ""
        beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "fontsize": "x-small"}
        axis.annotate(f"{_short(time)} µs{ratio}", (time, place), **beside)
    names = [outputs.BACKENDS.get(item.timing.backend, item.timing.backend) for item in ordered]  # type: ignore[call-overload]
    axis.set_yticks(range(len(ordered)), names, fontsize="small")
    axis.set_ylim(len(ordered) - 0.4, -0.6)
    axis.set_xscale("log")
    axis.grid(visible=False, axis="y")


def _short(value: float) -> str:
    """Two significant digits below ten, three above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2g}"
