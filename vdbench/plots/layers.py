"""Single layers over a grid of densities: where sparse pays, and how far it is from what the machine can do."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from vdbench import outputs
from vdbench.plots.style import PALETTE, NoData, Timed, plain_log_axis
from vdbench.records import Record
from vdbench.stats import Speedup, contestants, speedups

_BATCH_COLOURS = [PALETTE[i] for i in (0, 1, 2, 4, 3)]
_BATCH_MARKERS = "osD^v"
_COLUMNS = 4
_BYTES_A_FLOP = 2.0  # one float for two operations
_GREY = "#606060"
_CLOSE = 1.1  # ceilings within this factor share a label


def _density(record: Record) -> float:
    return 1 - record.size.sparsity if record.size else 1.0


def _settings(layer: Timed) -> tuple[int, list[int]]:
    """The fewest threads, and all batch sizes."""
    timings = [timing for record in layer.records for timing in record.timing]
    return min(t.threads for t in timings), sorted({t.batch_size for t in timings})


def _at(record: Record, threads: int, batch_size: int) -> list[Speedup]:
    return [i for i in speedups(record) if i.timing.setting == (threads, batch_size, 1)]


def speedup_by_sparsity(*layers: Timed) -> Figure:
    """A panel a layer shape, a colour a batch size: vdbench solid, the fastest engine that is not dense dashed."""
    timed = [layer for layer in layers if layer.records]
    if not timed:
        raise NoData("no single layer is timed yet")
    batches = sorted({batch for layer in timed for batch in _settings(layer)[1]})
    colours = dict(zip(batches, _BATCH_COLOURS, strict=False))
    figure = _grid(timed, lambda axis, layer: _speedup_panel(axis, layer, colours), 3.4)
    for axis in figure.axes:
        axis.set_xlabel("Sparsity (%)")
        axis.set_ylabel("Speedup over best dense (×)")
    handles = [Line2D([], [], color=colours[batch], lw=2, label=f"batch {batch}") for batch in batches]
    handles += [
        Line2D([], [], color="#404040", marker="o", ms=4, lw=2, label="vdbench"),
        Line2D([], [], color="#404040", linestyle="--", lw=1.2, label="best other sparse or compacted engine"),
        Line2D([], [], color="#404040", marker="|", ms=12, mew=2, linestyle="", label="vdbench breaks even"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // 2))
    _name_source(figure, timed)
    return figure


def _speedup_panel(axis: Axes, layer: Timed, colours: dict[int, str]) -> None:
    threads, batches = _settings(layer)
    records = sorted(layer.records, key=_density, reverse=True)
    densities = [_density(record) for record in records]
    axis.axhline(1, color="#404040", linewidth=1)
    for batch in batches:
        ours, others = [], []
        for record in records:
            found = contestants(_at(record, threads, batch))
            ours.append(_ratio(found[0]))
            others.append(_ratio(found[2]))
        axis.plot(densities, others, "--", color=colours[batch], lw=1.2)
        axis.plot(densities, ours, "-o", color=colours[batch], lw=2, ms=4)
        even = crossover(densities, ours)
        if even:
            axis.plot(even, 1, "|", color=colours[batch], ms=14, mew=2.5)
    plain_log_axis(axis, "y")
    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(densities, [f"{100 * (1 - density):.4g}" for density in densities], fontsize="x-small")
    axis.set_xlim(max(densities) * 1.2, min(densities) / 1.2)
    axis.set_title(layer.title, fontsize="medium")


def _ratio(item: Speedup | None) -> float:
    return item.over_best.value if item and item.over_best else np.nan


def crossover(densities: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The density below which the ratio is above 1 for good, log-log between the points about it; None without such."""
    for here in range(len(ratios) - 1, 0, -1):
        (d0, r0), (d1, r1) = ((densities[i], ratios[i]) for i in (here - 1, here))
        if r0 <= 1 < r1:
            share = -np.log(r0) / (np.log(r1) - np.log(r0))
            return float(np.exp(np.log(d0) + share * (np.log(d1) - np.log(d0))))
    return None


