"""compile_sparse: any batch, any mixture of PyTorch and native code, files, the cache, and what is refused."""

import copy
import functools
import json
import logging
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

import vdbench
from vdbench.conversion import to_variational_dropout
from vdbench.netfile import NetFileError
from vdbench.sparse import CompiledNet, compile_sparse, engine, jit, machine, storage, to_cpu_sparse, trial
from vdbench.sparse.plan import PYTORCH, Item, Network, Plan, choose, fastest, place, stretches
from vdbench.sparse.program import _shares
from vdbench.sparse.running import Pool, Runner
from vdbench.sparse.summary import describe
from vdbench.sparse.tracing import Untraceable, trace
from vdbench.sparse.trial import quickest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Kernels and plans are kept in a folder of the tests' own, the same for all of them."""
    monkeypatch.setenv("VDBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def network(density: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 20),
        nn.ReLU(),
        nn.Linear(20, 3),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data *= torch.rand_like(layer.weight) < density
    model[1].running_mean.normal_()
    return model.eval()


EXAMPLE = torch.zeros(1, 2, 10, 10)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VDBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return compile_sparse(network(), EXAMPLE, threads=1)


def assert_same(out, expected) -> None:
    assert (torch.as_tensor(out) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 31, 64, 65, 100, 300])
def test_any_batch_size(compiled, count):
    batch = torch.randn(count, 2, 10, 10)
    assert_same(compiled(batch), network()(batch).detach())


def test_arrays_and_tensors(compiled):
    batch = torch.randn(5, 2, 10, 10)
    array, tensor = compiled(batch.numpy()), compiled(batch)
    assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(array, tensor.numpy())
    assert compiled(batch[:0]).shape == (0, 3)
    strided = torch.randn(5, 10, 10, 2).permute(0, 3, 1, 2)
    assert_same(compiled(strided), network()(strided).detach())
    assert not compiled(batch.requires_grad_()).requires_grad


def test_results_are_the_callers_own(compiled):
    first = compiled(torch.ones(1, 2, 10, 10))
    kept = first.clone()
    compiled(torch.zeros(1, 2, 10, 10))
    assert torch.equal(first, kept)


@pytest.fixture
def together(monkeypatch):
    """Threads share the channels of every block."""
    monkeypatch.setattr("vdbench.sparse.running.WORTH_A_THREAD_S", 1e-9)
    ways = CompiledNet._ways
    monkeypatch.setattr(CompiledNet, "_ways", lambda *args: [way for way in ways(*args) if way.keywords["together"]])


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr("vdbench.sparse.running.WORTH_A_THREAD_S", 1e-9)
    model, batch = network(), torch.randn(150, 2, 10, 10)
    one, three = (compile_sparse(model, EXAMPLE, threads=n) for n in (1, 3))
    for count in (150, 83, 48, 16, 5, 1):
        ways = three._ways(count)
        assert [way.keywords["together"] for way in ways[:2]] == [False, True]
        for way in ways:
            assert_same(way(batch[:count].numpy()), model(batch[:count]).detach())
        assert_same(three(batch[:count]), one(batch[:count]))


