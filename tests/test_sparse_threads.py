"""Threads of the sparse engine: those it has itself, those that call it, and forks."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from sparse_net import EXAMPLE, assert_same, network
from torch import nn

from vdbench.sparse import CompiledNet, compile_sparse, jit
from vdbench.sparse.plan import Network
from vdbench.sparse.program import _shares
from vdbench.sparse.threads import Pool, checked_threads
from vdbench.sparse.tracing import trace

pytestmark = pytest.mark.usefixtures("engine_cache")


@pytest.fixture
def together(monkeypatch):
    """Threads share the channels of every block."""
    monkeypatch.setattr("vdbench.sparse.threads.WORTH_A_THREAD_S", 1e-9)
    ways = CompiledNet._ways
    monkeypatch.setattr(CompiledNet, "_ways", lambda *args: [way for way in ways(*args) if way.keywords["together"]])


def in_a_fork(holds: Callable[[], bool]) -> bool:
    """Whether it does there, in a minute at most."""
    child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            os._exit(0 if holds() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr("vdbench.sparse.threads.WORTH_A_THREAD_S", 1e-9)
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
        assert in_a_fork(lambda: torch.equal(net(batch), expected) and len(net(batch[:1])) == 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_a_fork_calls_what_another_thread_was_calling():
    net, example = compile_sparse(nn.Linear(7, 5).eval(), torch.zeros(1, 7), threads=1), torch.randn(1, 7)
    expected, called, forked = net(example), threading.Event(), threading.Event()

    def call():
        with net._single._one._lock:
            called.set()
            forked.wait()

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    called.wait()
    assert in_a_fork(lambda: torch.equal(net(example), expected))
    forked.set()
    caller.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_a_fork_waits_for_what_another_thread_compiles():
    started, compiled = threading.Event(), threading.Event()

    def compiles():
        with jit.COMPILING:
            started.set()
            time.sleep(0.2)
            compiled.set()

    thread = threading.Thread(target=compiles)
    thread.start()
    started.wait()
    assert in_a_fork(
        lambda: compiled.is_set() and compile_sparse(nn.Linear(7, 5).eval(), torch.zeros(1, 7)) is not None
    )
    thread.join()


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


def test_as_many_threads_as_told_or_as_pytorch_has(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert (checked_threads(None), checked_threads(3), Pool(None).threads, Pool(3).threads) == (5, 3, 5, 3)
