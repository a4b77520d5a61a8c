"""Training curves, from the history beside every train record."""

from collections.abc import Sequence

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vdbench import outputs
from vdbench.config import VARIATIONAL_METHODS
from vdbench.history import read as read_history
from vdbench.plots.style import COLOURS, PALETTE, NoData, View, method_handles, plain_log_axis

_LAYER = "sparsity:"
_LAYER_COLOURS = [PALETTE[i] for i in (0, 1, 2, 4)]
_IN_A_LINE = 5  # of the legend


def training_curves(view: View) -> Figure:
    """Error and KL of every method, then per-layer sparsity method by method; thin lines seeds, thick ones means."""
    histories = histories_of(view)
    if not histories:
        raise NoData(f"no history of {view.name} is beside its records")
    methods = list(histories)
    sparse = [method for method in methods if method != "dense"]
    variational = [method for method in methods if method in VARIATIONAL_METHODS]
    figure = Figure(figsize=(max(8.0, 3.3 * len(sparse)), 8 if sparse else 4.2))
    upper, *lower = figure.subfigures(2 if sparse else 1, 1, squeeze=False).ravel()
    panels = upper.subplots(1, 2 if variational else 1, squeeze=False).ravel()
    for method in methods:
        draw_curves(panels[0], histories[method], outputs.measure(view.experiment), COLOURS[method])
    for method in variational:
        draw_curves(panels[1], histories[method], "kl", COLOURS[method])
    plain_log_axis(panels[0], "y")
    panels[0].set(xlabel="Epoch", ylabel=view.error_label)
    if variational:
        panels[1].set_yscale("log")
        panels[1].set(xlabel="Epoch", ylabel="KL divergence (nats)")
    upper.legend(handles=method_handles(methods), loc="outside lower center", ncols=min(5, len(methods)))
    figure.suptitle(f"{view.title} ({view.source}): thin lines are seeds, thick lines their means")
    for axis in panels:
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if sparse:
        _sparsities(lower[0].subplots(1, len(sparse), sharey=True, squeeze=False).ravel(), histories, sparse)
        layers = _layers(histories[sparse[0]][0])
        handles = [Line2D([], [], color=colour, label=layer) for layer, colour in _coloured(layers)]
        lower[0].legend(handles=handles, loc="outside lower center", ncols=min(_IN_A_LINE, len(handles)))
    return figure


def _sparsities(axes: Sequence[Axes], histories: dict[str, list[pd.DataFrame]], methods: Sequence[str]) -> None:
    for axis, method in zip(axes, methods, strict=True):
        for layer, colour in _coloured(_layers(histories[method][0])):
            percent = [h.assign(**{layer: 100 * h[_LAYER + layer]}) for h in histories[method]]
            draw_curves(axis, percent, layer, colour)
        axis.set(xlabel="Epoch", title=outputs.METHODS[method], ylim=(-3, 103))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[0].set_ylabel("Sparsity (%)")


def draw_curves(axis: Axes, histories: Sequence[pd.DataFrame], column: str, colour: str) -> None:
    series = [history.set_index("epoch")[column] for history in histories]
    for one in series:
        axis.plot(one.index, one, color=colour, linewidth=0.7, alpha=0.4)
    mean = pd.concat(series, axis=1).dropna().mean(axis=1)  # of the epochs that every seed has
    axis.plot(mean.index, mean, color=colour, linewidth=2)


def _coloured(layers: Sequence[str]) -> list[tuple[str, str]]:
    """Layers with their colours: of a deep net, from dark to light."""
    if len(layers) <= len(_LAYER_COLOURS):
        return list(zip(layers, _LAYER_COLOURS, strict=False))
    return [(layer, to_hex(colormaps["viridis"](place / len(layers)))) for place, layer in enumerate(layers)]


def _layers(history: pd.DataFrame) -> list[str]:
    return [name.removeprefix(_LAYER) for name in history.columns if name.startswith(_LAYER)]


def histories_of(view: View) -> dict[str, list[pd.DataFrame]]:
    found: dict[str, list[pd.DataFrame]] = {}
    for record in view.of("train"):
        path = view.file(record, record.history) if record.history else None
        if path:
            found.setdefault(record.method, []).append(read_history(path))
    return found
