"""compile_sparse: any mixture of PyTorch and native code, what is told of it, and models that are refused."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from sparse_net import EXAMPLE, assert_same, network
from torch import nn

import vdbench
from vdbench.conversion import to_variational_dropout
from vdbench.sparse import CompiledNet, compile_sparse, engine, machine, stencil, to_cpu_sparse
from vdbench.sparse.checks import Refused, Untraceable
from vdbench.sparse.compact import compact
from vdbench.sparse.plan import Item, Network, Plan, measure
from vdbench.sparse.running import Runner
from vdbench.sparse.summary import describe
from vdbench.sparse.threads import Pool
from vdbench.sparse.tracing import trace

pytestmark = pytest.mark.usefixtures("engine_cache")


@pytest.mark.parametrize("layers", [[nn.Identity()], [nn.Flatten()], [nn.Dropout(), nn.Flatten()]])
def test_models_that_compute_nothing(layers):
    batch = torch.randn(17, 2, 3)
    for count in (1, 17):
        assert torch.equal(
            compile_sparse(nn.Sequential(*layers).eval(), batch[:1])(batch[:count]),
            nn.Sequential(*layers).eval()(batch[:count]),
        )


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


def test_ways_that_took_equally_long_are_told_in_one_order(compiled):
    plans, reversed_plans = copy.deepcopy(compiled.plans), copy.deepcopy(compiled.plans)
    for made, other in zip(plans["batch"][0].items, reversed_plans["batch"][0].items, strict=True):
        made.seconds = dict.fromkeys(made.seconds, 1e-6)
        other.seconds = dict(reversed(made.seconds.items()))
    assert describe(compiled.graph, plans) == describe(compiled.graph, reversed_plans)


def test_the_summary_names_layers_and_times(compiled):
    text = compiled.summary()
    for part in ("one example: ", "batches: ", "Conv2d+ReLU+MaxPool2d 0", "Linear 9", "8×3×3", "slices", "unread"):
        assert part in text
    assert text.startswith(f"(N, 2, 10, 10) to (N, 3); limit of a thread: {machine.rate('fma'):.0f} GFLOP/s")
    count = int(np.count_nonzero(compiled.graph["7"].weight))
    assert f" {count} of 1,440 ({count / 14.4:.3g} %) " in text  # as many as there were before compaction
    assert max(map(len, text.splitlines())) < 140
    assert repr(compiled).startswith("CompiledNet((N, 2, 10, 10) to (N, 3), ") and repr(compiled).endswith("threads=1)")


def test_the_summary_explains_the_ways_that_occur_alone():
    graph = compact(trace(nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Hardtanh()).eval(), torch.zeros(1, 4)))
    items = [Item("0", {"slices": 1e-6}, True, "slices"), Item("1", {"torch": 1e-6}), Item("2", {"torch": 1e-6})]
    plans = {"single": [Plan(1, items)], "batch": [Plan(64, items)]}
    text = describe(graph, plans)
    assert "slices: a vector" in text and "tile RxL" not in text and "late: " not in text
    assert "Softplus 1" in text and "clamp 2" in text and "12 of 12 (100 %)" in text
    graph.weights.clear()
    assert "12 of" not in describe(graph, plans)


def test_wrong_models():
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        compile_sparse(network().train(), EXAMPLE)
    broken = network()
    broken[7].weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"7\.weight holds NaN"):
        compile_sparse(broken, EXAMPLE)
    with pytest.raises(ValueError, match="float64"):
        compile_sparse(network().double(), EXAMPLE)
    empty = nn.Linear(8, 3)
    empty.weight = nn.Parameter(torch.zeros(0, 8))
    with pytest.raises(TypeError, match=r"the model is a function: give an nn\.Module"):
        compile_sparse(lambda x: x, EXAMPLE)
    with pytest.raises(Untraceable, match="weight has no numbers"):
        compile_sparse(empty.eval(), torch.zeros(1, 8))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiling", [lambda model: compile_sparse(model, torch.zeros(1, 4)), to_cpu_sparse])
def test_wrapped_models(compiling):
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    for scripted in (torch.jit.script(model), torch.jit.freeze(torch.jit.script(model))):
        with pytest.raises(ValueError, match=r"the model is TorchScript.*: give the original module instead"):
            compiling(scripted)
    with pytest.raises(ValueError, match="0 is TorchScript"):
        compiling(nn.Sequential(torch.jit.script(model)).eval())
    wrapped = compiling(nn.DataParallel(model))
    assert not isinstance(getattr(wrapped, "model", model), nn.DataParallel)
    if isinstance(wrapped, CompiledNet):
        assert [type(op).__name__ for op in wrapped.graph.ops] == ["Input", "Linear"]


@pytest.mark.parametrize(("threads", "error"), [(0, ValueError), (-1, ValueError), ("2", TypeError), (1.5, TypeError)])
def test_wrong_numbers_of_threads(threads, error):
    with pytest.raises(error):
        compile_sparse(network(), EXAMPLE, threads=threads)
    with pytest.raises(error):
        to_cpu_sparse(network(), threads=threads)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x, twice: bool = False):
        x = self.first(x)
        return self.second(x.relu() if x.sum() > 0 or twice else x)


def test_a_model_that_cannot_be_traced_is_compiled_layer_by_layer(caplog):
    model, batch = Branching().eval(), torch.randn(2, 5, 8)
    with pytest.raises(Untraceable, match=r"; vdbench\.to_cpu_sparse\(model\) compiles it layer by layer$"):
        compile_sparse(model, batch[0])
    with pytest.raises(Refused) as caught:
        compile_sparse(network(), batch)
    assert "to_cpu_sparse" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        fast = to_cpu_sparse(model)
        assert_same(fast(batch), model(batch).detach())
    assert "layer by layer" in caplog.text and "to_cpu_sparse" not in caplog.text
    assert_same(fast(batch, twice=True), model(batch, twice=True).detach())
    assert isinstance(model.first, nn.Linear)  # the caller's own


def test_a_wrong_batch_does_not_change_how_right_ones_run(caplog):
    fast = to_cpu_sparse(network())
    with pytest.raises(RuntimeError, match="expected input"):
        fast(torch.zeros(2, 3, 10, 10))
    assert_same(fast(EXAMPLE), network()(EXAMPLE).detach())
    assert [*fast.nets] == [tuple(EXAMPLE.shape[1:])]
    one = torch.randn(2, 10, 10)  # by itself, as layers take it
    convolutions = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).eval()
    fast = to_cpu_sparse(convolutions)
    for batch in (one[None], one, one[None]):
        assert_same(fast(batch), convolutions(batch).detach())
    assert [*fast.nets] == [(2, 10, 10)]
    assert not caplog.text


def test_networks_with_nan_are_refused_at_once():
    broken = network()
    broken[7].weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"7\.weight holds NaN"):
        to_cpu_sparse(broken)


def test_copies_do_not_carry_the_tensors_that_pytorch_runs():
    graph = trace(network(), EXAMPLE)
    before = len(pickle.dumps(graph))
    graph(EXAMPLE)
    assert len(pickle.dumps(graph)) == before


@pytest.mark.parametrize("shape", [(4,), (5, 4)])
def test_layers_of_too_many_weights_are_pytorchs(shape, monkeypatch):
    monkeypatch.setattr(stencil, "MOST_TERMS", 15)
    graph = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval(), torch.zeros(1, *shape))
    assert [stencil.stencil(graph[name], graph) is None for name in ("0", "2")] == [True, False]
    assert_same(engine.compiled(graph, 1)(torch.ones(3, *shape)), graph(torch.ones(3, *shape)))


class Pooled(nn.Module):
    """Maxima of numbers that are never negative, over edges and in windows that reach past them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.after = nn.Conv2d(2, 4, 3, 1, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(8, 3, 3)
        self.around, self.past = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.left(x).relu(), self.right(x).clamp(0, 6)], 1)
        return self.after(self.past(self.around(both) + both))


@pytest.mark.parametrize("count", [1, 3, 40])
def test_maxima_over_edges_are_ours_where_nothing_is_negative(count):
    net = Pooled().eval()
    graph = trace(net, EXAMPLE)
    assert all(stencil.stencil(op, graph) for op in graph.ops[1:])
    batch = torch.randn(count, *EXAMPLE.shape[1:])
    for single in (True, False):
        network = Network(graph, single=single)
        plan = measure(network)
        for item in plan.items:
            item.native = True
        assert_same(Runner(network, plan)(batch.numpy(), Pool(1)), net(batch).detach())


def test_a_thread_does_not_wait_for_anothers_example(compiled):
    runner = compiled._runner("single", compiled.plans["single"][0])
    one = runner.shortest(1, Pool(1))
    batch = torch.randn(1, *EXAMPLE.shape[1:])
    with one._lock:
        found = one(batch.numpy())
    assert_same(found, network()(batch).detach())
    assert_same(one(batch.numpy()), network()(batch).detach())


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
