"""Perplexity and compression epoch by epoch, drawn over what others logged of the same net."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vdbench import published
from vdbench.plots.style import COLOURS, NoData, View, method_handles, plain_log_axis
from vdbench.plots.training import draw_curves, histories_of

_PUBLISHED: dict[str, Any] = {"Original": "--", published.SPARSE_VD: "-"}


def published_curves(view: View) -> Figure:
    """Ours in colours, thin lines seeds and thick ones means; published ones in black, of the same text as ours."""
    histories = histories_of(view)
    if not histories:
        raise NoData(f"no history of {view.name} is beside its records")
    figure = Figure(figsize=(11.5, 4.6))
    perplexity, compression = figure.subplots(1, 2)
    measured = "validation_perplexity" if view.experiment.validation_size else "test_perplexity"
    for method, rows in published.curves(view.experiment).items():
        epochs, line = [row.epoch for row in rows], _PUBLISHED[method]
        perplexity.plot(epochs, [getattr(row, measured) for row in rows], line, color="black", linewidth=1)
        if any(row.compression > 1 for row in rows):
            compression.plot(epochs, [row.compression for row in rows], line, color="black", linewidth=1)
    for method, own in histories.items():
        draw_curves(perplexity, own, "perplexity", COLOURS[method])
        if method != "dense":
            draw_curves(compression, own, "compression_ratio", COLOURS[method])
    shown = [h["perplexity"].min() for own in histories.values() for h in own]
    plain_log_axis(perplexity, "y")
    perplexity.set(xlabel="Epoch", ylabel=view.error_label, ylim=(0.85 * min(100.0, *shown), 700))
    compression.set(xlabel="Epoch", ylabel="Compression (×)", ylim=(0, None))
    for axis in (perplexity, compression):
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    named = [Line2D([], [], color="black", linestyle=line, label=f"{m}, published") for m, line in _PUBLISHED.items()]
    figure.legend(handles=[*named, *method_handles(list(histories))], loc="outside lower center", ncols=4)
    figure.suptitle(f"{view.title} ({view.source})")
    return figure
