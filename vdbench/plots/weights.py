"""What is left of a net: log alpha of its weights, first-layer kernels, inputs still used."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vdbench import outputs
from vdbench.config import VARIATIONAL_METHODS
from vdbench.plots.style import COLOURS, REMOVED, NoData, View, method_handles
from vdbench.records import Record

LIMIT = 8.0
_SIDE = 28
_KERNELS_IN_A_ROW = 5
_PANELS_IN_A_ROW = 5
_WHOLE = MaxNLocator(integer=True)


def log_alpha(view: View) -> Figure:
    """Share of each layer's weights by log alpha, mean over seeds, one panel a layer."""
    records = [record for record in view.of("prune", VARIATIONAL_METHODS) if record.log_alpha_histogram]
    if not records:
        raise NoData(f"no variational run of {view.name} is pruned yet")
    layers = [histogram.name for histogram in records[0].log_alpha_histogram]
    methods = list(dict.fromkeys(record.method for record in records))
    columns = min(len(layers), _PANELS_IN_A_ROW)
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(max(8.0, 3.1 * columns), 1.2 + 3.0 * rows))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    axes = grid.ravel()
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    for axis, layer in zip(axes, layers, strict=False):
        for method in methods:
            share = _share([record for record in records if record.method == method], layer)
            edges = np.linspace(-LIMIT, LIMIT, len(share) + 1)
            axis.stairs(share, edges, color=COLOURS[method], linewidth=1.5)
            axis.stairs(share, edges, color=COLOURS[method], alpha=0.15, fill=True)
        axis.axvline(view.experiment.threshold, color="black", linestyle="--", linewidth=1)
        axis.set(title=layer, xlabel="log α", xlim=(-LIMIT, LIMIT), xticks=range(-8, 9, 4), yscale="log")
    for axis in grid[:, 0]:
        axis.set_ylabel("Share of the layer's weights (%)")
    label = f"threshold {view.experiment.threshold:g}: removed above"
    handles = [*method_handles(methods), Line2D([], [], color="black", linestyle="--", linewidth=1, label=label)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"{view.title} ({view.source}): log α after training, clipped to ±{LIMIT:g}")
    return figure


def first_layer(view: View) -> Figure:
    """The first layer of one net of each method: kernels of a convolution, or how much each input pixel is used."""
    weights = {record.method: (record, weight) for record, weight in _first_weights(view)}
    if not any(method != "dense" for method in weights):
        raise NoData(f"no pruned net of {view.name} is beside its record")
    is_convolution = next(iter(weights.values()))[1].ndim == 4
    draw = _kernels if is_convolution else _inputs
    shown = [pair for method, pair in weights.items() if is_convolution or method != "dense"]
    return draw(view, shown)


def _first_weights(view: View) -> list[tuple[Record, np.ndarray]]:
    """The lowest finished seed of every method, and its first weight tensor."""
    from vdbench.netfile import read_arrays

    found: dict[str, tuple[Record, np.ndarray]] = {}
    for record in view.of("prune"):
        path = view.file(record, "pruned.npz")
        if path and record.method not in found and record.layers:
            found[record.method] = record, read_arrays(path)[0][f"{record.layers[0].name}.weight"]
    return list(found.values())


def _kernels(view: View, shown: Sequence[tuple[Record, np.ndarray]]) -> Figure:
    """A grid of kernels a method; what was removed is grey, so that it does not look like a small weight."""
    limit = max(float(np.abs(weight).max()) for _, weight in shown)
    figure = Figure(figsize=_size(shown))
    axes = figure.subplots(1, len(shown), squeeze=False).ravel()
    image = None
    for axis, (record, weight) in zip(axes, shown, strict=True):
        tiled = _tile(weight[:, 0])
        image = axis.imshow(np.ma.masked_equal(tiled, 0), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.imshow(np.where(tiled == 0, 1.0, np.nan), cmap=ListedColormap([REMOVED]), interpolation="nearest")
        used = int(np.count_nonzero(weight.any(axis=(1, 2, 3))))
        left = int(np.count_nonzero(weight))
        counts = f"{used} of {len(weight)} kernels,\n{left} of {weight.size} weights left"
        _bare(axis, f"{outputs.METHODS[record.method]}\n{counts}")
    assert image is not None
    figure.colorbar(image, ax=list(axes), label="Weight (grey: removed)", shrink=0.8, pad=0.02)
    figure.suptitle(f"{view.title} ({view.source})\nfirst-layer kernels, {_seeds(shown)}")
    return figure


def _tile(kernels: np.ndarray) -> np.ndarray:
    """Kernels side by side with a line of NaN between them."""
    count, height, width = kernels.shape
    rows = -(-count // _KERNELS_IN_A_ROW)
    tiled = np.full((rows * (height + 1) - 1, _KERNELS_IN_A_ROW * (width + 1) - 1), np.nan)
    for i, kernel in enumerate(kernels):
        top, left = (i // _KERNELS_IN_A_ROW) * (height + 1), (i % _KERNELS_IN_A_ROW) * (width + 1)
        tiled[top : top + height, left : left + width] = kernel
    return tiled


def _inputs(view: View, shown: Sequence[tuple[Record, np.ndarray]]) -> Figure:
    """How many weights each of the 28x28 input pixels has left."""
    counts = [np.count_nonzero(weight, axis=0).reshape(_SIDE, _SIDE) for _, weight in shown]
    figure = Figure(figsize=_size(shown))
    axes = figure.subplots(1, len(shown), squeeze=False).ravel()
    # a few pixels with many weights would leave all others dark: they share the last colour
    used = np.concatenate([count[count > 0] for count in counts])
    top = max(2.0, np.percentile(used, 99)) if used.size else 2.0
    beyond = "max" if max(count.max() for count in counts) > top else "neither"
    image = None
    for axis, (record, _), count in zip(axes, shown, counts, strict=True):
        image = axis.imshow(np.ma.masked_equal(count, 0), cmap="viridis", vmin=1, vmax=top)
        axis.set_facecolor(REMOVED)
        _bare(axis, f"{outputs.METHODS[record.method]}\n{np.count_nonzero(count)} of {count.size} inputs used")
    assert image is not None
    label = "Weights left a pixel (grey: none)"
    figure.colorbar(image, ax=list(axes), label=label, shrink=0.8, pad=0.02, ticks=_WHOLE, extend=beyond)
    figure.suptitle(f"{view.title} ({view.source})\ninputs used, {_seeds(shown)}")
    return figure


def _size(shown: Sequence[object]) -> tuple[float, float]:
    return 2.6 * len(shown) + 1.4, 3.7


def _bare(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize="medium")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)


def _seeds(shown: Sequence[tuple[Record, np.ndarray]]) -> str:
    seeds = sorted({record.seed for record, _ in shown})
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"


def _share(records: Sequence[Record], layer: str) -> np.ndarray:
    """Percent of the layer's weights in each bin, mean over runs."""
    counts = [np.array(h.counts, float) for record in records for h in record.log_alpha_histogram if h.name == layer]
    return np.mean([100 * count / count.sum() for count in counts], axis=0)
