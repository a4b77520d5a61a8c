"""Compiled nets as files, and what is kept in the cache."""

import copy
import functools
import json
import logging
import pickle

import numpy as np
import pytest
import torch
from sparse_net import EXAMPLE, assert_same, network
from torch import nn

from vdbench.netfile import NetFileError
from vdbench.sparse import CompiledNet, compile_sparse, engine, jit, storage
from vdbench.sparse.graph import Affine, Conv2d, Expand, Graph, Input, Linear, LinearAtPlaces

pytestmark = pytest.mark.usefixtures("engine_cache")


def test_files(compiled, tmp_path, monkeypatch):
    compiled.save(tmp_path / "net.npz")
    monkeypatch.setattr(engine, "make_plans", lambda graph: pytest.fail("planned again on the same machine"))
    again = CompiledNet.load(tmp_path / "net.npz", threads=1)
    batch = np.random.default_rng(0).standard_normal((20, 2, 10, 10), np.float32)
    assert again.plans == compiled.plans
    assert_same(again(batch), torch.from_numpy(compiled(batch)))
    assert again.graph.removed == compiled.graph.removed and again.summary() == compiled.summary()


@pytest.mark.parametrize("untold", ["how many weights there were", "in which shape the input is read"])
def test_files_of_before_that_do_not_tell_all(compiled, tmp_path, untold):
    path = tmp_path / "net.npz"
    compiled.save(path)
    content = dict(np.load(path))
    meta = json.loads(content["meta"].tobytes())
    if untold == "how many weights there were":
        assert meta.pop("weights") == compiled.graph.weights
    else:
        assert meta["ops"][0].pop("given", "missing") is None
    content["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(path, **content)
    batch = np.ones((2, 2, 10, 10), np.float32)
    assert_same(CompiledNet.load(path)(batch), torch.from_numpy(compiled(batch)))


@pytest.mark.parametrize(
    ("place", "name", "other"),
    [(engine, "machine_name", lambda: "another"), (engine, "PLAN_VERSION", 0), (torch, "__version__", "0.1")],
)
def test_what_was_measured_with_something_else_is_measured_once(compiled, tmp_path, monkeypatch, place, name, other):
    monkeypatch.setenv("VDBENCH_CACHE", str(tmp_path / "cache"))
    compiled.save(tmp_path / "net.npz")
    monkeypatch.setattr(place, name, other)
    made = []
    monkeypatch.setattr(engine, "make_plans", lambda graph: made.append(graph) or compiled.plans)
    for _ in range(2):
        CompiledNet.load(tmp_path / "net.npz")
    assert len(made) == 1


def test_files_of_before_are_measured_again(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("VDBENCH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "net.npz"
    compiled.save(path)
    content = dict(np.load(path))
    meta = json.loads(content["meta"].tobytes())
    meta["machine"] = meta.pop("measured_with")
    for plan in (*meta["plans"]["single"], *meta["plans"]["batch"]):
        del plan["more_s"]
    content["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(path, **content)
    monkeypatch.setattr(engine, "make_plans", lambda graph: compiled.plans)
    assert CompiledNet.load(path).plans == compiled.plans


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


ONES = functools.partial(np.ones, dtype=np.float32)


@pytest.mark.parametrize(
    ("kind", "given", "fields"),
    [
        (Linear, (4,), {"weight": ONES((9, 4)), "bias": ONES(1)}),
        (Conv2d, (1, 2, 2), {"weight": ONES((9, 1, 1, 1)), "bias": ONES((9, 1, 1))}),
        (LinearAtPlaces, (1, 2, 2), {"weight": ONES((9, 1, 3, 3)), "bias": ONES(9)}),
        (Affine, (1, 2, 2), {"scale": ONES(9), "shift": ONES(9)}),
        (Expand, (1, 1, 1), {}),
    ],
)
def test_files_whose_kernels_would_read_more_than_there_is_are_refused(kind, given, fields, tmp_path):
    layer = kind(name="layer", inputs=("input",), shape=(9, *given[1:]), **fields)
    storage.save(tmp_path / "net.npz", Graph((Input(name="input", shape=given), layer)), {}, "")
    with pytest.raises(NetFileError, match=r"layer reads more than there is|mat1 and mat2"):
        storage.load(tmp_path / "net.npz", "")


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["items"].pop(),
        lambda plan: plan["items"].append(plan["items"][0]),
        lambda plan: plan.update(examples=0),
        lambda plan: plan.update(seconds=None),
        lambda plan: plan["items"][0].update(seconds={}),
        lambda plan: plan["items"][0].update(seconds={"torch": "x"}),
    ],
)
def test_plans_of_something_else_are_refused_and_made_anew(compiled, tmp_path, monkeypatch, change):
    path, plans = tmp_path / "net.npz", storage.plans_to_json(compiled.plans)
    change(plans["batch"][0])
    monkeypatch.setattr(storage, "plans_to_json", lambda _: plans)
    compiled.save(path)
    with pytest.raises(NetFileError, match=r"net\.npz"):
        CompiledNet.load(path)
    monkeypatch.setenv("VDBENCH_CACHE", str(tmp_path / "cache"))
    made = []
    monkeypatch.setattr(engine, "make_plans", lambda graph: made.append(graph) or compiled.plans)
    for _ in range(2):  # what is remembered is of no use
        assert engine.planned(compiled.graph) == compiled.plans
    assert len(made) == 2


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies(compiled, clone):
    batch = torch.randn(20, 2, 10, 10)
    assert_same(clone(compiled)(batch), compiled(batch))


def test_smooth_functions_fit_a_file(tmp_path):
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3), nn.LogSoftmax(1)).eval()
    net, batch = compile_sparse(model, torch.zeros(1, 4)), torch.randn(20, 4)
    net.save(tmp_path / "net.npz")
    assert_same(CompiledNet.load(tmp_path / "net.npz")(batch), model(batch))


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(30, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(30, 32), nn.Unflatten(1, (2, 4, 4)), nn.ZeroPad2d(1), nn.MaxPool2d(2)),
    ],
)
def test_shapes_and_zeros_around_maps_fit_a_file(tmp_path, net):
    batch = torch.randn(3, 6, 5)
    compiled = compile_sparse(net.eval(), batch)
    compiled.save(tmp_path / "net.npz")
    assert_same(CompiledNet.load(tmp_path / "net.npz")(batch), net(batch).detach())


def test_pytorch_functions_fit_no_file(tmp_path):
    net = compile_sparse(nn.Sequential(nn.Linear(4, 3), nn.Softplus()).eval(), torch.zeros(1, 4))
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


def test_damaged_machine_code_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("VDBENCH_CACHE", str(tmp_path))
    jit._address("nothing", lambda code, *arguments: None)
    (path,) = (tmp_path / "kernels").iterdir()
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    jit._address("nothing", lambda code, *arguments: None)
    assert path.read_bytes() == good
