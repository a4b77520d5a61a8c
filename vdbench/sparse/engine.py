"""`compile_sparse`: a trained network as the fastest thing this processor can do with its nonzero weights."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vdbench.sparse.graph import Graph
from vdbench.sparse.jit import vector_lanes
from vdbench.sparse.plan import CLEARLY, PYTORCH, Plan, fastest, measure, place
from vdbench.sparse.running import Pool, Runner


class CompiledNet:
    """A network compiled for inference on a CPU; call it with a batch, an array or a tensor (N, ...) of float32.

    Attributes:
        graph: what is computed, dead structure removed.
        plans: how single examples and batches run, and how long every way took when it was compiled.
    """

    def __init__(self, graph: Graph, plans: dict[str, Plan], *, threads: int | None = None) -> None:
        self.graph, self.plans = graph, plans
        self._pool = Pool(threads or torch.get_num_threads())
        self._single, self._batch = (Runner(graph, plans[key]) for key in ("single", "batch"))
        self._one = self._single.one
        self._one_shape = (1, *graph.input.shape) if self._one else None

    def __call__(self, batch: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Outputs (N, ...) of the kind the input is.

        Raises:
            TypeError: not a float32 array, nor such a tensor on the CPU. ValueError: another shape than compiled for.
        """
        if type(batch) is np.ndarray and batch.shape == self._one_shape and batch.dtype == np.float32:
            return self._one(batch)
        array = batch.detach().numpy() if isinstance(batch, Tensor) else batch
        if array.dtype != np.float32:
            raise TypeError(f"float32 expected, not {array.dtype}: convert the batch first")
        if array.shape[1:] != self.graph.input.shape or not array.ndim > 1:
            raise ValueError(f"compiled for (N, {', '.join(map(str, self.graph.input.shape))}), not {array.shape}")
        out = self._run(array)
        return torch.from_numpy(out) if isinstance(batch, Tensor) else out

    def _run(self, array: np.ndarray) -> np.ndarray:
        count, lanes = len(array), vector_lanes()
        single_s, batch = self.plans["single"].seconds, self.plans["batch"]
        block_s = batch.seconds / batch.examples * lanes
        rest = count % lanes
        if count * single_s <= -(-count // lanes) * block_s:
            return self._single(array, self._pool)
        if rest and rest * single_s < block_s:
            return np.concatenate([self._batch(array[:-rest], self._pool), self._single(array[-rest:], self._pool)])
        return self._batch(array, self._pool)


def plan_for(graph: Graph, single: bool) -> Plan:
    """Time every way of every operation, and then whole networks: PyTorch alone in either memory format, our kernels
    wherever there are any, and the cheapest mixture. The fastest is the plan, so it is never slower than PyTorch."""
    plan = measure(graph, single)
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((plan.examples, *graph.input.shape), np.float32)
    alternatives: dict[str, Plan] = {}

    def alternative(name: str, natives: Callable[[Plan], None], **changes: object) -> None:
        made = copy.deepcopy(plan)
        natives(made)
        for key, value in changes.items():
            setattr(made, key, value)
        pool, runner = Pool(1), Runner(graph, made)
        limit = CLEARLY * min((other.seconds for other in alternatives.values()), default=np.inf)
        runner(batch, pool)  # compiles what is new
        made.seconds = fastest(lambda: runner(batch, pool), limit)
        alternatives[name] = made

    def everywhere(made: Plan) -> None:
        for item in made.items:
            item.native = len(item.seconds) > 1

    alternative("native", everywhere)
    alternative("mixed", lambda made: place(graph, made))
    alternative(PYTORCH, lambda made: None)
    alternative("torch, channels last", lambda made: None, channels_last=True)
    best = min(alternatives.values(), key=lambda made: made.seconds)
    best.ways = {name: made.seconds for name, made in alternatives.items()}
    return best


def compile_graph(graph: Graph, *, threads: int | None = None) -> CompiledNet:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plans = {"single": plan_for(graph, True), "batch": plan_for(graph, False)}
    finally:
        torch.set_num_threads(before)
    return CompiledNet(graph, plans, threads=threads)
