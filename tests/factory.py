"""Synthetic suites, records and result folders: numbers invented, shapes and files as real runs leave them."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vdbench import config_timing, metrics, netfile, records
from vdbench.config import VARIATIONAL_METHODS, VGG_WIDTHS, Suite, parse_suite, spec_sha256
from vdbench.models import VGGLike
from vdbench.records import (
    BackendTiming,
    Control,
    CurvePoint,
    Layer,
    LayerHistogram,
    MultiplyAdds,
    Provenance,
    Record,
    Size,
    Work,
)
from vdbench.stages import stage_versions

HERE = "this machine"
SHAPES = {
    "lenet300100": {"fc1": [300, 784], "fc2": [100, 300], "fc3": [10, 100]},
    "lenet5": {"conv1": [20, 1, 5, 5], "conv2": [50, 20, 5, 5], "fc1": [500, 800], "fc2": [10, 500]},
    "rnnlm_lstm_onehot": {"rnn.weight_ih_l0": [1024, 10000], "rnn.weight_hh_l0": [1024, 256], "output": [10000, 256]},
    "rnnlm_lstm_200": {"embedding": [2000, 200], "rnn.weight_ih_l0": [800, 200], "output": [2000, 200]},
}
for _name, _width in VGG_WIDTHS.items():
    with torch.device("meta"):
        _layers_of = metrics.weights(VGGLike(width=_width))
    SHAPES[_name] = {layer: list(weight.shape) for layer, weight in _layers_of.items()}
MULTIPLY_ADDS = {"lenet300100": 266_200, "lenet5": 2_293_000, "rnnlm_lstm_200": 720_000}
MULTIPLY_ADDS |= dict.fromkeys(VGG_WIDTHS, 313_000_000)
ERRORS = {"dense": 1.64, "vd_finetune": 1.80, "vd_warmup": 1.90, "magnitude": 2.30, "random": 9.0}
RECIPE = {"epochs": 4}
METHODS = {
    "dense": RECIPE,
    "vd_finetune": RECIPE,
    "vd_warmup": RECIPE | {"kl_warmup_epochs": 2},
    "magnitude": RECIPE | {"prune_epochs": 2},
    "random": RECIPE | {"prune_epochs": 2},
}


def experiment(model: str = "lenet300100", **changes: Any) -> dict[str, Any]:
    """One experiment as a suite file writes it: all methods, three seeds, one method timed."""
    base = {"dataset": "mnist", "model": model, "seeds": [0, 1, 2], "timed": ["vd_warmup"], "methods": METHODS}
    return base | changes


def suite(**experiments: dict[str, Any]) -> Suite:
    """A suite of these experiments; LeNet-300-100 on MNIST without any."""
    content = {"suite": "synthetic", "experiments": experiments or {"fc": experiment()}}
    return parse_suite(content, "synthetic suite")


def untrained_suite(**timing: Any) -> Suite:
    """A suite of one net and two layers, over densities, that are timed without having been trained."""
    densities = [1, 0.3, 0.1, 0.02]
    synthetic = {
        "nets": {"net": {"model": "lenet300100", "densities": {"fc1": 0.01, "fc2": 0.02, "fc3": 0.5}}},
        "convolutions": {"conv": {"channels": 64, "size": 16, "densities": densities}},
        "linear": {"line": {"inputs": 784, "outputs": 300, "densities": densities, "batch_sizes": [1, 16, 64, 256]}},
    }
    content = {"suite": "untrained", "timing": {"rounds": 5, "threads": [1, 2]} | timing, "synthetic": synthetic}
    return parse_suite(content, "synthetic suite")


def record(suite: Suite, name: str, method: str, seed: int, stage: str = "prune", **changes: Any) -> Record:
    """A current record of one run; `changes` replace fields, and `metrics` and `compression` are shorthands."""
    e = suite.experiments[name]
    rng = np.random.default_rng([seed, len(name), sum(map(ord, method + stage))])
    error = ERRORS[method] * (0.45 if e.model == "lenet5" else 1) + rng.normal(0, 0.05)
    ratio = changes.pop("compression", 1.0 if method == "dense" else rng.normal(100, 5))
    layers = _layers(e.model, ratio)
    total, nonzero = sum(layer.total for layer in layers), sum(layer.nonzero for layer in layers)
    spec = suite.spec_of(stage, name, method, seed)  # type: ignore[arg-type]
    values: dict[str, Any] = {
        "suite": suite.suite,
        "experiment": name,
        "dataset": e.dataset,
        "model": e.model,
        "method": method,
        "stage": stage,
        "seed": seed,
        "spec": spec,
        "spec_sha256": spec_sha256(spec),
        "versions": stage_versions(stage, method),
        "code_digest": "0123456789abcdef",
        "status": "ok",
        "metrics": {"error": error, "top5_error": error / 10, "cross_entropy": error / 20},
        "wall_s": 100.0 + seed,
        "peak_rss_mb": 400.0,
        "provenance": provenance(),
    }
    if stage == "train":
        values |= {"history": "history.csv"}
    if stage == "prune":
        left = int(MULTIPLY_ADDS[e.model] / max(1.0, ratio / 10))
        values |= {
            "size": Size(
                weights=total,
                nonzero_weights=nonzero,
                biases=410,
                sparsity=1 - nonzero / total,
                compression_ratio=total / nonzero,
            ),
            "layers": layers,
            "multiply_adds": MultiplyAdds(
                dense=MULTIPLY_ADDS[e.model], left=left, theoretical_speedup=MULTIPLY_ADDS[e.model] / left
            ),
            "threshold": e.threshold,
            "control": None if method == "dense" else Control(error=1.64, weights_sha256="0" * 64),
        }
        if method in VARIATIONAL_METHODS:
            values |= {"curve": _curve(error, ratio), "log_alpha_histogram": _histograms(layers, rng)}
    if stage == "time":
        values |= {"timing": timings(suite.timing, rng)}
    return Record(**values | changes)


def untrained_record(suite: Suite, name: str, method: str, **changes: Any) -> Record:
    """A current record of the timing of a net or layer that is not trained."""
    spec = suite.spec_of("time", name, method, 0)
    density = min(spec["densities"].values())
    rng = np.random.default_rng([len(name), sum(map(ord, method))])
    weights = 300 * 784
    nonzero = round(weights * density)
    values: dict[str, Any] = {
        "suite": suite.suite,
        "experiment": name,
        "dataset": "random",
        "model": spec["model"],
        "method": method,
        "stage": "time",
        "seed": 0,
        "spec": spec,
        "spec_sha256": spec_sha256(spec),
        "versions": stage_versions("time", method),
        "code_digest": "0123456789abcdef",
        "status": "ok",
        "timing": timings(config_timing.Timing.model_validate(spec["timing"]), rng, density),
        "size": Size(
            weights=weights, nonzero_weights=nonzero, biases=300, sparsity=1 - density, compression_ratio=1 / density
        ),
        "work": Work(multiply_adds=nonzero, values=1084, weights=nonzero),
        "limits": {"fma": 230.0, "load_l1": 190.0, "load_l2": 100.0, "load_l3": 54.0, "load_memory": 9.0},
        "wall_s": 20.0,
        "peak_rss_mb": 400.0,
        "provenance": provenance(),
    }
    return Record(**values | changes)


def provenance() -> Provenance:
    return Provenance(
        git_commit="0" * 40,
        git_dirty=False,
        versions={"python": "3.11.9", "torch": "2.9.0"},
        device="cpu",
        cpu="Some CPU 9000",
        threads=1,
        deterministic=True,
        started_at="2026-01-01T00:00:00+00:00",
        command="vdbench train",
    )


def all_records(suite: Suite, **changes: Any) -> list[Record]:
    """Every record that the suite asks for."""
    made = [record(suite, *run, stage=stage, **changes) for stage in ("train", "prune") for run in suite.runs()]
    made += [record(suite, *run, stage="time", **changes) for run in suite.timed_runs()]
    return made + [
        untrained_record(suite, name, method, **changes)
        for name, case in suite.cases().items()
        for method in case.nets()
    ]


def write_results(folder: Path, suite: Suite, made: list[Record]) -> None:
    """The records, histories and pruned nets where a suite's jobs leave them."""
    for item in made:
        place = records.run_folder(folder, *item.run)
        records.write(item, place / f"{item.stage}.json")
        if item.stage == "train":
            write_history(place / "history.csv", item)
        if item.stage == "prune":
            arrays = pruned_arrays(item)
            weights = {name: arrays.pop(name) for name in list(arrays) if name.endswith(".weight")}
            netfile.write_arrays(place / "pruned.npz", weights, arrays, {})


