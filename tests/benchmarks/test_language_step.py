"""What a training step of a variational language model costs, in steps of the same net without it, and its memory.

Targets: 1.3 dense steps and 2.5 times the memory for LSTMs of 200 and of 650 units over 10,000 words, 20 sequences of
35 words. The dense step is once that of `training`, whose cross-entropy is the fused one, and once with torch's.
Matrices are multiplied in float32 and, as in the recorded recipes, in bfloat16, by which dense steps gain more.
Contenders take their steps in turn, on one thread; ratios are of median processor time. Nothing is asserted of times.
"""

import multiprocessing
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from vdbench import outputs
from vdbench.config import DenseRecipe, VariationalRecipe
from vdbench.conversion import to_variational_dropout
from vdbench.cross_entropy import cross_entropy
from vdbench.models import MODELS
from vdbench.process import matmul_precision
from vdbench.steps import build_optimizer
from vdbench.variational import forward_with_kl

TARGET, MEMORY_TARGET = 1.3, 2.5
WORDS, LENGTH, SEQUENCES, EXAMPLES = 10_000, 35, 20, 929_589
WARM_UP, ROUNDS = 3, 15


def step_of(model: str, variational: bool, cross_entropy=cross_entropy, words: int = WORDS):
    """A training step, as `training` takes it, that returns the loss."""
    torch.manual_seed(0)
    net = MODELS[model](words)
    inputs, targets = torch.randint(words, (2, LENGTH, SEQUENCES))
    if variational:
        to_variational_dropout(net, initial_log_sigma2=-6.0)
    optimizer = build_optimizer(net, (VariationalRecipe if variational else DenseRecipe)(epochs=1))

    def step() -> float:
        (logits, _), kl = forward_with_kl(net, inputs) if variational else (net(inputs), 0.0)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten()) + kl / EXAMPLES
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def memory_of_steps(model: str, precision: str | None, variational: bool | None, answer) -> None:
    """Peak memory of a process that takes three steps, or none."""
    torch.set_num_threads(1)
    for kind in (False, True):  # what is loaded or compiled at the first step is not a step's
        step_of("rnnlm_tanh_200", kind, words=16)()
    if variational is not None:
        step = step_of(model, variational)
        with matmul_precision(precision):
            for _ in range(3):
                step()
    status = Path("/proc/self/status").read_text()  # what getrusage says is the parent's where that was larger
    answer.put(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def peak(model: str, precision: str | None, variational: bool | None) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=memory_of_steps, args=(model, precision, variational, answer))
    process.start()
    found = answer.get(timeout=300)
    process.join()
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.benchmark(group="language model training step", timer=time.process_time)
@pytest.mark.parametrize("precision", [None, "medium"])
@pytest.mark.parametrize("model", ["rnnlm_lstm_200", "rnnlm_lstm"])
def test_variational_step(benchmark, model, precision, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with torch.random.fork_rng(), matmul_precision(precision):
        variational = step_of(model, True)
        dense = {"ours": step_of(model, False), "torch's": step_of(model, False, functional.cross_entropy)}
        for step in (*dense.values(), variational) * WARM_UP:
            assert step() < 100
        taken: dict[str, list[float]] = {name: [] for name in dense}

        def dense_first() -> None:
            for name, step in dense.items():
                started = time.process_time()
                step()
                taken[name].append(time.process_time() - started)

        benchmark.pedantic(variational, setup=dense_first, rounds=ROUNDS)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    times = {name: statistics.median(samples) for name, samples in taken.items()}
    ratios = {name: statistics.median(benchmark.stats.stats.data) / seconds for name, seconds in times.items()}
    start, plain, noisy = (peak(model, precision, kind) for kind in (None, False, True))
    memory = (noisy - start) / (plain - start)
    net = outputs.MODELS[model] + (", in bfloat16" if precision else "")
    found = {"variational": ratios["ours"], "with torch's cross-entropy": ratios["torch's"], "target": TARGET}
    found |= {"memory": memory, "memory_target": MEMORY_TARGET}
    benchmark.extra_info.update({"net": net} | found)
    with capsys.disabled():
        for name, ratio in ratios.items():
            print(
                f"\n{net}, cross-entropy {name}: dense step {1e3 * times[name]:.0f} ms; variational {ratio:.2f} of it"
            )
        print(
            f"target {TARGET}; memory {noisy - start:.0f} MB over {plain - start:.0f} MB, {memory:.2f} times (target "
            f"{MEMORY_TARGET})"
        )
