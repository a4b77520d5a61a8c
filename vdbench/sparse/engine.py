"""`compile_sparse`: a trained network as the fastest thing this processor can do with its nonzero weights."""

import copy
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vdbench.files import Folders
from vdbench.records import write_json
from vdbench.sparse import storage
from vdbench.sparse.checks import Refused, Untraceable, close, unwrapped
from vdbench.sparse.compact import compact
from vdbench.sparse.graph import Conv2d, Graph, Shape, batch_shape
from vdbench.sparse.jit import COMPILING, machine_name, vector_lanes
from vdbench.sparse.opaque import left_to_pytorch
from vdbench.sparse.plan import CLEARLY, PYTORCH, Network, Plan, fastest, measure, place
from vdbench.sparse.program import TooLarge
from vdbench.sparse.running import Runner, memory
from vdbench.sparse.threads import Pool, checked_threads
from vdbench.sparse.tracing import trace
from vdbench.sparse.trial import Way, quickest

log = logging.getLogger("vdbench")

PLAN_VERSION = 10  # raised when plans of before no longer fit the code
FLOAT32 = np.dtype(np.float32)
LIKELY = 1.5  # times slower than the best plan: may yet be faster at another batch size
UNEVEN_S = 2e-6  # what it costs besides that a block is not full, or that some go in blocks and others one by one
TRIED_S = 0.05  # ways to something that takes longer by the plan are not timed anew
BY_LAYERS = "; vdbench.to_cpu_sparse(model) compiles it layer by layer"