def write_history(path: Path, train: Record, epochs: int = 60) -> None:
    """A training as it usually goes: error and KL fall, sparsity rises layer by layer."""
    rng = np.random.default_rng(train.seed)
    shapes = SHAPES[train.model]
    columns = ["epoch", "learning_rate", "kl_weight", "loss", "class_loss", "kl", "error", "sparsity"]
    columns += ["compression_ratio", "seconds", *[f"sparsity:{layer}" for layer in shapes]]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for epoch in range(1, epochs + 1):
            error = train.metrics["error"] + 6 * math.exp(-epoch / 4) + rng.normal(0, 0.03)
            kl = (2e6 * math.exp(-epoch / 5) + 2e4) if train.method in VARIATIONAL_METHODS else 0.0
            grown = 0.0 if train.method == "dense" else 1 - math.exp(-epoch / 6)
            layers = [grown * (0.99 - 0.12 * i) + rng.normal(0, 0.002) * (grown > 0) for i in range(len(shapes))]
            sparsity = float(np.mean(layers))
            row = [epoch, 1e-3, min(1, epoch / 10), 0.1 + error / 20, error / 20, kl, error, sparsity]
            writer.writerow([*row, 1 / (1 - sparsity), 4.0, *layers])


def pruned_arrays(item: Record) -> dict[str, np.ndarray]:
    """Weights and biases by parameter name: most in the middle of the image are left."""
    rng = np.random.default_rng(item.seed)
    arrays = {}
    for name, shape in SHAPES[item.model].items():
        weight = rng.normal(0, 0.1, shape).astype(np.float32)
        if item.method != "dense":
            centre = np.linspace(-1, 1, shape[-1] if len(shape) == 4 else 28)
            window = np.exp(-4 * (centre[:, None] ** 2 + centre[None, :] ** 2))
            keep = window if len(shape) == 4 else window.reshape(1, -1) if shape[-1] == 784 else 0.3
            weight = np.where(rng.random(shape) < 0.4 * keep, weight, 0).astype(np.float32)
        arrays |= {f"{name}.weight": weight, f"{name}.bias": np.zeros(shape[0], np.float32)}
    return arrays