@pytest.mark.usefixtures("together")
def test_two_callers_at_a_time():
    net, batches = compile_sparse(network(), EXAMPLE, threads=3), torch.randn(4, 16, 2, 10, 10)
    expected, wrong = [net(batch) for batch in batches], []

    def call(batch: torch.Tensor, out: torch.Tensor) -> None:
        wrong.extend(k for k in range(50) if not torch.equal(net(batch), out))

    callers = [threading.Thread(target=call, args=pair) for pair in zip(batches, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
    assert not any(caller.is_alive() for caller in callers) and not wrong


@pytest.mark.usefixtures("together")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_a_fork_has_threads_and_locks_of_its_own():
    net, batch = compile_sparse(network(), EXAMPLE, threads=2), torch.randn(16, 2, 10, 10)
    expected = net(batch)
    with net._pool.trial, net._pool._together:
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(net(batch), expected) and len(net(batch[:1])) else 1)
    assert os.waitpid(child, 0)[1] == 0


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

    def run(batch: np.ndarray, *, number: int, seconds: float) -> np.ndarray:
        calls.append(number)
        clock.now += seconds
        return batch + number

    return lambda *times: [functools.partial(run, number=n, seconds=s) for n, s in enumerate(times)], calls


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
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(engine, "quickest", lambda ways, _: ways[first])
    net = CompiledNet(net.graph, net.plans, threads=1)
    assert net._one is None
    out = net(EXAMPLE + 1)
    assert (net._one is None) == bool(first)
    assert_same(net(EXAMPLE + 1), out)


@pytest.mark.usefixtures("together")
def test_threads_that_wait_are_released_when_one_cannot_start(monkeypatch):
    net, batch = compile_sparse(network(), EXAMPLE, threads=3), torch.randn(16, 2, 10, 10)
    expected, executor, left = net(batch), net._pool._executor, [1]

    def submit(job):
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        return ThreadPoolExecutor.submit(executor, job)

    monkeypatch.setattr(executor, "submit", submit)
    with pytest.raises(RuntimeError, match="start"):
        net(batch)
    monkeypatch.undo()
    assert_same(net(batch), expected)


@pytest.mark.parametrize("channels, threads", [(2, 2), (4, 4), (10, 2), (16, 16), (3, 5)])
def test_channels_are_shared_out_evenly(channels, threads):
    graph = trace(nn.Linear(7, channels).eval(), torch.zeros(1, 7))
    (stencil,) = Network(graph, single=True).items
    shares = _shares(stencil, Mock(), threads)
    assert [first for first, _ in shares] == [0, *(stop for _, stop in shares[:-1])] and shares[-1][1] == channels
    sizes = [stop - first for first, stop in shares]
    assert max(sizes) - min(sizes) <= 1


def test_small_work_stays_on_one_thread():
    assert Pool(8).worth(1e-9) == 1 and Pool(8).worth(1.0) == 8


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("pattern", ["NTNTN", "TNTNT", "TTTTT", "NNNNN", "NNTTN"])
def test_pytorch_and_native_code_in_any_order(compiled, single, pattern):
    network_ = Network(compiled.graph, single=single)
    plan = Plan.from_json(compiled.plans["single" if single else "batch"][0].to_json())
    for k, item in enumerate(plan.items):
        item.native = pattern[k % 5] == "N"
    for channels_last in (False, True):
        plan.channels_last = channels_last
        batch = torch.randn(35, 2, 10, 10)
        assert_same(Runner(network_, plan)(batch.numpy(), Pool(1)), network()(batch).detach())


def test_a_residual_network_may_change_over_anywhere():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x):
            x = self.a(x).relu()
            return self.c((self.b(x) + x).sigmoid()) + x

    model, batch = Block().eval(), torch.randn(20, 3, 6, 6)
    net = compile_sparse(model, batch, threads=1)
    for key in ("single", "batch"):
        split = Network(net.graph, single=key == "single")
        for first in range(2 ** len(split.items)):
            plan = Plan.from_json(net.plans[key][0].to_json())
            for k, item in enumerate(plan.items):
                item.native = bool(first >> k & 1) and item.best(native=True) < np.inf
            assert_same(Runner(split, plan)(batch.numpy(), Pool(1)), model(batch).detach())


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
    assert len(calls) == 2  # the warm-up tells nothing


def test_dead_structure_is_told(compiled):
    model = network()
    model[4].weight.data[3] = 0
    assert "1 constant" in compile_sparse(model, EXAMPLE).graph.removed["4"]


def test_variational_layers_are_masked():
    model = to_variational_dropout(network(1.0))
    for layer in model:
        if hasattr(layer, "log_sigma2"):
            layer.log_sigma2.data.normal_(-3, 4)
    batch = torch.randn(3, 2, 10, 10)
    net = compile_sparse(model, batch)
    assert net.graph["7"].weight_count < 72 * 20
    assert_same(net(batch), model(batch).detach())


def test_files(compiled, tmp_path, monkeypatch):
    compiled.save(tmp_path / "net.npz")
    monkeypatch.setattr(engine, "make_plans", lambda graph: pytest.fail("planned again on the same machine"))
    again = CompiledNet.load(tmp_path / "net.npz", threads=1)
    batch = np.random.default_rng(0).standard_normal((20, 2, 10, 10), np.float32)
    assert again.plans == compiled.plans
    assert_same(again(batch), torch.from_numpy(compiled(batch)))
    assert again.graph.removed == compiled.graph.removed and again.summary() == compiled.summary()


def test_ways_that_took_equally_long_are_told_in_one_order(compiled):
    plans, reversed_plans = copy.deepcopy(compiled.plans), copy.deepcopy(compiled.plans)
    for made, other in zip(plans["batch"][0].items, reversed_plans["batch"][0].items, strict=True):
        made.seconds = dict.fromkeys(made.seconds, 1e-6)
        other.seconds = dict(reversed(made.seconds.items()))
    assert describe(compiled.graph, plans) == describe(compiled.graph, reversed_plans)


def test_another_machine_makes_its_own_plans(compiled, tmp_path, monkeypatch):
    compiled.save(tmp_path / "net.npz")
    monkeypatch.setattr(engine, "machine_name", lambda: "another")
    planned = []
    monkeypatch.setattr(engine, "make_plans", lambda graph: planned.append(graph) or compiled.plans)
    CompiledNet.load(tmp_path / "net.npz")
    assert len(planned) == 1


