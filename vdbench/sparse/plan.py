"""Which operation runs where: every way is timed here, changes of layout included, and the cheapest path taken."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from vdbench.sparse.graph import Flatten, Graph, Op
from vdbench.sparse.jit import vector_lanes
from vdbench.sparse.lowering import candidates
from vdbench.sparse.program import Bound, Program, Segment
from vdbench.sparse.stencil import Stencil, fuse, source

BATCH_VECTORS = 4  # a batch is planned for this many vectors of examples
LATE_PIXELS = 64  # maps up to this size may be computed for several vectors of examples together
SAMPLE_S = 0.004
CLEARLY = 3  # times slower: not worth a second look
CONVERSION_BYTES_S = (
    6e9  # a guess of how fast values change between PyTorch's layout and ours; the whole is timed anyway
)
CALL_S = 4e-6
PYTORCH = "torch"


@dataclass
class Item:
    """One operation (with what was fused into it): seconds of every way to run it for the planned examples, and the
    one taken. `late`: computed for several vectors of examples together."""

    name: str
    seconds: dict[str, float]
    native: bool = False
    chosen: str = PYTORCH
    late: bool = False


@dataclass
class Plan:
    """How batches, or single examples, run. `seconds` is the whole network's time for `examples` examples; `ways`
    those of the ways it was picked from."""

    examples: int
    items: list[Item]
    channels_last: bool = False
    seconds: float = float("inf")
    ways: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> "Plan":
        """Raises TypeError or KeyError for anything but what `to_json` gives."""
        items = [Item(**item) for item in content["items"]]  # type: ignore[union-attr, attr-defined]
        return cls(**{**content, "items": items})  # type: ignore[arg-type]


def fastest(run: Callable[[], object], limit: float = float("inf")) -> float:
    """Seconds of the fastest call, after a warm-up, over calls that take `SAMPLE_S` together, three at least; what
    takes longer than `limit` at first is not tried again."""
    best, spent, calls = float("inf"), 0.0, -1
    while calls < 3 or (spent < SAMPLE_S and calls < 200):
        started = time.perf_counter()
        run()
        taken = time.perf_counter() - started
        calls += 1
        if calls or taken > limit:
            best, spent = min(best, taken), spent + taken
        if taken > limit:
            break
    return best


def fused(graph: Graph, single: bool) -> list[Stencil | Op]:
    """The graph's operations as a plan counts them."""
    return fuse(graph, pooling=not single)


def operations(item: Stencil | Op) -> tuple[Op, ...]:
    return item.ops if isinstance(item, Stencil) else (item,)


def value_of(item: Stencil | Op) -> str:
    return item.output if isinstance(item, Stencil) else item.name


def inputs_of(item: Stencil | Op, graph: Graph) -> tuple[str, ...]:
    return tuple(dict.fromkeys(source(name, graph) for name in item.inputs))