class CompiledNet:
    """A network compiled for inference on a CPU; call it with a batch, an array or a tensor (N, ...) of float32.

    Attributes:
        graph: what is computed, dead structure removed.
        plans: how single examples and batches run, and how long every way took when it was compiled; the fastest
            first, then those that were not clearly slower.
    """

    def __init__(self, graph: Graph, plans: dict[str, list[Plan]], *, threads: int | None = None) -> None:
        self.graph, self.plans = graph, plans
        self._pool, self._process = Pool(threads), os.getpid()
        self._single, self._batch = (self._runner(key, plans[key][0]) for key in ("single", "batch"))
        self._block = vector_lanes() if any(item.native for item in plans["batch"][0].items) else 1
        self._in_blocks = functools.lru_cache(self._in_blocks_of)
        self._kept: dict[int, Way] = {}  # by how many binary digits the number of examples has
        self._shortest: dict[Shape, Callable[[np.ndarray], np.ndarray]] = {}  # by the shape of the batch

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles compile anew: machine code and memory belong to one process."""
        return functools.partial(CompiledNet, threads=self._pool.threads), (self.graph, self.plans)

    def __repr__(self) -> str:
        shapes = f"{batch_shape(self.graph.input.example)} to {batch_shape(self.graph.output.shape)}"
        weights = sum(op.weight_count for op in self.graph.ops)
        return f"CompiledNet({shapes}, {weights:,} weights left, threads={self._pool.threads})"

    def _runner(self, key: str, plan: Plan) -> Runner:
        return Runner(Network(self.graph, single=key == "single"), plan)

    def __call__(self, batch: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Outputs (N, ...) of the kind the input is. The first call with about so many examples may take up to half a
        second longer, to find the fastest way.

        Raises:
            TypeError: not a float32 array, nor such a tensor on the CPU. ValueError: another shape than compiled for.
        """
        tensor = isinstance(batch, Tensor)
        if not tensor and not isinstance(batch, np.ndarray):
            raise TypeError(f"an array or a tensor expected, not {type(batch).__name__}")
        if batch.dtype != (torch.float32 if tensor else FLOAT32):
            raise TypeError(f"compiled for float32, the batch is {batch.dtype}: convert it first")
        if tensor and batch.device.type != "cpu":
            raise TypeError(f"compiled for the CPU, the batch is on {batch.device}: move it with .cpu()")
        array = (batch.resolve_neg() if batch.is_neg() else batch).detach().numpy() if tensor else batch
        if shortest := self._shortest.get(array.shape):
            out = shortest(np.ascontiguousarray(array))
        elif array.ndim == 0 or array.shape[1:] != self.graph.input.example:
            raise ValueError(f"compiled for batches {batch_shape(self.graph.input.example)}, not {array.shape}")
        else:
            out = self._run(np.ascontiguousarray(array))
        return torch.from_numpy(out) if tensor else out

    def _run(self, array: np.ndarray) -> np.ndarray:
        if not len(array):
            return np.empty((0, *self.graph.output.shape), np.float32)
        size = len(array).bit_length()
        if size not in self._kept:
            with self._pool.trial:
                if size not in self._kept:
                    self._kept[size] = quickest(self._ways(len(array)), array)
        way = self._kept[size]
        if not way.keywords["together"]:
            count = self._in_blocks(len(array))
            runner = {0: way.keywords["single"], len(array): way.keywords["batch"]}.get(count)
            if runner and (shortest := runner.shortest(len(array), self._pool)):
                self._shortest[array.shape] = shortest
        return way(array)

    def _ways(self, count: int) -> list[Way]:
        """Ways to run about so many examples: as planned, on threads apart and together, and with plans that may turn
        out faster."""

        def way(**changed: Any) -> Way:
            planned = {"single": self._single, "batch": self._batch, "together": False}
            return functools.partial(self._call, **planned | changed)

        in_blocks = self._in_blocks(count)
        key, runner = ("batch", self._batch) if in_blocks else ("single", self._single)
        shares = runner.shares(self._pool)
        if self._planned_s(in_blocks, count - in_blocks) > TRIED_S:
            blocks = -(-count // vector_lanes()) if in_blocks else count
            return [way(together=shares and blocks < self._pool.threads)]
        together = [way(together=True)] if shares else []
        return [way(), *together, *(way(**{key: self._runner(key, plan)}) for plan in self._rivals(key))]

    def _rivals(self, key: str) -> list[Plan]:
        """Plans that may turn out faster than the first: with more threads, all that there are. PyTorch has as many
        threads as it was told, and in a fork of a process that used them it may wait for ever."""
        best, *others = self.plans[key]
        limit = LIKELY * best.seconds if self._pool.threads == 1 else np.inf
        pytorch = torch.get_num_threads() <= self._pool.threads and os.getpid() == self._process
        return [
            plan for plan in others if plan.seconds <= limit and (pytorch or all(item.native for item in plan.items))
        ]

    def _planned_s(self, in_blocks: int, one_by_one: int) -> float:
        """Seconds for so many examples."""
        blocks_s = self.plans["batch"][0].time(-(-in_blocks // self._block) * self._block) if in_blocks else 0.0
        singles_s = self.plans["single"][0].time(one_by_one) if one_by_one else 0.0
        uneven = in_blocks % self._block or (in_blocks and one_by_one)
        return blocks_s + singles_s + (UNEVEN_S if uneven else 0.0)

    def _in_blocks_of(self, count: int) -> int:
        """How many of so many examples go in blocks, the others one by one, so that it takes least by the plans."""
        return min((0, count, count - count % self._block), key=lambda n: self._planned_s(n, count - n))

    def _call(self, array: np.ndarray, *, single: Runner, batch: Runner, together: bool) -> np.ndarray:
        count = self._in_blocks(len(array))
        parts = [(batch, array[:count]), (single, array[count:])]
        outs = [runner(part, self._pool, together) for runner, part in parts if len(part)]
        if len(outs) == 1:
            return outs[0]
        return np.concatenate(outs, out=memory(len(array), self.graph.output.shape)())

    def summary(self) -> str:
        """Per layer: shape, density, what was removed, how it runs, how long every way takes, and how near that is to
        the processor's limit."""
        from vdbench.sparse.summary import describe

        return describe(self.graph, self.plans)

    def save(self, path: Path | str) -> None:
        """Write the net to a NumPy archive without pickle, its weights sparse. Raises NotStorable where it runs
        PyTorch functions."""
        storage.save(Path(path), self.graph, self.plans, measured_with())

    @classmethod
    def load(cls, path: Path | str, *, threads: int | None = None) -> "CompiledNet":
        """A net that was saved; on another kind of processor, or with another PyTorch, the plans are made anew and
        remembered. Raises NetFileError."""
        graph, plans = storage.load(Path(path), measured_with())
        return cls(graph, plans or planned(graph), threads=threads)


def compile_sparse(model: nn.Module, example_input: Tensor, *, threads: int | None = None) -> CompiledNet:
    """A trained model, compiled for inference on this processor.

    Variational layers are masked at their threshold; in others a removed weight is a zero. Normalisation is folded
    into the layers, units that are dead or constant are taken out exactly, and every layer runs as whatever was
    fastest here: PyTorch on what is left, or one of the kernels for sparse weights. What was measured is kept in the
    cache folder (`VDBENCH_CACHE`, else `~/.cache/vdbench`).

    Args:
        model: in eval mode, float32, on the CPU.
        example_input: a batch (N, ...) like those to come; only its shape counts.
        threads: at the most (default: as many as PyTorch uses).

    Raises:
        TypeError, ValueError: the model, the example or the threads are not as described; the message says what to do.
        Untraceable: the model is no fixed sequence of operations; see `to_cpu_sparse` for those.
    """
    checked_threads(threads)  # before anything is measured
    try:
        graph = trace(unwrapped(model), example_input)
    except Refused:
        raise
    except Untraceable as error:
        raise Untraceable(f"{error}{BY_LAYERS}") from error
    return compiled(compact(graph), threads)


def compiled(graph: Graph, threads: int | None) -> CompiledNet:
    """A traced network, planned, saying which layers with weights PyTorch runs."""
    if left := left_to_pytorch(graph):
        elsewhere = BY_LAYERS if left_to_pytorch(graph, nn.Linear) else ""
        log.warning("PyTorch runs %s: no kernel computes such layers on such values%s", ", ".join(left), elsewhere)
    return CompiledNet(graph, planned(graph), threads=threads)


def measured_with() -> str:
    """What plans hold for: this code, kind of processor and PyTorch."""
    return f"{PLAN_VERSION} {machine_name()} {torch.__version__}"


def planned(graph: Graph) -> dict[str, list[Plan]]:
    """`make_plans`, or what is remembered of it."""
    known = storage.digest(graph)
    if known is None:
        return make_plans(graph)
    key = hashlib.sha256(f"{measured_with()} {known}".encode()).hexdigest()[:32]
    path = Folders.in_force(None, None).cache / "compiled" / f"{key}.json"
    try:
        plans = storage.plans_from_json(json.loads(path.read_text()))
        storage.check_plans(plans, graph)
        return plans
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        plans = make_plans(graph)
    try:
        write_json(path, storage.plans_to_json(plans))
    except OSError as error:
        log.warning("plans are not remembered: %s", error)
    return plans


def make_plans(graph: Graph) -> dict[str, list[Plan]]:
    """Plans for single examples and for batches, measured on one thread, the fastest first."""
    with COMPILING:  # of two threads that set PyTorch's and put them back, the second would put back the first's
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return {key: _make_plans(Network(graph, single=key == "single")) for key in ("single", "batch")}
        finally:
            torch.set_num_threads(before)


def _make_plans(network: Network) -> list[Plan]:
    """Time every way of every operation, and then whole networks: our kernels wherever there are any, the cheapest
    mixture, and PyTorch alone in either memory format, unless it could not win even at the processor's peak. The
    fastest comes first, so it is never slower than PyTorch; those clearly slower are left out, and so are those whose
    outputs are not PyTorch's."""
    measured = measure(network)
    random, shape = np.random.default_rng(0), network.graph.input.example
    batch, block = (random.standard_normal((n, *shape), np.float32) for n in (measured.examples, vector_lanes()))
    pool, made = Pool(1), {}
    expected = network.graph(torch.from_numpy(batch.copy()))

    def fastest_so_far() -> float:
        return min((plan.seconds for plan in made.values()), default=np.inf)

    def try_out(name: str, choose_layouts: Callable[[Plan], None], *, channels_last: bool = False) -> None:
        plan = copy.deepcopy(measured)
        plan.channels_last = channels_last
        choose_layouts(plan)
        if any(plan.same_ways(other) for other in made.values()):
            return
        runner = Runner(network, plan)
        if any(item.native for item in plan.items):
            try:
                out = runner(batch, pool)  # compiles what is new
            except TooLarge:
                return
            if not close(torch.from_numpy(out), expected):
                log.warning("kernels that do not compute what the network does are left out: please report this net")
                return
        plan.seconds = fastest(lambda: runner(batch, pool), CLEARLY * fastest_so_far())
        made[name] = plan
        if plan.seconds <= CLEARLY * fastest_so_far():
            block_s = fastest(lambda: runner(block, pool))
            plan.more_s = max(0.0, (block_s - plan.seconds) / (len(block) - plan.examples))

    def everywhere(plan: Plan) -> None:
        for item in plan.items:
            item.native = item.best(native=True) < np.inf

    try_out("native", everywhere)
    if any(PYTORCH in item.seconds for item in measured.items):
        try_out("mixed", lambda plan: place(network, plan))
    if fastest_so_far() > sum(map(network.dense_limit_s, network.items)):
        try_out(PYTORCH, lambda plan: None)
        if any(isinstance(op, Conv2d) for op in network.graph.ops):
            try_out("torch, channels last", lambda plan: None, channels_last=True)
    best, *others = sorted(made.values(), key=lambda plan: plan.seconds)
    best.ways = {name: plan.seconds for name, plan in made.items()}
    return [best, *(plan for plan in others if plan.seconds <= CLEARLY * best.seconds)]
