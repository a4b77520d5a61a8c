"""What a compiled net is made of, for people to read."""

import textwrap
from collections.abc import Iterator

import numpy as np
from tabulate import tabulate

from vdbench.sparse.graph import (
    Add,
    Affine,
    Clip,
    Concat,
    Graph,
    LinearAtPlaces,
    Multiply,
    Op,
    Pointwise,
    Weighted,
    batch_shape,
)
from vdbench.sparse.machine import rate
from vdbench.sparse.opaque import ChannelsFirst, ChannelsLast, TorchOp
from vdbench.sparse.plan import LATE, PYTORCH, Item, Network, Plan, operations
from vdbench.sparse.stencil import Stencil

COLUMNS = 120  # of closing lines; tables are about as wide
WAYS_COLUMNS = 40
LABELS = {  # of ways, by a word that is in them
    "tile": "tile RxL: R registers of L numbers of the output at a time",
    "blocked": "blocked: inputs in blocks that fit into the first-level cache",
    "late": "late: several vectors of examples together",
    "unrolled": "unrolled: as a linear layer",
    "slices": "slices: a vector of output units at a time, inputs loaded one by one",
    "windows": "windows: such a vector, inputs picked out of registers",
    "native": "native: these kernels wherever there are any",
    "mixed": "mixed: PyTorch where it is faster",
}


def describe(graph: Graph, plans: dict[str, list[Plan]]) -> str:
    """Per layer: shape, weights left, what was removed, how it runs, how long every way takes and how near that is to
    the processor's limit, the rate of multiply-adds from registers."""
    shapes = f"{batch_shape(graph.input.example)} to {batch_shape(graph.output.shape)}"
    limits = f"{rate('fma'):.0f} GFLOP/s from registers, {rate('load_l1'):.0f} from the first-level cache"
    parts = [f"{shapes}; limit of a thread: {limits}"]
    for key, title in (("single", "one example"), ("batch", "batches")):
        plan = plans[key][0]
        headers = ["layer", "output", "weights left", "runs as", "µs", "of limit", "every way, µs"]
        whole = f"planned for {plan.examples} on one thread: {_times(plan.ways, plan)}"
        parts.append(
            f"{title}: {_us(plan.seconds, plan)} µs an example ({whole})\n"
            + tabulate(
                list(_rows(graph, plan)),
                headers=headers,
                tablefmt="simple",
                disable_numparse=True,
                maxcolwidths=[None] * 6 + [WAYS_COLUMNS],
            )
        )
    if graph.removed:
        parts.append("removed:\n" + "\n".join(f"  {name}: {text}" for name, text in graph.removed.items()))
    if labels := _labels(plans):
        parts.append(textwrap.fill("; ".join(labels), COLUMNS))
    return "\n\n".join(parts)


def _rows(graph: Graph, plan: Plan) -> Iterator[list[str]]:
    peak = rate("fma") * 1e9
    for item, made in zip(Network(graph, single=plan.examples == 1).items, plan.items, strict=True):
        seconds, way = chosen(made)
        flops = 2 * item.multiply_adds * plan.examples if isinstance(item, Stencil) else 0
        first = operations(item)[0]
        yield [
            "+".join(_called(op) for op in operations(item)) + f" {first.name}",
            "×".join(map(str, operations(item)[-1].shape)),
            _left(first, graph) if isinstance(first, Weighted) else "",
            way,
            _us(seconds, plan),
            f"{100 * flops / peak / seconds:.0f} %" if flops else "",
            _times(made.seconds, plan),
        ]


def chosen(item: Item) -> tuple[float, str]:
    """The seconds of the way an item runs, and its name."""
    if not item.native:
        return item.seconds.get(PYTORCH, float(np.nan)), PYTORCH
    way = item.chosen + LATE if item.late else item.chosen
    return item.seconds.get(way, float(np.nan)), way


def _left(layer: Weighted, graph: Graph) -> str:
    """How many weights are left, and of how many there were, where that is known."""
    total = graph.weights.get(layer.name)
    return f"{layer.weight_count:,}" + (f" of {total:,} ({100 * layer.weight_count / total:.3g} %)" if total else "")


def _labels(plans: dict[str, list[Plan]]) -> list[str]:
    """What the words mean that these plans have."""
    shown = [ways for plan, *_ in plans.values() for ways in (plan.ways, *(item.seconds for item in plan.items))]
    words = {word for ways in shown for way in ways for word in way.split()}
    return [text for word, text in LABELS.items() if word in words]


def _times(ways: dict[str, float], plan: Plan) -> str:
    """Fastest first; equals by name, so that a net says the same of itself before and after it was stored."""
    return ", ".join(f"{way} {_us(seconds, plan)}" for seconds, way in sorted((s, way) for way, s in ways.items()))


def _us(seconds: float, plan: Plan) -> str:
    return f"{1e6 * seconds / plan.examples:.3g}"


def _called(op: Op) -> str:
    """As PyTorch calls it."""
    match op:
        case Clip():
            return {(0, np.inf): "ReLU", (0, 6): "ReLU6"}.get((op.low, op.high), "clamp")
        case Affine():
            return "BatchNorm2d" if len(op.shape) == 3 else "BatchNorm1d"
        case Add():
            return "add"
        case Multiply():
            return "mul"
        case Concat():
            return "cat"
        case LinearAtPlaces():
            return "Linear"
        case ChannelsFirst() | ChannelsLast():
            return "permute"
        case Pointwise():
            return op.function
        case TorchOp():
            return op.called
        case _:
            return type(op).__name__