class TorchRun:
    """Operations in PyTorch, from values to values, all of them batches."""

    def __init__(self, graph: Graph, ops: Sequence[Op], inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.ops, self.inputs, self.outputs = tuple(ops), tuple(inputs), tuple(outputs)
        views = [op for op in graph.ops if isinstance(op, Flatten)]
        self._views = {op.name: op for op in views}

    @torch.no_grad()
    def __call__(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        known = dict(zip(self.inputs, values, strict=True))

        def get(name: str) -> torch.Tensor:
            if name not in known:
                view = self._views[name]
                known[name] = view(get(view.inputs[0]))
            return known[name]

        for op in self.ops:
            known[op.name] = op(*map(get, op.inputs))
        return [get(name) for name in self.outputs]


def _torch_seconds(graph: Graph, item: Stencil | Op, examples: int, limit: float) -> float:
    """PyTorch's time for an item, on random values."""
    generator, names = torch.Generator().manual_seed(0), inputs_of(item, graph)
    values = [torch.rand(examples, *graph[name].shape, generator=generator) for name in names]
    run = TorchRun(graph, operations(item), names, [value_of(item)])
    return fastest(lambda: run(values), limit)


def _native_seconds(graph: Graph, stencil: Stencil, vectors: int) -> dict[str, float]:
    """Every candidate's time for one call: a single example, or `vectors` vectors of them."""
    names = (*stencil.inputs, stencil.output)
    segment = Segment((stencil,), (), (), {name: graph[name].shape for name in names})
    found = {}
    for candidate in candidates(stencil, vectors * vector_lanes() if vectors else 1):
        program = Program(segment, {stencil.output: candidate.label}, vectors=vectors)
        bound = Bound(program)
        found[candidate.label] = fastest(lambda bound=bound: bound((), 1))
    return found


def measure(graph: Graph, single: bool) -> Plan:
    """A plan with every way of every item timed and none taken yet."""
    items, examples = fused(graph, single), 1 if single else BATCH_VECTORS * vector_lanes()
    measured = []
    for item in items:
        ways: dict[str, float] = {}
        if isinstance(item, Stencil) and single:
            ways |= _native_seconds(graph, item, 0)
        elif isinstance(item, Stencil):
            ways |= {label: s * BATCH_VECTORS for label, s in _native_seconds(graph, item, 1).items()}
            if np.prod(item.computed()) <= LATE_PIXELS:
                late = _native_seconds(graph, item, BATCH_VECTORS)
                ways |= {f"{label} late": s for label, s in late.items()}
        limit = CLEARLY * min(ways.values(), default=np.inf)
        ways[PYTORCH] = _torch_seconds(graph, item, examples, limit)
        measured.append(Item(value_of(item), ways))
    return Plan(examples, measured)


def place(graph: Graph, plan: Plan) -> None:
    """Choose PyTorch or our kernels for every item: the cheapest path through the network, where at every point all
    values that are alive lie in one of the two layouts and changing over costs a conversion of each."""
    items = fused(graph, plan.examples == 1)
    costs = [
        (i.seconds[PYTORCH], min((s for k, s in i.seconds.items() if k != PYTORCH), default=np.inf)) for i in plan.items
    ]
    best: list[tuple[float, list[bool]]] = [(0.0, []), (_conversion(graph, {graph.input.name}, plan), [])]
    for k in range(len(items)):
        change = _conversion(graph, _alive(graph, items, k), plan)
        arrived = [min(best[way], (best[1 - way][0] + change, best[1 - way][1]), key=lambda p: p[0]) for way in (0, 1)]
        best = [(cost + costs[k][way], [*path, bool(way)]) for way, (cost, path) in enumerate(arrived)]
    ends = _conversion(graph, {source(graph.output.name, graph)}, plan)
    _, path = min(best[0], (best[1][0] + ends, best[1][1]), key=lambda p: p[0])
    for item, native in zip(plan.items, path, strict=True):
        item.native = native


def _alive(graph: Graph, items: Sequence[Stencil | Op], position: int) -> set[str]:
    """Values made before item `position` and read by it or later."""
    made = {graph.input.name, *(value_of(item) for item in items[:position])}
    read = {name for item in items[position:] for name in inputs_of(item, graph)}
    return made & (read | {source(graph.output.name, graph)})


def _conversion(graph: Graph, values: set[str], plan: Plan) -> float:
    count = sum(int(np.prod(graph[name].shape)) for name in values) * plan.examples
    return CALL_S + 2 * 4 * count / CONVERSION_BYTES_S


def segments(graph: Graph, plan: Plan) -> Iterator[tuple[bool, list[Item], Segment]]:
    """Runs of items with one layout: whether it is ours, the items, and the operations with what they start from and
    leave behind. In a run for PyTorch, `stencils` is empty and the items' operations are those of `fused`."""
    items = fused(graph, plan.examples == 1)
    start = 0
    while start < len(items):
        native, stop = plan.items[start].native, start
        while stop < len(items) and plan.items[stop].native == native:
            stop += 1
        run = items[start:stop]
        made = {value_of(item) for item in run}
        inputs = [n for n in dict.fromkeys(x for item in run for x in inputs_of(item, graph)) if n not in made]
        outputs = sorted(made & _alive(graph, items, stop))
        shapes = {name: graph[name].shape for name in [*inputs, *(value_of(item) for item in run)]}
        stencils = tuple(item for item in run if isinstance(item, Stencil)) if native else ()
        yield native, plan.items[start:stop], Segment(stencils, tuple(inputs), tuple(outputs), shapes)
        start = stop


def choose(items: Sequence[Item], segment: Segment) -> int:
    """Choose the fastest candidate of every item of a native run; from which one on several vectors of examples are
    computed together: where that makes the sum of times smallest."""

    def best(item: Item, late: bool) -> tuple[float, str]:
        ways = {k: s for k, s in item.seconds.items() if k != PYTORCH and k.endswith(" late") == late}
        return min(((s, k) for k, s in ways.items()), default=(np.inf, ""))

    def total(split: int) -> float:
        if split < len(items) and segment.crossing(split) is None:
            return np.inf
        return sum(best(item, late=k >= split)[0] for k, item in enumerate(items))

    split = min(range(len(items), -1, -1), key=total)
    for k, item in enumerate(items):
        item.late = k >= split
        item.chosen = best(item, item.late)[1].removesuffix(" late")
    return split
