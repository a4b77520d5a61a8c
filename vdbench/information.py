"""What there is to run, and what it would run on."""

import os
from pathlib import Path

import numpy as np
from torch import nn

from vdbench import data, metrics, outputs, shipping
from vdbench.config_timing import Backend
from vdbench.models import MODELS
from vdbench.provenance import cpu_model, gpu_model, package_versions
from vdbench.sparse.backends import BACKENDS, BackendMissing

_WORDS = 10_000  # as Penn Treebank has: the weights of a language model depend on it


def describe(*, cache: Path | None = None, mirror: Path | None = None) -> str:
    """Data sets, models, methods, shipped nets, backends, hardware and versions, a line each."""
    sections = {
        "data sets": {
            name: f"{source.examples['train']:,} + {source.examples['test']:,} examples, "
            + data.available(name, cache, mirror)
            for name, source in data.DATASETS.items()
        },
        "models": {name: f"{outputs.MODELS[name]}, {_weights(name)}" for name in MODELS},
        "methods": outputs.METHODS,
        "shipped nets": {run: ", ".join(seeds) for run, seeds in shipping.nets().items()},
        "backends": {name: _installed(name) for name in BACKENDS},
        "hardware": {
            "cpu": f"{cpu_model()}, {os.cpu_count()} logical cores",
            "gpu": gpu_model() or "none that torch can use",
        },
        "versions": package_versions(),
    }
    return "\n\n".join(
        "\n".join([title, *(f"  {name:21} {text}" for name, text in lines.items())])
        for title, lines in sections.items()
    )


def _weights(model: str) -> str:
    classes = _WORDS if model in outputs.LANGUAGE_MODELS else 10
    given = f" for {_WORDS:,} words" if classes == _WORDS else ""
    return f"{metrics.size(MODELS[model](classes)).weights:,} weights{given}"


def _installed(backend: Backend) -> str:
    """Found out by making it: a package that is there and cannot be imported is not installed."""
    convolution = nn.Conv2d(1, 2, 3)
    convolution.weight.data[0] = 0.0  # a dead unit: some have nothing to do without one
    net = nn.Sequential(convolution, nn.Flatten(), nn.Linear(72, 2)).eval()
    try:
        BACKENDS[backend](net, np.zeros((1, 1, 8, 8), np.float32), 1)
    except BackendMissing as error:
        return str(error)
    return f"{outputs.BACKENDS[backend]}: installed"
