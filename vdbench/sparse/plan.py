"""Which operation runs where: every way is timed here, changes of layout included, and the cheapest path taken."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import torch

from vdbench.sparse.graph import Conv2d, Flatten, Graph, InputOfPlaces, Linear, Op
from vdbench.sparse.jit import vector_lanes
from vdbench.sparse.layout import maps
from vdbench.sparse.lowering import candidates
from vdbench.sparse.machine import rate
from vdbench.sparse.opaque import ChannelsLast
from vdbench.sparse.program import Bound, Program, Segment, TooLarge
from vdbench.sparse.stencil import Stencil, fuse, is_view, source
from vdbench.sparse.torch_run import TorchRun

PYTORCH, LATE = "torch", " late"  # what ways are called, or end with
BATCH_VECTORS = 4  # a batch is planned for this many vectors of examples
LATE_PIXELS = 64  # maps up to this size may be computed for several vectors of examples together
SAMPLE_S = 0.004
CLEARLY = 3  # times slower: not worth a second look
FEWER_PRODUCTS = 4  # what dense convolutions may save of their multiply-adds by transforming their input (Winograd)
CONVERSION_BYTES_S = 6e9  # a guess of how fast values change between PyTorch's layout and ours; the whole is timed
CALL_S = 4e-6


class Network:
    """A graph as a plan counts its operations: fused for single examples, or for batches.

    Attributes:
        items: stencils, and the operations that are none, in order. examples: how many a plan is made for.
        channels_last: values whose arrays, outside, have their channels behind.
    """

    def __init__(self, graph: Graph, *, single: bool) -> None:
        self.graph, self.single = graph, single
        self.items = fuse(graph, pooling=not single)
        self.examples = 1 if single else BATCH_VECTORS * vector_lanes()
        self.input, self.output = graph.input.name, source(graph.output.name, graph)
        self.shapes = {op.name: op.shape for op in graph.ops}
        given = {self.input} if isinstance(graph.input, InputOfPlaces) else set()
        made = {self.output} if is_view(graph.output, graph) and isinstance(graph.output, ChannelsLast) else set()
        self.channels_last = frozenset(given | made)
        self.views = {op.name: op for op in graph.ops if isinstance(op, Flatten)}

    def inputs(self, item: Stencil | Op) -> tuple[str, ...]:
        """The values an item starts from, each once."""
        return tuple(dict.fromkeys(source(name, self.graph) for name in item.inputs))

    def alive(self, position: int) -> set[str]:
        """Values made before item `position` and read by it or later."""
        made = {self.input, *(item.name for item in self.items[:position])}
        return made & {self.output, *(name for item in self.items[position:] for name in self.inputs(item))}

    def dense_limit_s(self, item: Stencil | Op) -> float:
        """Seconds below which no dense engine computes an item for the planned examples, on one thread."""
        return sum(self._dense_products(op) for op in operations(item)) * self.examples * 2 / (rate("fma") * 1e9)

    @staticmethod
    def _dense_products(op: Op) -> float:
        if isinstance(op, Conv2d):
            height, width = maps(op.shape)
            return op.weight.size * height * width / FEWER_PRODUCTS
        return op.weight.size if isinstance(op, Linear) else 0


def operations(item: Stencil | Op) -> tuple[Op, ...]:
    return item.ops if isinstance(item, Stencil) else (item,)


@dataclass
class Item:
    """One operation, with what was fused into it: seconds of every way to run it for the planned examples, and the way
    taken. `late`: computed for several vectors of examples together. A dense engine that could not win even at the
    processor's peak is not timed."""

    name: str
    seconds: dict[str, float]
    native: bool = False
    chosen: str = PYTORCH
    late: bool = False

    def best(self, *, native: bool) -> float:
        """Seconds of the fastest of our kernels, or of PyTorch; infinite where there is none."""
        return min((s for way, s in self.seconds.items() if (way != PYTORCH) == native), default=np.inf)

    def kernel(self, *, late: bool) -> tuple[float, str]:
        """Seconds and label of the fastest of our kernels, for several vectors of examples together if `late`."""
        ways = {way: s for way, s in self.seconds.items() if way != PYTORCH and way.endswith(LATE) == late}
        return min(((s, way.removesuffix(LATE)) for way, s in ways.items()), default=(np.inf, ""))