SPEED = {"torch_dense": 1.0, "torch_channels_last": 1.2, "onnxruntime": 1.8, "openvino": 1.6, "mnn_dense": 1.4}
SPARSE_SPEED = {"vdbench": 30.0, "mnn_sparse": 6.0, "scipy_csr": 3.0, "torch_csr": 0.6, "sparse_dot_mkl": 2.0}
SPARSE_SPEED |= {"torch_compacted": 1.5, "onnxruntime_compacted": 2.5, "openvino_compacted": 2.2, "mnn_compacted": 1.9}
SPARSE_SPEED |= {"im2col_scipy": 0.8}


def timings(settings: config_timing.Timing, rng: np.random.Generator, density: float = 0.05) -> list[BackendTiming]:
    """Interleaved samples: what slows one backend in a round slows all of them."""
    speed = SPEED | {backend: factor * 0.05 / density for backend, factor in SPARSE_SPEED.items()}
    made = []
    for threads in (1, 2):
        for batch in settings.batch_sizes:
            load = rng.uniform(1, 2, settings.rounds)
            for backend in settings.backends:
                factor = speed[backend] * (1 + 0.3 * math.log10(batch)) / threads**0.5
                samples = 2e-5 * batch**0.7 * load * rng.normal(1, 0.02, len(load)) / factor
                made.append(
                    BackendTiming(
                        backend=backend, device="cpu", threads=threads, batch_size=batch, samples_s=list(samples)
                    )
                )
    return made


def _layers(model: str, ratio: float) -> list[Layer]:
    layers = []
    for name, shape in SHAPES[model].items():
        total = math.prod(shape)
        nonzero = max(1, round(total / ratio))
        layers.append(Layer(name=name, shape=shape, total=total, nonzero=nonzero, sparsity=1 - nonzero / total))
    return layers


def _curve(error: float, ratio: float) -> list[CurvePoint]:
    points = []
    for threshold in (-4.0, -2.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0):
        here = max(1.0, ratio * math.exp(0.25 * (threshold - 3)))
        bad = error + (max(0.0, threshold - 4) ** 3) * 1.5
        points.append(
            CurvePoint(threshold=threshold, sparsity=1 - 1 / here, compression_ratio=here, error=min(bad, 90.0))
        )
    return points


def _histograms(layers: list[Layer], rng: np.random.Generator) -> list[LayerHistogram]:
    histograms = []
    for layer in layers:
        size = min(layer.total, 20_000)
        kept = max(1, int(size * (1 - layer.sparsity)))
        values = np.concatenate([rng.normal(-1.5, 1.8, kept), rng.normal(6, 1, size - kept)])
        counts = np.histogram(np.clip(values, -8, 8), bins=64, range=(-8, 8))[0]
        histograms.append(LayerHistogram(name=layer.name, counts=[int(count) for count in counts]))
    return histograms