@pytest.mark.parametrize("damage", ["cut", "other", "meta"])
def test_a_damaged_file_is_refused(compiled, tmp_path, damage):
    path = tmp_path / "net.npz"
    compiled.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "other":
        np.savez(path, weight=np.zeros(3))
    else:
        content = dict(np.load(path))
        meta = json.loads(content["meta"].tobytes())
        meta["ops"][1]["kind"] = "TorchOp"
        content["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez(path, **content)
    with pytest.raises(NetFileError, match=r"net\.npz"):
        CompiledNet.load(path)


def test_pytorch_functions_fit_no_file(tmp_path):
    net = compile_sparse(nn.Sequential(nn.Linear(4, 3), nn.GELU()).eval(), torch.zeros(1, 4))
    with pytest.raises(storage.NotStorable, match="compile it again"):
        net.save(tmp_path / "net.npz")
    assert not list(tmp_path.iterdir())


def test_what_was_measured_is_remembered(monkeypatch):
    model = network(0.2)
    first = compile_sparse(model, EXAMPLE)
    monkeypatch.setattr(engine, "make_plans", lambda graph: pytest.fail("measured again"))
    assert compile_sparse(model, EXAMPLE).plans == first.plans
    model[0].weight.data += 1
    with pytest.raises(BaseException, match="measured again"):
        compile_sparse(model, EXAMPLE)


def test_a_cache_that_cannot_be_used_costs_time_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VDBENCH_CACHE", str(tmp_path / "file"))
    batch = torch.randn(3, 2, 10, 10)
    with caplog.at_level(logging.WARNING):
        assert_same(compile_sparse(network(), EXAMPLE)(batch), network()(batch).detach())
    assert "not remembered" in caplog.text


def test_the_summary_names_layers_and_times(compiled):
    text = compiled.summary()
    for part in ("one example: ", "batches: ", "conv2d+clip+maxpool2d 0", "linear 9", "8×3×3", "slices", "unread"):
        assert part in text


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(1, 2, 10, 10, dtype=torch.float64), "float32"),
        (np.zeros((1, 2, 10, 10)), "float32"),
        ([[0.0]], "array or a tensor"),
        (torch.zeros(2, 10, 10), r"\(N, 2, 10, 10\), not \(2, 10, 10\)"),
        (torch.zeros(1, 3, 10, 10), r"not \(1, 3, 10, 10\)"),
        (torch.zeros(()), r"not \(\)"),
    ],
)
def test_wrong_batches(compiled, batch, message):
    with pytest.raises((TypeError, ValueError), match=message):
        compiled(batch)


def test_wrong_models():
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        compile_sparse(network().train(), EXAMPLE)
    broken = network()
    broken[7].weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match="7"):
        compile_sparse(broken, EXAMPLE)
    with pytest.raises(ValueError, match="float64"):
        compile_sparse(network().double(), EXAMPLE)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x, twice: bool = False):
        x = self.first(x)
        return self.second(x.relu() if x.sum() > 0 or twice else x)


def test_a_model_that_cannot_be_traced_is_compiled_layer_by_layer(caplog):
    model, batch = Branching().eval(), torch.randn(2, 5, 8)
    with pytest.raises(Untraceable):
        trace(model, batch[0])
    with caplog.at_level(logging.WARNING):
        fast = to_cpu_sparse(model)
        assert_same(fast(batch), model(batch).detach())
    assert "layer by layer" in caplog.text
    assert_same(fast(batch, twice=True), model(batch, twice=True).detach())
    assert isinstance(model.first, nn.Linear)  # the caller's own


def test_the_module_compiles_for_every_shape_once():
    fast = to_cpu_sparse(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
    for size in (5, 6, 5):
        batch = torch.randn(2, 1, size, size)
        assert_same(fast(batch), fast.model(batch).detach())
    assert sorted(fast.nets) == [(1, 5, 5), (1, 6, 6)]
    assert not fast.train().training


def test_rates_of_the_machine():
    rates = machine.calibrate()
    assert rates.keys() == {"fma", "load_l1", "load_l2", "load_l3", "load_memory"} and min(rates.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_networks_of_torchvision(name, monkeypatch):
    import torchvision

    monkeypatch.setattr("vdbench.sparse.plan.SAMPLE_S", 0.0)
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10).eval()
    if name == "vgg16":  # its hundred million fully connected weights would take long and show nothing new
        model.classifier = nn.Sequential(nn.Linear(25088, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 10)).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data *= (torch.rand_like(layer.weight) < 0.02) / 0.15
    net, batch = compile_sparse(model, torch.zeros(1, 3, 32, 32)), torch.randn(17, 3, 32, 32)
    assert_same(net(batch), model(batch).detach())
    assert_same(net(batch[:1]), model(batch[:1]).detach())


def test_the_public_names():
    assert vdbench.compile_sparse is compile_sparse and vdbench.CompiledNet is CompiledNet


def test_damaged_machine_code_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("VDBENCH_CACHE", str(tmp_path))
    jit._address("nothing", lambda code, *arguments: None)
    (path,) = (tmp_path / "kernels").iterdir()
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    jit._address("nothing", lambda code, *arguments: None)
    assert path.read_bytes() == good