@dataclass
class Plan:
    """How batches, or single examples, run. `seconds` is the whole network's time for `examples` examples, `more_s`
    what every further one takes in the same call; `ways` those of the ways it was picked from."""

    examples: int
    items: list[Item]
    channels_last: bool = False
    seconds: float = float("inf")
    more_s: float = float("inf")
    ways: dict[str, float] = field(default_factory=dict)

    def time(self, count: int) -> float:
        """Seconds for so many examples."""
        return self.seconds + (count - self.examples) * self.more_s

    def same_ways(self, other: Self) -> bool:
        """Whether everything runs in the same place and memory format as in a plan made from the same measurements."""
        mine, others = ([item.native for item in plan.items] for plan in (self, other))
        return mine == others and (all(mine) or self.channels_last == other.channels_last)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Raises TypeError or KeyError for anything but what `to_json` gives."""
        return cls(**{**content, "items": [Item(**item) for item in content["items"]]})


def fastest(run: Callable[[], object], limit: float = float("inf")) -> float:
    """Seconds of the fastest call, after a warm-up, over calls that take `SAMPLE_S` together, three at least; what
    takes longer than `limit` twice is not tried again."""
    run()  # may be many times slower than the next call
    best, spent, calls = float("inf"), 0.0, 0
    while calls < 2 or (best <= limit and calls < 200 and (calls < 3 or spent < SAMPLE_S)):
        started = time.perf_counter()
        run()
        taken = time.perf_counter() - started
        best, spent, calls = min(best, taken), spent + taken, calls + 1
    return best


def measure(network: Network) -> Plan:
    """A plan with every way of every item timed and none taken yet."""
    measured = []
    for item in network.items:
        ways: dict[str, float] = {}
        if isinstance(item, Stencil) and network.single:
            ways |= _native_seconds(network, item, 0)
        elif isinstance(item, Stencil):
            ways |= {way: s * BATCH_VECTORS for way, s in _native_seconds(network, item, 1).items()}
            if np.prod(item.computed()) <= LATE_PIXELS:
                ways |= {way + LATE: s for way, s in _native_seconds(network, item, BATCH_VECTORS).items()}
        native_s = min(ways.values(), default=np.inf)
        if native_s > network.dense_limit_s(item):
            ways[PYTORCH] = _torch_seconds(network, item, CLEARLY * native_s)
        measured.append(Item(item.name, ways))
    return Plan(network.examples, measured)


def _native_seconds(network: Network, stencil: Stencil, vectors: int) -> dict[str, float]:
    """Every candidate's time for one call: a single example, or `vectors` vectors of them."""
    shapes = {name: network.shapes[name] for name in (*stencil.inputs, stencil.name)}
    segment, found = Segment((stencil,), (), (), shapes), {}
    for candidate in candidates(stencil, vectors * vector_lanes() if vectors else 1):
        with contextlib.suppress(TooLarge):
            bound = Bound(Program(segment, {stencil.name: candidate.label}, vectors=vectors))
            found[candidate.label] = fastest(lambda bound=bound: bound((), 1))
    return found


def _torch_seconds(network: Network, item: Stencil | Op, limit: float) -> float:
    """PyTorch's time for an item, on random values."""
    generator, names = torch.Generator().manual_seed(0), network.inputs(item)
    values = [torch.rand(network.examples, *network.shapes[name], generator=generator).numpy() for name in names]
    run = TorchRun(operations(item), network.views, names, [item.name])
    return fastest(lambda: run(values), limit)


def place(network: Network, plan: Plan) -> None:
    """Choose PyTorch or our kernels for every item: the cheapest path through the network, where at every point all
    values that are alive lie in one of the two layouts and changing over costs a conversion of each."""

    def conversion_s(values: set[str]) -> float:
        numbers = sum(int(np.prod(network.shapes[name])) for name in values) * network.examples
        return CALL_S + 2 * 4 * numbers / CONVERSION_BYTES_S

    best: list[tuple[float, list[bool]]] = [(0.0, []), (conversion_s({network.input}), [])]
    for k, item in enumerate(plan.items):
        change = conversion_s(network.alive(k))
        arrived = [min(best[way], (best[1 - way][0] + change, best[1 - way][1]), key=lambda p: p[0]) for way in (0, 1)]
        best = [(cost + item.best(native=bool(way)), [*path, bool(way)]) for way, (cost, path) in enumerate(arrived)]
    best[1] = (best[1][0] + conversion_s({network.output}), best[1][1])
    for item, native in zip(plan.items, min(best, key=lambda p: p[0])[1], strict=True):
        item.native = native


def stretches(network: Network, plan: Plan) -> Iterator[tuple[list[Stencil | Op], list[Item], Segment]]:
    """Runs of items that lie in one layout, with the values they start from and those needed after them; a segment
    for PyTorch has no stencils."""
    start, count = 0, len(network.items)
    while start < count:
        native, stop = plan.items[start].native, start
        while stop < count and plan.items[stop].native == native:
            stop += 1
        run = network.items[start:stop]
        made = {item.name for item in run}
        inputs = [name for name in dict.fromkeys(x for item in run for x in network.inputs(item)) if name not in made]
        outputs = sorted(made & network.alive(stop))
        shapes = {name: network.shapes[name] for name in [*inputs, *(item.name for item in run)]}
        stencils = tuple(item for item in run if isinstance(item, Stencil)) if native else ()
        segment = Segment(stencils, tuple(inputs), tuple(outputs), shapes, network.channels_last)
        yield run, plan.items[start:stop], segment
        start = stop


def choose(items: Sequence[Item], segment: Segment) -> int:
    """Choose the fastest candidate of every item of a native run; from which one on several vectors of examples are
    computed together: where that makes the sum of times smallest."""

    def total(split: int) -> float:
        if split < len(items) and segment.crossing(split) is None:
            return np.inf
        return sum(item.kernel(late=k >= split)[0] for k, item in enumerate(items))

    split = min(range(len(items), -1, -1), key=total)
    for k, item in enumerate(items):
        item.late = k >= split
        item.chosen = item.kernel(late=item.late)[1]
    return split
