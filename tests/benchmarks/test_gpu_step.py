"""What a step of a variational VGG-like net costs on a GPU, in steps of the same net without it, and its memory.

Target: 2.0 dense steps at batch 100, both as `training` takes them there: bfloat16 by autocast, channels_last, captured
in a CUDA graph. Beside them both nets step by step, kernel by kernel. Contenders take their steps in turn; ratios are
of median times between CUDA events. Nothing is asserted of times.
"""

import statistics

import pytest
import torch
from torch.nn import functional

from vdbench.config import DenseRecipe, VariationalRecipe
from vdbench.conversion import to_variational_dropout
from vdbench.models import VGGLike, set_dropout
from vdbench.steps import Step, build_optimizer

TARGET, BATCH, NUM_EXAMPLES = 2.0, 100, 50_000
WARM_UP, ROUNDS, STEPS = 5, 15, 20


def step_of(width: float, variational: bool) -> Step:
    torch.manual_seed(0)
    net = VGGLike(width=width)
    set_dropout(net, 0.0)
    recipe = (VariationalRecipe if variational else DenseRecipe)(epochs=1)
    if variational:
        to_variational_dropout(net)
    net = net.to("cuda", memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    step = Step(net, build_optimizer(net, recipe), recipe, functional.cross_entropy, variational)
    step.kl_scale.fill_(1 / NUM_EXAMPLES)
    return step


def milliseconds(take, images, labels) -> float:
    """Of one step, the mean over some."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(STEPS):
        take(images, labels)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / STEPS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.benchmark(group="VGG-like training step on a GPU")
@pytest.mark.parametrize("width", [0.25, 0.5, 1.0, 1.5])
def test_variational_step_on_a_gpu(benchmark, width, capsys):
    images = torch.randn(BATCH, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,), device="cuda")
    steps, memory = {}, {}
    for kind in ("dense", "variational"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = step_of(width, kind == "variational")
        step.take((images,), labels)
        memory[kind] = (torch.cuda.max_memory_allocated() - before) / 2**20
        steps[f"{kind}, one by one"] = step.take
        steps[kind] = step_of(width, kind == "variational")
    for take in list(steps.values()) * WARM_UP:
        take((images,), labels)
    taken = {kind: [] for kind in steps}

    def others() -> None:
        for kind, take in steps.items():
            taken[kind].append(milliseconds(take, (images,), labels))

    benchmark.pedantic(others, rounds=ROUNDS)
    times = {kind: statistics.median(samples) for kind, samples in taken.items()}
    ratio = times["variational"] / times["dense"]
    benchmark.extra_info.update(
        {"ratio": ratio, "target": TARGET, "milliseconds": times, "MB": memory, "gpu": torch.cuda.get_device_name()}
    )
    with capsys.disabled():
        print(f"\nwidth {width}: " + "; ".join(f"{kind} {value:.2f} ms" for kind, value in times.items()))
        print(
            f"variational {ratio:.2f} dense steps (target {TARGET}); memory {memory['variational']:.0f} MB over "
            f"{memory['dense']:.0f} MB, {memory['variational'] / memory['dense']:.2f} times"
        )
