"""`compile_sparse`: a trained network as the fastest thing this processor can do with its nonzero weights."""

import copy
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vdbench.files import Folders
from vdbench.records import write_json
from vdbench.sparse import storage
from vdbench.sparse.compact import compact
from vdbench.sparse.graph import Graph
from vdbench.sparse.jit import machine_name, vector_lanes
from vdbench.sparse.plan import CLEARLY, PYTORCH, Network, Plan, fastest, measure, place
from vdbench.sparse.running import Pool, Runner
from vdbench.sparse.tracing import trace

log = logging.getLogger("vdbench")

PLAN_VERSION = 2  # raised when plans of before no longer fit the code


class CompiledNet:
    """A network compiled for inference on a CPU; call it with a batch, an array or a tensor (N, ...) of float32.

    Attributes:
        graph: what is computed, dead structure removed.
        plans: how single examples and batches run, and how long every way took when it was compiled.
    """

    def __init__(self, graph: Graph, plans: dict[str, Plan], *, threads: int | None = None) -> None:
        self.graph, self.plans = graph, plans
        self._pool = Pool(threads or torch.get_num_threads())
        self._single = Runner(Network(graph, single=True), plans["single"])
        self._batch = Runner(Network(graph, single=False), plans["batch"])
        self._one = self._single.shortest(1, self._pool)
        self._one_shape = (1, *graph.input.shape) if self._one else None

    def __call__(self, batch: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Outputs (N, ...) of the kind the input is.

        Raises:
            TypeError: not a float32 array, nor such a tensor on the CPU. ValueError: another shape than compiled for.
        """
        tensor = isinstance(batch, Tensor)
        if not tensor and not isinstance(batch, np.ndarray):
            raise TypeError(f"an array or a tensor expected, not {type(batch).__name__}")
        if batch.dtype != (torch.float32 if tensor else np.float32):
            raise TypeError(f"compiled for float32, the batch is {batch.dtype}: convert it first")
        if tensor and batch.device.type != "cpu":
            raise TypeError(f"compiled for the CPU, the batch is on {batch.device}: move it with .cpu()")
        array = batch.detach().numpy() if tensor else batch
        if array.shape == self._one_shape:
            out = self._one(np.ascontiguousarray(array))  # type: ignore[misc]
        elif array.ndim == 0 or array.shape[1:] != self.graph.input.shape:
            wanted = ", ".join(map(str, self.graph.input.shape))
            raise ValueError(f"compiled for batches (N, {wanted}), not {array.shape}")
        else:
            out = self._run(np.ascontiguousarray(array))
        return torch.from_numpy(out) if tensor else out

    def _run(self, array: np.ndarray) -> np.ndarray:
        count, lanes = len(array), vector_lanes()
        if not count:
            return np.empty((0, *self.graph.output.shape), np.float32)
        single_s, batch = self.plans["single"].seconds, self.plans["batch"]
        block_s = batch.seconds / batch.examples * lanes
        rest = count % lanes
        if count * single_s <= -(-count // lanes) * block_s:
            return self._single(array, self._pool)
        if rest and count > lanes and rest * single_s < block_s:
            return np.concatenate([self._batch(array[:-rest], self._pool), self._single(array[-rest:], self._pool)])
        return self._batch(array, self._pool)

    def summary(self) -> str:
        """Per layer: shape, density, what was removed, how it runs, how long every way takes, and how near that is to
        the processor's limit."""
        from vdbench.sparse.summary import describe

        return describe(self.graph, self.plans)

    def save(self, path: Path | str) -> None:
        """Write the net to a NumPy archive without pickle, its weights sparse. Raises NotStorable where it runs
        PyTorch functions."""
        storage.save(Path(path), self.graph, self.plans, machine_name())

    @classmethod
    def load(cls, path: Path | str, *, threads: int | None = None) -> "CompiledNet":
        """A net that was saved; on another kind of processor the plans are made anew. Raises NetFileError."""
        graph, plans, machine = storage.load(Path(path))
        if machine != machine_name():
            plans = make_plans(graph)
        return cls(graph, plans, threads=threads)


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
        TypeError, ValueError: the model or the example is not as described; the message says what to do.
        Untraceable: the model is no fixed sequence of operations; see `to_cpu_sparse` for those.
    """
    return CompiledNet(*_compiled(compact(trace(model, example_input))), threads=threads)


def _compiled(graph: Graph) -> tuple[Graph, dict[str, Plan]]:
    """The graph with its plans, remembered ones if there are any."""
    known = storage.digest(graph)
    if known is None:
        return graph, make_plans(graph)
    key = hashlib.sha256(f"{PLAN_VERSION} {machine_name()} {torch.__version__} {known}".encode()).hexdigest()[:32]
    path = Folders.in_force(None, None).cache / "compiled" / f"{key}.json"
    try:
        return graph, {name: Plan.from_json(plan) for name, plan in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        plans = make_plans(graph)
    try:
        write_json(path, {name: plan.to_json() for name, plan in plans.items()})
    except OSError as error:
        log.warning("plans are not remembered: %s", error)
    return graph, plans


def make_plans(graph: Graph) -> dict[str, Plan]:
    """Plans for single examples and for batches, measured on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {key: _make_plan(Network(graph, single=key == "single")) for key in ("single", "batch")}
    finally:
        torch.set_num_threads(before)


def _make_plan(network: Network) -> Plan:
    """Time every way of every operation, and then whole networks: our kernels wherever there are any, the cheapest
    mixture, and PyTorch alone in either memory format, unless it could not win even at the processor's peak. The
    fastest is the plan, so it is never slower than PyTorch."""
    measured = measure(network)
    shape = (measured.examples, *network.graph.input.shape)
    batch = np.random.default_rng(0).standard_normal(shape, np.float32)
    pool, made = Pool(1), {}

    def fastest_so_far() -> float:
        return min((plan.seconds for plan in made.values()), default=np.inf)

    def try_out(name: str, choose_layouts: Callable[[Plan], None], *, channels_last: bool = False) -> None:
        plan = copy.deepcopy(measured)
        plan.channels_last = channels_last
        choose_layouts(plan)
        runner = Runner(network, plan)
        if any(item.native for item in plan.items):
            runner(batch, pool)  # compiles what is new
        plan.seconds = fastest(lambda: runner(batch, pool), CLEARLY * fastest_so_far())
        made[name] = plan

    def everywhere(plan: Plan) -> None:
        for item in plan.items:
            item.native = item.best(native=True) < np.inf

    try_out("native", everywhere)
    if any(PYTORCH in item.seconds for item in measured.items):
        try_out("mixed", lambda plan: place(network, plan))
    if fastest_so_far() > sum(map(network.dense_limit_s, network.items)):
        try_out(PYTORCH, lambda plan: None)
        try_out("torch, channels last", lambda plan: None, channels_last=True)
    best = min(made.values(), key=lambda plan: plan.seconds)
    best.ways = {name: plan.seconds for name, plan in made.items()}
    return best
