"""From trained weights to a pruned net: masks at the threshold, evaluation, the trade-off over thresholds."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vdbench import metrics, netfile, records, tasks
from vdbench.batchnorm import reestimate
from vdbench.config import VARIATIONAL_METHODS, RunSpec, spec_sha256
from vdbench.data import Dataset
from vdbench.job import Job
from vdbench.mistakes import first_line
from vdbench.models import MODELS
from vdbench.process import full_precision
from vdbench.records import Control, CurvePoint, LayerHistogram, Record, Words
from vdbench.structure import LanguageModel, structure, told_words
from vdbench.tensors import load_state, state_sha256
from vdbench.text import Text
from vdbench.training import build_model, pick_device
from vdbench.variational import LOG_ALPHA_CLIP, variational_layers, variational_matrices

CURVE_THRESHOLDS = (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
HISTOGRAM_BINS = 64


def pruned_state(model: nn.Module) -> dict[str, Tensor]:
    """A state dict of the plain net: weights masked, log_sigma2 gone."""
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("log_sigma2")}
    for name, weight in metrics.weights(model).items():
        state[netfile.parameter_name(name)] = weight + 0.0  # a removed negative weight is -0.0, a file's 0.0
    return state


def save_net(path: Path, model: nn.Module, meta: dict[str, object]) -> None:
    """Write a trained net's masked weights to a pruned-net file (see `netfile`)."""
    sparse = set(map(netfile.parameter_name, metrics.weights(model)))
    arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in pruned_state(model).items()}
    weights = {name: array for name, array in arrays.items() if name in sparse}
    netfile.write_arrays(path, weights, {n: a for n, a in arrays.items() if n not in sparse}, dict(meta))


def load_net(path: Path) -> tuple[nn.Module, dict[str, object]]:
    """The plain net of a pruned-net file, in eval mode, its removed weights zero, and the file's meta dict.

    Raises:
        NetFileError: the file is not a pruned net of a model known here.
    """
    arrays, meta = netfile.read_arrays(path)
    if netfile.is_compiled(meta):
        raise netfile.NetFileError(f"{path}: compiled already, which vdbench.CompiledNet.load reads")
    name, classes = meta.get("model"), meta.get("num_classes")
    try:
        if not isinstance(name, str) or name not in MODELS or not isinstance(classes, int) or classes < 1:
            raise ValueError(f"model {name!r} with {classes!r} classes; there are {', '.join(sorted(MODELS))}")
        with torch.device("meta"):  # its shapes, and none of the memory that they ask for
            shapes = {key: tuple(value.shape) for key, value in MODELS[name](classes).state_dict().items()}
        if shapes != {key: array.shape for key, array in arrays.items()}:
            raise ValueError(f"its tensors are not those of {name} with {classes} classes")
        model = MODELS[name](classes)
        model.load_state_dict({key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()})
    except (RuntimeError, TypeError, ValueError) as error:
        raise netfile.NetFileError(
            f"{path}: not a pruned net known here ({first_line(error)}); if a prune job wrote it, rerun that"
        ) from None
    return model.eval(), meta


def trade_off(model: nn.Module, data: Dataset | Text) -> list[CurvePoint]:
    """Error, or perplexity, and compression of a variational net over `CURVE_THRESHOLDS`; the net is left as it was.

    Statistics of batch normalisation are estimated anew at each.
    """
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    layers = [layer for _, layer in variational_layers(model)]
    thresholds = [layer.loga_threshold for layer in layers]
    points = []
    for threshold in CURVE_THRESHOLDS:
        for layer in layers:
            layer.loga_threshold = threshold
        reestimate(model, data)
        size, evaluated = metrics.size(model), tasks.evaluate(model, data)
        points.append(
            CurvePoint(
                threshold=threshold,
                sparsity=size.sparsity,
                compression_ratio=size.compression_ratio,
                error=evaluated.get("error"),
                perplexity=evaluated.get("perplexity"),
            )
        )
    for layer, threshold in zip(layers, thresholds, strict=True):
        layer.loga_threshold = threshold
    for name, value in model.named_buffers():
        value.copy_(buffers[name])
    return points


