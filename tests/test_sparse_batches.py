"""Batches of any size: right, the caller's own, and none with much around it."""

import copy
import threading

import numpy as np
import pytest
import torch
from sparse_net import EXAMPLE, assert_same, network

from vdbench.sparse import CompiledNet
from vdbench.sparse.jit import vector_lanes
from vdbench.sparse.running import NativeRun

pytestmark = pytest.mark.usefixtures("engine_cache")

LANES = vector_lanes()
COUNTS = [1, 5, LANES - 1, LANES, LANES + 1, 2 * LANES - 1, 4 * LANES - 1, 4 * LANES + 1]


def planned(compiled: CompiledNet, single_s: float, block_s: float, threads: int = 1) -> CompiledNet:
    """Our kernels everywhere; an example by itself, and a block, take so long by the plans."""
    plans = {key: [copy.deepcopy(made[0])] for key, made in compiled.plans.items()}
    for key, seconds, count in (("single", single_s, 1), ("batch", block_s, LANES)):
        (plan,) = plans[key]
        plan.seconds, plan.more_s = seconds * plan.examples / count, seconds / count
        for item in plan.items:
            item.native = True
    return CompiledNet(compiled.graph, plans, threads=threads)


@pytest.fixture(params=["blocks", "one by one", "both"])
def net(compiled, request):
    return planned(compiled, *{"blocks": (1.0, 0.0), "one by one": (0.0, 1.0), "both": (1e-3, 3.5e-3)}[request.param])


def examples(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *EXAMPLE.shape[1:]), np.float32)


def test_every_size_is_right(net):
    batch = examples(70)
    expected = network()(torch.from_numpy(batch)).detach()
    for count in [*range(1, 71), *range(70, 0, -1)]:  # first calls, and later ones
        assert_same(net(batch[:count]), expected[:count])


@pytest.mark.parametrize("count", COUNTS)
def test_results_are_not_those_of_the_next_call_and_inputs_stay(net, count):
    batch, other = examples(count), examples(count, seed=1)
    before = batch.copy()
    batch.setflags(write=False)
    first, again = net(batch), net(batch)
    kept = first.copy()
    net(other)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(again, kept)
    np.testing.assert_array_equal(batch, before)
    assert first.base is None or not np.shares_memory(first, net(other))


@pytest.mark.parametrize("together", [False, True])
def test_threads_share_sizes_that_are_no_blocks(compiled, monkeypatch, together):
    monkeypatch.setattr("vdbench.sparse.threads.WORTH_A_THREAD_S", 1e-9)
    net, batch = planned(compiled, 1.0, 0.0, threads=3), examples(4 * LANES + 1)
    expected = network()(torch.from_numpy(batch)).detach()
    for count in COUNTS:
        assert_same(net._batch(batch[:count], net._pool, together), expected[:count])


def test_callers_of_one_net_at_a_time_keep_blocks_of_their_own(compiled):
    net, wrong = planned(compiled, 1.0, 0.0), []
    batches = [examples(count, seed) for seed, count in enumerate((5, 5, LANES - 1, LANES + 3))]
    expected = [net(batch) for batch in batches]

    def call(batch: np.ndarray, out: np.ndarray) -> None:
        wrong.extend(k for k in range(200) if not np.array_equal(net(batch), out))

    callers = [threading.Thread(target=call, args=pair) for pair in zip(batches, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
    assert not any(caller.is_alive() for caller in callers) and not wrong


def test_every_size_takes_the_shortest_way_and_only_less_than_a_block_is_copied(compiled, monkeypatch):
    net, copied, batches = planned(compiled, 1.0, 0.0), [], [examples(count) for count in COUNTS]
    padded = NativeRun._padded

    def noted(run, addresses, count, compute):
        copied.append(count)
        padded(run, addresses, count, compute)

    monkeypatch.setattr(NativeRun, "_padded", noted)
    for batch in batches:
        net(batch)
        assert batch.shape in net._shortest
    assert copied == [count for count in COUNTS if count < LANES]
    monkeypatch.setattr(np, "zeros", lambda *_: pytest.fail("memory is kept"))
    for batch in batches:
        net(batch)
