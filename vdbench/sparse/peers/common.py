"""What the peers share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from vdbench.sparse.graph import Graph, Weighted

Run = Callable[[np.ndarray], np.ndarray]
Build = Callable[[nn.Module, np.ndarray, int], Run]


class BackendMissing(RuntimeError):
    """A backend that takes no part; the message says what to install, or what the net lacks."""


def not_installed(package: str | None) -> BackendMissing:
    return BackendMissing(f"{package} is not installed: pip install -e '.[peers]'")


def require(model: nn.Module, *kinds: type[nn.Module]) -> None:
    """Raises BackendMissing for a net without such layers, which the backend would run like another one."""
    if not any(isinstance(layer, kinds) for layer in model.modules()):
        raise BackendMissing(f"the net has no {' or '.join(kind.__name__ for kind in kinds)}")


def traced(model: nn.Module, example: np.ndarray) -> Graph:
    from vdbench.sparse.tracing import trace

    return trace(model, torch.from_numpy(example))


def compacted(model: nn.Module, example: np.ndarray) -> Graph:
    """The net without its dead units: what dense engines gain from sparsity. Raises BackendMissing: it has none."""
    from vdbench.sparse.compact import compact

    whole = traced(model, example)
    left = compact(whole)
    if _weights(left) == _weights(whole):
        raise BackendMissing("the net has no dead units")
    return left


def _weights(graph: Graph) -> int:
    return sum(op.weight.size for op in graph.ops if isinstance(op, Weighted))


def onnx_session(content: bytes, threads: int) -> Any:
    """A serialised ONNX model in ONNX Runtime."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise not_installed(error.name) from None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def through_torch(model: nn.Module) -> Run:
    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).numpy()

    return run