def log_alpha_histograms(model: nn.Module) -> list[LayerHistogram]:
    """Weights of every variational layer counted by log alpha in equal bins over [-8, 8]."""
    edges = np.linspace(-LOG_ALPHA_CLIP, LOG_ALPHA_CLIP, HISTOGRAM_BINS + 1)
    return [
        LayerHistogram(name=name, counts=np.histogram(matrix.log_alpha().detach().cpu().numpy(), edges)[0].tolist())
        for name, matrix in variational_matrices(model)
    ]


def _control(dense: Record) -> Control:
    measures = dense.metrics
    return Control(
        error=measures.get("error"),
        perplexity=measures.get("perplexity"),
        weights_sha256=dense.weights_sha256 or "",
    )


def _left_of_language(model: nn.Module, data: Dataset | Text) -> dict[str, Any]:
    """For the record of a language model: what it is left with."""
    if not (isinstance(model, LanguageModel) and isinstance(data, Text)):
        return {}
    left = structure(model)
    words = {"read": left.words_read(), "predicted": left.words_predicted()}
    told = {kind: Words(**told_words(kept, data.vocabulary)) for kind, kept in words.items()}
    return {"kept": left.counts(), "words": told}


@full_precision()
def prune(
    spec: RunSpec, *, suite: str, output: Path, data: Dataset | Text, weights: Path, control: Path | None = None
) -> Record:
    """Prune one trained run at its threshold, evaluate it, and write `prune.json` and `pruned.npz` into `output`.

    Nothing is trained after thresholding. A run whose training diverged is evaluated as its last good epoch left it,
    and its record says `diverged`.

    Args:
        weights: the run's trained weights; `train.json` lies beside them.
        control: prune record of the dense net the run is compared with; None for the dense run itself.

    Raises:
        RecordError: an input cannot be read, or the weights belong to another spec or to data of the user's that
            have changed since.
    """
    job, content = Job("prune", spec, suite), spec.content()
    trained = records.read(weights.parent / "train.json")
    if trained.spec_sha256 != spec_sha256(content):
        raise records.RecordError(f"{weights} was trained under another spec than this job's; rerun its training")
    if "data" in trained.inputs and trained.inputs["data"] != data.sha256():
        raise records.RecordError(f"{spec.dataset} has changed since {weights} was trained on it; rerun its training")
    device = pick_device()
    model = build_model(spec, data.num_classes, pretrained=None)
    load_state(model, weights)
    if state_sha256(model.state_dict()) != trained.weights_sha256:
        raise records.RecordError(f"{weights} holds other weights than train.json beside it is of; rerun its training")
    model.to(device).eval()
    data = data.to(device)
    evaluated = tasks.evaluate(model, data)
    variational = spec.method in VARIATIONAL_METHODS
    path = output / "pruned.npz"
    save_net(
        path,
        model,
        {
            "model": spec.model,
            "num_classes": data.num_classes,
            "dataset": spec.dataset,
            "method": spec.method,
            "seed": spec.seed,
            "spec_sha256": spec_sha256(content),
        },
    )
    dense = records.read(control) if control else None
    size = metrics.size(model).model_copy(update={"file_bytes": path.stat().st_size})
    record = job.record(
        device=device,
        status=trained.status,
        message=trained.message,
        metrics=evaluated,
        control=_control(dense) if dense else None,
        size=size,
        layers=metrics.layers(model),
        multiply_adds=metrics.multiply_adds(model, data.example),
        **_left_of_language(model, data),
        threshold=spec.threshold,
        curve=trade_off(model, data) if variational else [],
        log_alpha_histogram=log_alpha_histograms(model) if variational else [],
        weights_sha256=state_sha256(pruned_state(model)),
        trained_sha256=trained.weights_sha256,
    )
    records.write(record, output / "prune.json")
    (weights.parent / "resume.pt").unlink(missing_ok=True)  # nothing needs to be trained again
    return record
