"""Pruned language models word by word and in batches: the sparse model against torch, dense and CSR, and onnxruntime.

200-unit LSTMs, one that is shipped, of which `results/recorded/ptb` has times too, and some with random masks.
Contenders take turns, on one thread, after their logits were found equal. Medians are printed and stored in
`extra_info`. Nothing is asserted of times.
"""

import contextlib
import statistics
import time

import numpy as np
import pytest
import torch

from vdbench import metrics, shipping
from vdbench.baselines import GradualPruner
from vdbench.models import MODELS
from vdbench.sparse.backends import LANGUAGE_BACKENDS, BackendMissing

WORDS, ROUNDS = 10_000, 21
SHIPPED = "lstm200-ptb-more-divergence-vd_finetune"


def pruned(density: float | str) -> torch.nn.Module:
    if isinstance(density, str):
        return shipping.load(density)
    torch.manual_seed(0)
    net = MODELS["rnnlm_lstm_200"](WORDS).eval()
    kept = {layer.name: round(density * layer.total) for layer in metrics.layers(net)}
    GradualPruner(net, kept).update(1.0)
    return net


@pytest.mark.benchmark(group="language model inference")
@pytest.mark.parametrize("density", [SHIPPED, 0.1, 0.04])
@pytest.mark.parametrize(("steps", "sequences"), [(1, 1), (1, 64), (35, 1), (35, 64)])
def test_language_inference(benchmark, density, steps, sequences, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net = pruned(density)
    words = np.random.default_rng(0).integers(WORDS, size=(steps, sequences))
    runs = {}
    for name, build in LANGUAGE_BACKENDS.items():
        with contextlib.suppress(BackendMissing):
            runs[name] = build(net, words, 1)
    expected = runs["torch_dense"](words)
    for name, run in runs.items():
        if name != "torch_dense":  # which has read on
            np.testing.assert_allclose(run(words), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    fast = runs.pop("vdbench")
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def others_first() -> None:
        for name, taken in seconds.items():
            started = time.perf_counter()
            runs[name](words)
            taken.append(time.perf_counter() - started)

    benchmark.pedantic(lambda: fast(words), setup=others_first, rounds=ROUNDS)
    torch.set_num_threads(threads)
    medians = {"vdbench": benchmark.stats.stats.median} | {n: statistics.median(taken) for n, taken in seconds.items()}
    benchmark.extra_info.update(medians)
    shown = ", ".join(f"{name} {1e3 * median:.3g} ms" for name, median in medians.items())
    with capsys.disabled():
        print(f"\n{100 - 100 * metrics.sparsity(net):.3g} % of the weights, {steps} x {sequences} words: {shown}")
