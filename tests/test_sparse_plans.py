"""Which way a compiled net runs: what is timed, when, and what is chosen."""

import copy
import functools
import math
import threading

import numpy as np
import pytest
import torch
from sparse_net import EXAMPLE, assert_same, network

from vdbench.sparse import CompiledNet, compile_sparse, engine, trial
from vdbench.sparse.plan import PYTORCH, Item, Network, Plan, choose, fastest, place, stretches
from vdbench.sparse.trial import quickest

pytestmark = pytest.mark.usefixtures("engine_cache")


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def timed(monkeypatch):
    """Makes ways that take given seconds by a clock of their own and add one number each, and the calls there were."""
    clock, calls = Clock(), []
    monkeypatch.setattr(trial, "time", clock)

    def run(batch: np.ndarray, *, number: int, seconds: float, together: bool) -> np.ndarray:
        calls.append(number)
        clock.now += seconds
        return batch + number

    def ways(*times: float) -> list[trial.Way]:
        return [functools.partial(run, number=n, seconds=s, together=True) for n, s in enumerate(times)]

    return ways, calls


@pytest.mark.parametrize("times, rounds", [((4e-3, 3e-3, 6e-3), trial.ROUNDS), ((0.2, 0.1, 0.25), 1)])
def test_the_quickest_way_wins(timed, times, rounds):
    ways, calls = timed
    made = ways(*times)
    assert quickest(made, np.zeros(1)) is made[1]
    for number, seconds in enumerate(times):  # one after 10 ms of others like it, every round
        assert calls.count(number) == rounds * (math.ceil(trial.RUN_IN_S / seconds) + 1)


def test_hopeless_ways_are_given_up_and_a_single_one_is_not_timed(timed):
    ways, calls = timed
    made = ways(11e-3, 3e-3, 12e-3)
    assert quickest(made, np.zeros(1)) is made[1]
    assert calls == [0, 0, *[1] * 5, 2, 2]
    calls.clear()
    assert quickest(made[:1], np.zeros(1)) is made[0] and not calls


def test_equal_inputs_give_equal_outputs(monkeypatch, timed):
    """Though the other way would be the faster later; of two first callers, one has the ways timed."""
    ways, _ = timed
    first, later = ways(2e-3, 1e-3), ways(1e-3, 2e-3)
    net, batch = compile_sparse(network(), EXAMPLE, threads=1), torch.zeros(40, 2, 10, 10)
    asked, both = [first, later], threading.Barrier(2)
    monkeypatch.setattr(net, "_ways", lambda _: asked.pop(0))
    found = []

    def call() -> None:
        both.wait()
        found.append(net(batch))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert asked == [later]
    assert all(torch.equal(out, batch + 1) for out in [*found, net(batch)])


