"""What a compiled net is made of, for people to read."""

from collections.abc import Iterator

import numpy as np
from tabulate import tabulate

from vdbench.sparse.graph import Conv2d, Graph, Linear, Op
from vdbench.sparse.machine import rate
from vdbench.sparse.plan import PYTORCH, Item, Network, Plan, operations
from vdbench.sparse.stencil import Stencil


def describe(graph: Graph, plans: dict[str, list[Plan]]) -> str:
    """Per layer: shape, density, what was removed, how it runs, how long every way takes and how near that is to the
    processor's limit, the rate of multiply-adds from registers."""
    parts = []
    for key, title in (("single", "one example"), ("batch", "batches")):
        plan = plans[key][0]
        rows = list(_rows(graph, plan))
        headers = ["layer", "output", "nonzero", "density", "runs as", "µs", "of limit", "every way, µs"]
        whole = f"planned for {plan.examples} on one thread: {_times(plan.ways, plan)}"
        parts.append(
            f"{title}: {_us(plan.seconds, plan)} µs an example ({whole})\n"
            + tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, maxcolwidths=[None] * 7 + [60])
        )
    if graph.removed:
        parts.append("removed:\n" + "\n".join(f"  {name}: {text}" for name, text in graph.removed.items()))
    return "\n\n".join(parts)


def _rows(graph: Graph, plan: Plan) -> Iterator[list[str]]:
    peak = rate("fma") * 1e9
    for item, made in zip(Network(graph, single=plan.examples == 1).items, plan.items, strict=True):
        seconds, way = chosen(made)
        flops = 2 * item.multiply_adds * plan.examples if isinstance(item, Stencil) else 0
        first = operations(item)[0]
        nonzero = first.weight_count
        total = first.weight.size if isinstance(first, Linear | Conv2d) else 0
        yield [
            "+".join(_kind(op) for op in operations(item)) + f" {first.name}",
            "×".join(map(str, operations(item)[-1].shape)),
            f"{nonzero:,}" if total else "",
            f"{100 * nonzero / total:.3g} %" if total else "",
            way,
            _us(seconds, plan),
            f"{100 * flops / peak / seconds:.0f} %" if flops else "",
            _times(made.seconds, plan),
        ]


def chosen(item: Item) -> tuple[float, str]:
    """The seconds of the way an item runs, and its name."""
    if not item.native:
        return item.seconds.get(PYTORCH, float(np.nan)), PYTORCH
    way = f"{item.chosen} late" if item.late else item.chosen
    return item.seconds.get(way, float(np.nan)), way


def _times(ways: dict[str, float], plan: Plan) -> str:
    """Fastest first; equals by name, so that a net says the same of itself before and after it was stored."""
    return ", ".join(f"{way} {_us(seconds, plan)}" for seconds, way in sorted((s, way) for way, s in ways.items()))


def _us(seconds: float, plan: Plan) -> str:
    return f"{1e6 * seconds / plan.examples:.3g}"


def _kind(op: Op) -> str:
    return type(op).__name__.lower()
