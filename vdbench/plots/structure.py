"""What is left of every layer of a deep net: weights, and whole neurons."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vdbench.plots.style import COLOURS, NoData, View, method_handles, plain_log_axis
from vdbench.records import Record


def layers_left(view: View) -> Figure:
    """Sparsity and neuron-wise compression layer by layer: means over seeds, ends of the bars their range.

    A neuron, of a convolution a filter, counts as removed when all its incoming weights are.
    """
    methods = list(dict.fromkeys(record.method for record in view.of("prune") if record.method != "dense"))
    if not methods:
        raise NoData(f"no net of {view.name} is pruned yet")
    names = [layer.name for layer in view.of("prune", methods)[0].layers]
    figure = Figure(figsize=(max(8.0, 0.75 * len(names)), 7.2))
    upper, lower = figure.subplots(2, 1, sharex=True)
    places, width = np.arange(len(names)), 0.8 / len(methods)
    for number, method in enumerate(methods):
        records = view.of("prune", [method])
        shift = places + width * (number - (len(methods) - 1) / 2)
        left = np.array([[100 * (1 - layer.sparsity) for layer in record.layers] for record in records])
        _bars(upper, shift, left, width, COLOURS[method])
        neurons = np.array([found for record in records if (found := _neuron_compression(view, record)) is not None])
        if len(neurons):
            _bars(lower, shift, neurons, width, COLOURS[method])
    for axis in (upper, lower):
        plain_log_axis(axis, "y")
    upper.set_ylabel("Weights left (%)")
    lower.set_ylabel("Neurons / neurons left")
    lower.set_xticks(places, names, rotation=45, ha="right")
    figure.suptitle(f"{view.title} ({view.source}): what is left of each layer")
    figure.legend(handles=method_handles(methods, linewidth=6), loc="outside lower center", ncols=len(methods))
    return figure


def _bars(axis, places: np.ndarray, values: np.ndarray, width: float, colour: str) -> None:
    mean = values.mean(axis=0)
    spread = [mean - values.min(axis=0), values.max(axis=0) - mean] if len(values) > 1 else None
    axis.bar(places, mean, width, yerr=spread, color=colour, alpha=0.85, error_kw={"linewidth": 0.8})


def _neuron_compression(view: View, record: Record) -> Sequence[float] | None:
    """Neurons of each layer over those left; None where the pruned net is not beside its record."""
    from vdbench.netfile import parameter_name, read_arrays

    path = view.file(record, "pruned.npz")
    if path is None:
        return None
    arrays = read_arrays(path)[0]
    weights = [arrays[parameter_name(layer.name)] for layer in record.layers]
    left = [np.count_nonzero(weight.reshape(len(weight), -1).any(axis=1)) for weight in weights]
    return [len(weight) / max(count, 1) for weight, count in zip(weights, left, strict=True)]
