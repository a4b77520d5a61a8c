"""Inference timed side by side: all contenders in one process, interleaved, after their outputs were found equal."""

import itertools
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn
from tqdm import tqdm

from vdbench import metrics, records, synthetic
from vdbench.config import RunSpec, SuiteError
from vdbench.config_timing import Backend, CaseSpec, NetSpec, Timing
from vdbench.job import Job
from vdbench.mistakes import explain
from vdbench.netfile import NetFileError
from vdbench.process import denormals_are_zero, threads_restored
from vdbench.pruning import load_net
from vdbench.records import BackendTiming, Record
from vdbench.sparse.backends import BACKENDS, LANGUAGE_BACKENDS, BackendMissing, Run
from vdbench.sparse.machine import calibrate
from vdbench.sparse.trial import RUN_IN_S
from vdbench.structure import LanguageModel

log = logging.getLogger("vdbench")

TOLERANCE = 1e-4  # of the largest output: float32 sums in another order
WINOGRAD, WINOGRAD_TOLERANCE = ("mnn_dense", "mnn_compacted", "mnn_sparse"), 1e-3  # whose convolutions are less exact
QUIET_S = 0.002
STEPS = (1, 35)  # words of every text in a call of a language model: as in writing, and as in training
WARM_UP_CALLS = 5  # after the first, which may make preparations
SLOW_CALL_S = 0.1  # one call of warm-up will do then, and none before a sample: it runs itself in