def test_plans_that_were_nearly_as_fast_are_tried(monkeypatch):
    net, batch = compile_sparse(network(), EXAMPLE, threads=1), torch.randn(40, 2, 10, 10)
    expected = network()(batch).detach()
    for key in ("single", "batch"):
        rival = copy.deepcopy(net.plans[key][0])
        for item in rival.items:
            item.native = False
        rival.seconds *= 1.01
        net.plans[key] = [net.plans[key][0], rival]

    def ways(count: int, threads: int = 1) -> int:
        return len(CompiledNet(net.graph, net.plans, threads=threads)._ways(count))

    again = CompiledNet(net.graph, net.plans, threads=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for count in (40, 17, 1):
        made = again._ways(count)
        assert len(made) == 2
        for way in made:
            assert_same(way(batch[:count].numpy()), expected[:count])
        assert_same(again(batch[:count]), expected[:count])
    for key in ("single", "batch"):
        net.plans[key][1].seconds = 2 * net.plans[key][0].seconds
    assert (ways(40), ways(40, threads=4)) == (1, 2)  # hopeless on one thread, perhaps not on four
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert ways(40, threads=4) == 1  # PyTorch would take more threads than allowed
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for plan in net.plans["batch"]:
        plan.seconds = net.plans["single"][0].seconds = 10.0
    assert ways(40, threads=4) == 1  # takes long enough as it is


@pytest.mark.parametrize("first", [0, 1])
def test_single_examples_take_the_shortest_way_once_it_is_known_to_be_the_fastest(monkeypatch, first):
    net = compile_sparse(network(), EXAMPLE, threads=1)
    rival = copy.deepcopy(net.plans["single"][0])
    for item in rival.items:
        item.native = False
    net.plans["single"] = [net.plans["single"][0], rival]
    net.plans["batch"][0].seconds = 1.0  # so that no block is faster than its first example
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(engine, "quickest", lambda ways, _: ways[first])
    net = CompiledNet(net.graph, net.plans, threads=1)
    assert not net._shortest
    out = net(EXAMPLE + 1)
    assert bool(net._shortest) == (first == 0)
    assert_same(net(EXAMPLE + 1), out)


@pytest.mark.parametrize(
    ("single", "batch", "parts"),
    [
        ((2, 1), (100, 1), {1: 0, 15: 0, 40: 0}),  # (seconds for the planned examples, for every further one)
        ((2, 1), (44, 0.75), {1: 0, 7: 0, 8: 8, 16: 16, 17: 16, 26: 16, 28: 28, 32: 32}),  # a block is 8, two are 20
        ((2, 1), (10, 0.1), {1: 0, 4: 0, 15: 15, 17: 17, 31: 31, 40: 40}),  # a block is 5.2
    ],
)
def test_examples_go_one_by_one_or_in_blocks_as_takes_least(compiled, monkeypatch, single, batch, parts):
    monkeypatch.setattr(engine, "vector_lanes", lambda: 16)
    plans = copy.deepcopy(compiled.plans)
    for key, numbers in (("single", single), ("batch", batch)):
        plan = plans[key][0]
        plan.examples = 1 if key == "single" else 64
        plan.seconds, plan.more_s = (1e-3 * number for number in numbers)
        for item in plan.items:
            item.native = True
    net = CompiledNet(compiled.graph, plans, threads=1)
    assert {count: net._in_blocks(count) for count in parts} == parts


def test_what_a_further_example_takes_is_measured(compiled):
    for plans in compiled.plans.values():
        for plan in plans:
            assert 0 <= plan.more_s < np.inf and plan.time(plan.examples) == plan.seconds
            assert plan.time(plan.examples + 2) == pytest.approx(plan.seconds + 2 * plan.more_s)


def made_plan(items: list[tuple[float, float]], examples: int = 64) -> Plan:
    found = [Item(f"l{k}", {PYTORCH: torch_s, "tile 8x16": ours_s}) for k, (torch_s, ours_s) in enumerate(items)]
    return Plan(examples, found)


def test_the_cheapest_path_counts_the_change_of_layout(compiled):
    split = Network(compiled.graph, single=False)
    count = len(split.items)
    plan = made_plan([(1.0, 0.5)] * count)
    place(split, plan)
    assert all(item.native for item in plan.items)
    plan = made_plan([(1.0, 2.0)] + [(1.0, 0.1)] * (count - 1))
    place(split, plan)
    assert [item.native for item in plan.items] == [False] + [True] * (count - 1)
    plan = made_plan([(1e-7, 0.9e-7)] * count)  # cheaper than PyTorch, but not by what changing over costs
    place(split, plan)
    assert not any(item.native for item in plan.items)


def test_candidates_are_chosen_by_their_time(compiled):
    split = Network(compiled.graph, single=False)
    plan = made_plan([(9.0, 1.0)] * len(split.items))
    for item in plan.items:
        item.native = True
    plan.items[0].seconds |= {"tile 16x16": 0.5}
    plan.items[-1].seconds |= {"tile 8x16 late": 0.25}
    ((_, items, segment),) = stretches(split, plan)
    assert choose(items, segment) == len(items) - 1
    assert items[0].chosen == "tile 16x16" and items[-1].late and not items[0].late


def test_the_fastest_call_counts_and_hopeless_ones_are_given_up():
    calls = []
    assert 0 <= fastest(lambda: calls.append(None)) < float("inf")
    assert len(calls) >= 4  # a warm-up and three at least
    calls.clear()
    fastest(lambda: calls.append(None), limit=0.0)
    assert len(calls) == 3  # the warm-up tells nothing, and one call may have been held up
