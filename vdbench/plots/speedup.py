"""Measured speedup of pruned nets over dense torch."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vdbench import outputs
from vdbench.plots.style import BACKEND_COLOURS, NoData, View, plain_log_axis
from vdbench.stats import REFERENCE_BACKEND, Speedup, speedups

_MARKERS = dict(zip(outputs.BACKENDS, "osD^", strict=True))


def speedup(view: View) -> Figure:
    """Rows are timed nets, columns numbers of threads; dots are medians, bars their 95 % intervals."""
    timed = [(record, speedups(record)) for record in view.of("time") if record.timing]
    if not timed:
        raise NoData(f"no net of {view.name} is timed yet")
    threads = sorted({item.timing.threads for _, found in timed for item in found})
    figure = Figure(figsize=(max(6.5, 4.2 * len(threads)), 3.6 * len(timed) + 1))
    axes = figure.subplots(len(timed), len(threads), sharey=True, squeeze=False)
    backends = [b for b in outputs.BACKENDS if any(i.timing.backend == b for _, found in timed for i in found)]
    for row, (record, found) in zip(axes, timed, strict=True):
        for axis, count in zip(row, threads, strict=True):
            _panel(axis, [item for item in found if item.timing.threads == count], backends)
            label = f"{count} thread" + ("s" if count > 1 else "")
            axis.set_title(f"{outputs.METHODS[record.method]}, {label}", fontsize="medium")
        row[0].set_ylabel("Speedup over dense torch (×)")
    for axis in axes[-1]:
        axis.set_xlabel("Batch size (images)")
    handles = [
        Line2D([], [], color=BACKEND_COLOURS[b], marker=_MARKERS[b], linestyle="", label=outputs.BACKENDS[b])
        for b in backends
        if b != REFERENCE_BACKEND
    ]
    handles.append(Line2D([], [], color=BACKEND_COLOURS[REFERENCE_BACKEND], label="torch, dense = 1"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    missing = {backend for record, _ in timed for backend in record.missing_backends}
    without = f"\nnot timed: {', '.join(outputs.BACKENDS.get(b, b) for b in sorted(missing))}" if missing else ""
    figure.suptitle(f"{view.title} ({view.source}), {timed[0][0].provenance.cpu}{without}")
    return figure


def _panel(axis: Axes, found: list[Speedup], backends: list[str]) -> None:
    batches = sorted({item.timing.batch_size for item in found})
    contenders = [backend for backend in backends if backend != REFERENCE_BACKEND]
    axis.axhline(1, color=BACKEND_COLOURS[REFERENCE_BACKEND], linewidth=1.5)
    for item in found:
        backend = item.timing.backend
        if backend == REFERENCE_BACKEND or item.ratio is None:
            continue
        offset = 0.27 * (contenders.index(backend) - (len(contenders) - 1) / 2)
        place = batches.index(item.timing.batch_size) + offset
        low, high = item.interval or (item.ratio, item.ratio)
        axis.vlines(place, low, high, color=BACKEND_COLOURS[backend], linewidth=2)
        axis.plot(place, item.ratio, _MARKERS[backend], color=BACKEND_COLOURS[backend], ms=7)
        digits = 2 if item.ratio < 1 else 1 if item.ratio < 10 else 0
        label = f"{item.ratio:.{digits}f}×"
        above = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        axis.annotate(label, (place, item.ratio), **above, fontsize="x-small")
    plain_log_axis(axis, "y")
    axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axis.set_xlim(-0.6, len(batches) - 0.4)
    axis.margins(y=0.15)
