"""What inference with a pruned net costs on every backend, in calls of dense PyTorch taken in turn with it.

One thread; the nets have 1 % of their weights left, drawn at random. Nothing is asserted of times.
"""

import statistics
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from vdbench import metrics
from vdbench.baselines import GradualPruner
from vdbench.models import MODELS
from vdbench.sparse.backends import BACKENDS, BackendMissing
from vdbench.timing import check_equal

WARM_UP, ROUNDS = 20, 100
SHAPES = {"lenet300100": (1, 28, 28), "lenet5": (1, 28, 28), "feed-forward": (35, 256)}  # the last on 35 words
NETS = {name: lambda name=name: MODELS[name](10) for name in ("lenet300100", "lenet5")}
NETS["feed-forward"] = lambda: nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))


@pytest.fixture
def net(model: str) -> Iterator[torch.nn.Module]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = NETS[model]().eval()
    kept = {layer.name: layer.total // 100 for layer in metrics.layers(made)}
    GradualPruner(made, kept, torch.Generator().manual_seed(0)).update(1.0)
    yield made
    torch.set_num_threads(threads)


@pytest.mark.benchmark(group="inference")
@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch_dense"])
@pytest.mark.parametrize("model", NETS)
def test_inference(benchmark, net, model, backend, batch_size, capsys):
    batch = np.random.default_rng(0).random((batch_size, *SHAPES[model]), dtype=np.float32)
    dense = BACKENDS["torch_dense"](net, batch, 1)
    try:
        run = BACKENDS[backend](net, batch, 1)
    except BackendMissing as error:
        pytest.skip(str(error))
    check_equal({"torch_dense": dense, backend: run}, batch)
    for each in [dense, run] * WARM_UP:
        each(batch)
    seconds: list[float] = []

    def dense_first() -> None:
        started = time.perf_counter()
        dense(batch)
        seconds.append(time.perf_counter() - started)

    benchmark.pedantic(run, args=(batch,), setup=dense_first, rounds=ROUNDS)
    speedup = statistics.median(seconds) / statistics.median(benchmark.stats.stats.data)
    benchmark.extra_info["speedup"] = round(speedup, 2)
    with capsys.disabled():
        print(f"\n{model} batch {batch_size}: {backend} {speedup:.2f} times as fast as dense PyTorch")
