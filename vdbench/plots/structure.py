"""What is left of a deep net: weights layer by layer, and whole neurons, or a language model's words, units, gates."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vdbench import outputs
from vdbench.plots.style import COLOURS, NoData, View, method_handles, plain_log_axis
from vdbench.records import Layer, Record


def layers_left(view: View) -> Figure:
    """Weights left layer by layer; below, what a language model is left with, or each layer's neurons over those left,
    where there are nets to count them in: means over seeds, ends of the bars their range.

    A neuron, of a convolution a filter, counts as removed when all its incoming weights are.
    """
    methods = list(dict.fromkeys(record.method for record in view.of("prune") if record.method != "dense"))
    if not methods:
        raise NoData(f"no net of {view.name} is pruned yet")
    records = {method: view.of("prune", [method]) for method in methods}
    names = [layer.name for layer in records[methods[0]][0].layers]
    figure = Figure(figsize=(max(8.0, 0.75 * len(names)), 7.2))
    language = outputs.measure(view.experiment) == "perplexity"
    neurons = {} if language else {m: [n for r in own if (n := _neurons(view, r))] for m, own in records.items()}
    rows = 2 if language or any(neurons.values()) else 1
    upper, *lower = figure.subplots(rows, 1, sharex=not language, squeeze=False).ravel()
    weights = {m: [[100 * (1 - layer.sparsity) for layer in r.layers] for r in own] for m, own in records.items()}
    _bars(upper, names, weights)
    plain_log_axis(upper, "y")
    upper.set_ylabel("Weights left (%)")
    for axis in lower:
        if language:
            _draw_kept(axis, records)
        else:
            _draw_neurons(axis, names, neurons, records)
    figure.suptitle(f"{view.title} ({view.source}): what is left of each layer")
    figure.legend(handles=method_handles(methods, linewidth=6), loc="outside lower center", ncols=len(methods))
    return figure


def _bars(axis: Axes, names: Sequence[str], values: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Bars side by side for every method; values (runs, names)."""
    places, width = np.arange(len(names)), 0.8 / len(values)
    for number, (method, runs) in enumerate(values.items()):
        if not runs:
            continue
        found = np.array(runs)
        mean = found.mean(axis=0)
        spread = [mean - found.min(axis=0), found.max(axis=0) - mean] if len(found) > 1 else None
        shift = places + width * (number - (len(values) - 1) / 2)
        look = {"color": COLOURS[method], "alpha": 0.85, "error_kw": {"linewidth": 0.8}}
        axis.bar(shift, mean, width, yerr=spread, **look)
    axis.set_xticks(places, names, rotation=45, ha="right")


def _draw_kept(axis: Axes, records: Mapping[str, Sequence[Record]]) -> None:
    totals = _totals(next(iter(records.values()))[0].layers)
    kept = {m: [[100 * r.kept[part] / totals[part] for part in totals] for r in own] for m, own in records.items()}
    _bars(axis, [part.replace("_", " ") for part in totals], kept)
    axis.set(ylabel="Left (%)", ylim=(0, 103))


def _totals(layers: Sequence[Layer]) -> dict[str, int]:
    """What `Record.kept` counts, before anything was removed."""
    shapes = {layer.name: layer.shape for layer in layers}
    embedding = shapes.get("embedding")
    found = {
        "words_read": embedding[0] if embedding else shapes["rnn.weight_ih_l0"][1],
        "words_predicted": shapes["output"][0],
        **({"dimensions": embedding[1]} if embedding else {}),
    }
    for name, shape in shapes.items():
        kind, _, number = name.rpartition("_l")
        if kind == "rnn.weight_hh":
            found |= {f"units_l{number}": shape[1], f"gates_l{number}": shape[0]}
    return found


def _draw_neurons(
    axis: Axes,
    names: Sequence[str],
    neurons: Mapping[str, Sequence[Sequence[float]]],
    records: Mapping[str, Sequence[Record]],
) -> None:
    """Where not every record has its net beside it, the panel says how many do."""
    _bars(axis, names, neurons)
    plain_log_axis(axis, "y")
    axis.set_ylabel("Neurons / neurons left")
    fewer = [
        f"{outputs.METHODS[method]} {len(found)} of {len(records[method])}"
        for method, found in neurons.items()
        if len(found) < len(records[method])
    ]
    if fewer:
        axis.set_title(f"counted in the pruned nets that are here: {', '.join(fewer)}", fontsize="small")


def _neurons(view: View, record: Record) -> list[float]:
    """Neurons of each layer over those left; none where the pruned net is not beside its record."""
    from vdbench.netfile import parameter_name, read_arrays

    path = view.file(record, "pruned.npz")
    if path is None:
        return []
    arrays = read_arrays(path)[0]
    weights = [arrays[parameter_name(layer.name)] for layer in record.layers]
    left = [np.count_nonzero(weight.reshape(len(weight), -1).any(axis=1)) for weight in weights]
    return [len(weight) / max(count, 1) for weight, count in zip(weights, left, strict=True)]