class UnequalOutputs(records.RecordError):
    """Two backends disagree on the same net and input, so their times cannot be compared."""


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seconds(run: Run, batch: np.ndarray, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run(batch)
    return (time.perf_counter() - started) / calls


def wait_for_quiet() -> None:
    """Return when this process is idle, after two seconds at the latest: some engines' threads go on spinning after a
    call, MKL's for 200 ms, and the next contender is not to pay for it."""
    for _ in range(1000):
        busy = time.process_time()
        time.sleep(QUIET_S)
        if time.process_time() - busy < QUIET_S / 2:
            return


def interleaved(runs: dict[str, Run], batch: np.ndarray, rounds: int, min_sample_s: float) -> dict[str, list[float]]:
    """`rounds` samples of seconds a call for every contender, taken in turn, after a warm-up, each once all threads of
    the one before are at rest. Before a sample the call is repeated for `RUN_IN_S`, which does not count, unless it is
    slow, and within it until it lasts `min_sample_s`: what is timed is a call among many."""
    once = {}
    for name, run in runs.items():
        once[name] = _seconds(run, batch, 1)
        for _ in range(WARM_UP_CALLS if once[name] < SLOW_CALL_S else 1):
            once[name] = min(once[name], _seconds(run, batch, 1))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wait_for_quiet()
            if once[name] < SLOW_CALL_S:
                _seconds(run, batch, math.ceil(RUN_IN_S / once[name]))
            samples[name].append(_seconds(run, batch, max(1, round(min_sample_s / once[name]))))
    return samples


def check_equal(runs: dict[str, Run], batch: np.ndarray) -> None:
    """Raises UnequalOutputs unless every contender's outputs are those of the first. Ours finds its fastest way at the
    first call, which is this one."""
    reference_name, reference = "", np.empty(0)
    for name, run in runs.items():
        wait_for_quiet()
        outputs = run(batch)
        if not reference_name:
            reference_name, reference = name, outputs
        worst = np.abs(outputs - reference).max() / np.abs(reference).max()
        if not worst <= (WINOGRAD_TOLERANCE if name in WINOGRAD else TOLERANCE):
            raise UnequalOutputs(f"{name} differs from {reference_name} by {worst:.1e} of the largest output")


def _build(
    model: nn.Module, example: np.ndarray, threads: int, names: list[Backend]
) -> tuple[dict[str, Run], dict[str, str]]:
    """The contenders, and why those that are not among them are missing."""
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    backends = LANGUAGE_BACKENDS if isinstance(model, LanguageModel) else BACKENDS
    for name in names:
        try:
            if name not in backends:
                raise BackendMissing("it does not run language models here")
            runs[name] = backends[name](model, example, threads)
        except BackendMissing as error:
            missing[name] = str(error)
            log.warning("%s left out: %s", name, error)
    return runs, missing


def _net(spec: RunSpec | NetSpec, pruned: Path | None) -> tuple[nn.Module, synthetic.Shape | None]:
    """The net and the shape of an example, None of a language model's."""
    if isinstance(spec, CaseSpec):
        return synthetic.build(spec)
    if pruned is None:
        raise SuiteError(f"--pruned: needed for {spec.method}")
    model: Any = load_net(pruned)[0]
    return model, None if isinstance(model, LanguageModel) else model.input_shape


def spec_by_hand(net: str, pruned: Path, timing: Timing) -> NetSpec:
    """What `time_inference` is asked for by hand: a net, under this name, that is what its file says.

    Raises NetFileError.
    """
    meta = load_net(pruned)[1]
    told = {key: meta[key] for key in ("dataset", "model", "method", "seed") if key in meta}
    untold = {"dataset": "", "method": "", "seed": 0}
    try:
        return NetSpec.model_validate({**untold, **told, "experiment": net, "timing": timing})
    except ValidationError as error:
        raise NetFileError(explain(error, str(pruned), NetSpec)) from None


def _batch(model: nn.Module, shape: synthetic.Shape | None, size: int, steps: int) -> np.ndarray:
    """Random images, float32 (size, ...), or words, int64 (steps, size)."""
    generator = np.random.default_rng(0)
    if shape is None:
        return generator.integers(model.output.out_features, size=(steps, size))  # type: ignore[union-attr, arg-type]
    return generator.random((size, *shape), dtype=np.float32)


def time_inference(
    spec: RunSpec | NetSpec, *, suite: str, output: Path | None, pruned: Path | None = None, progress: bool = False
) -> Record:
    """Time a net on every backend, batch size and thread count of `spec.timing`, and write `time.json`.

    A language model is timed with one word of every text in the batch and with `STEPS[-1]`, its state carried on. A
    backend that is not installed is left out, with a line in the record. Threads and samples are recorded, as are the
    work that a net of images asks for and what this machine could do at most.

    Args:
        output: folder of `time.json`; None leaves no file.
        pruned: the net's file; None for one that is not trained.

    Raises:
        SuiteError: the spec has no timing part.
        NetFileError: `pruned` is not a pruned net. UnequalOutputs: backends disagree.
    """
    if spec.timing is None:
        raise SuiteError("--spec: does not say how to time: it lacks 'timing'")
    job = Job("time", spec, suite)
    model, shape = _net(spec, pruned)
    timings: list[BackendTiming] = []
    missing: dict[str, str] = {}
    thread_counts = list(dict.fromkeys(available_cores() if t == "all" else t for t in spec.timing.threads))
    calls = list(itertools.product(spec.timing.batch_sizes, STEPS if shape is None else (1,)))
    settings = list(itertools.product(thread_counts, calls))
    runs: dict[str, Run] = {}
    with threads_restored(), denormals_are_zero(), tqdm(settings, disable=not progress) as bar:
        for threads, (batch_size, steps) in bar:
            batch = _batch(model, shape, batch_size, steps)
            if (batch_size, steps) == calls[0]:
                torch.set_num_threads(threads)
                runs, missing = _build(model, batch, threads, spec.timing.backends)
            if not runs:
                continue
            check_equal(runs, batch)
            samples = interleaved(runs, batch, spec.timing.rounds, spec.timing.min_sample_s)
            setting = {"device": "cpu", "threads": threads, "batch_size": batch_size, "steps": steps}
            timed = [BackendTiming(backend=name, samples_s=taken, **setting) for name, taken in samples.items()]
            timings += timed
            medians = ", ".join(f"{t.backend} {1e6 * np.median(t.samples_s) / t.examples:.1f}" for t in timed)
            log.info("threads %d  batch %s  us an example: %s", threads, timed[0].batch, medians)
    record = job.record(
        device="cpu",
        status="ok",
        timing=timings,
        missing_backends=missing,
        size=metrics.size(model),
        work=None if shape is None else metrics.work(model, torch.zeros(1, *shape)),
        limits=calibrate(),
    )
    if output:
        records.write(record, output / "time.json")
    return record