def roofline(*layers: Timed) -> Figure:
    """vdbench on every layer: GFLOP/s on nonzero weights against flops a byte that has to move at least once."""
    timed = [layer for layer in layers if any(r.limits and r.work for r in layer.records)]
    if not timed:
        raise NoData("no single layer is timed with the limits of the machine known")
    limits = timed[0].records[0].limits
    figure = Figure(figsize=(9.5, 6))
    axis = figure.subplots()
    batches = sorted({batch for layer in timed for batch in _settings(layer)[1]})
    intensities = []
    for layer, colour in zip(timed, PALETTE, strict=False):
        threads = _settings(layer)[0]
        for batch, marker in zip(batches, _BATCH_MARKERS, strict=False):
            for record in layer.records:
                ours = contestants(_at(record, threads, batch))[0]
                if ours and ours.gflops and record.work:
                    x = intensity(record, batch)
                    intensities.append(x)
                    axis.plot(x, ours.gflops / threads, marker, color=colour, ms=6, mec="white", mew=0.5)
    if not intensities:
        raise NoData("vdbench is not timed on any single layer")
    _ceilings(axis, limits, min(intensities), max(intensities))
    plain_log_axis(axis, "x")
    plain_log_axis(axis, "y")
    axis.set_xlabel("Arithmetic intensity (flop a byte of nonzero weights, inputs and outputs)")
    axis.set_ylabel("Work with nonzero weights, one core (GFLOP/s)")
    shapes = [
        Line2D([], [], color=colour, lw=4, label=layer.title) for layer, colour in zip(timed, PALETTE, strict=False)
    ]
    sizes = [
        Line2D([], [], color="#404040", marker=marker, linestyle="", label=f"batch {batch}")
        for batch, marker in zip(batches, _BATCH_MARKERS, strict=False)
    ]
    ceiling = Line2D([], [], color=_GREY, lw=1, label="GFLOP/s at most, by where\nan operand comes from")
    figure.legend(handles=[*shapes, *sizes, ceiling], loc="outside right center")
    _name_source(figure, timed)
    return figure


def intensity(record: Record, batch_size: int) -> float:
    """Flops a byte: each weight is read once with its place, eight bytes, each value read or written once, four."""
    if record.work is None:
        raise ValueError(f"{'/'.join(map(str, record.run))}: the record does not say what work there is")
    moved = 8 * record.work.weights + 4 * record.work.values * batch_size
    return 2 * record.work.multiply_adds * batch_size / moved


def _ceilings(axis: Axes, limits: dict[str, float], low: float, high: float) -> None:
    """Rates of multiply-adds by where an operand comes from, and what streaming all from L3 or from memory allows."""
    left, right = low / 1.5, high * 1.5
    axis.set_xlim(left, right)
    named: list[tuple[float, list[str]]] = []  # rates with their labels; one label for those that are close
    for rate, place in sorted(((limits[key], place) for key, place in outputs.OPERANDS.items() if key in limits)):
        axis.axhline(rate, color=_GREY, lw=1, zorder=0)
        if not named or rate > _CLOSE * named[-1][0]:
            named.append((rate, []))
        named[-1][1].insert(0, f"{place}: {rate:.0f}")
    for rate, labels in named:
        beside = {"xytext": (4, 0), "textcoords": "offset points", "fontsize": "x-small", "va": "center"}
        axis.annotate("\n".join(labels), (1, rate), xycoords=axis.get_yaxis_transform(), **beside)
    for key, place, side in (("load_l3", "L3", "right"), ("load_memory", "memory", "left")):
        slope = _BYTES_A_FLOP * limits.get(key, 0)
        end = min(right, max(limits.values()) / slope) if slope else left
        if end > left:
            axis.plot([left, end], [slope * left, slope * end], color=_GREY, lw=1, linestyle=":", zorder=0)
            above = {"xytext": (0, 3), "textcoords": "offset points", "fontsize": "x-small", "ha": side}
            axis.annotate(f"all from {place}: {slope:.0f} GB/s", (end, slope * end), **above)


def _grid(layers: Sequence[Timed], draw: Callable[[Axes, Timed], None], height: float) -> Figure:
    columns = min(_COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(max(7.0, 4.2 * columns), height * rows + 1.2))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, layer in zip(axes, layers, strict=False):
        draw(axis, layer)
    for axis in axes[len(layers) :]:
        axis.remove()
    return figure


def _name_source(figure: Figure, layers: Sequence[Timed]) -> None:
    sources = ", ".join(dict.fromkeys(layer.source for layer in layers))
    threads = outputs.threads(_settings(layers[0])[0])
    cpu = layers[0].records[0].provenance.cpu
    figure.suptitle(f"Single layers with random masks ({sources}), {cpu}, {threads}")
