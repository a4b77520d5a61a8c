"""Inference engines that read ONNX: ONNX Runtime, OpenVINO and MNN."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vdbench.sparse.graph import Graph
from vdbench.sparse.onnx_graph import INPUT, OUTPUT, NoOnnxOperator, onnx_model
from vdbench.sparse.peers.common import BackendMissing, Run, compacted, not_installed, onnx_session, traced


def _exported(graph: Graph) -> bytes:
    try:
        return onnx_model(graph)
    except ImportError as error:
        raise not_installed(error.name) from None
    except NoOnnxOperator as error:
        raise BackendMissing(str(error)) from None


def _in_onnxruntime(graph: Graph, threads: int) -> Run:
    session = onnx_session(_exported(graph), threads)
    return lambda images: np.asarray(session.run(None, {INPUT: images})[0])


def onnxruntime(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """ONNX Runtime, dense: it stores zeros like any other number."""
    return _in_onnxruntime(traced(model, example), threads)


def onnxruntime_compacted(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """ONNX Runtime on the net without its dead units."""
    return _in_onnxruntime(compacted(model, example), threads)


def _in_openvino(graph: Graph, threads: int) -> Run:
    try:
        from openvino import Core
    except ImportError as error:
        raise not_installed(error.name) from None
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    core = Core()
    compiled = core.compile_model(core.read_model(_exported(graph)), "CPU", settings)
    request, output = compiled.create_infer_request(), compiled.output(0)
    return lambda images: request.infer([images], share_inputs=True)[output]


def openvino(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """OpenVINO, dense, in float32."""
    return _in_openvino(traced(model, example), threads)


def openvino_compacted(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """OpenVINO on the net without its dead units."""
    return _in_openvino(compacted(model, example), threads)


def _in_mnn(graph: Graph, threads: int, *flags: str) -> Run:
    try:
        import MNN

        mnn: Any = MNN
    except ImportError as error:
        raise not_installed(error.name) from None
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "net.onnx"), Path(folder, "net.mnn")
        source.write_bytes(_exported(graph))
        # not the command `mnnconvert`, which installs a package of its own accord to report its use to its makers
        convert = [sys.executable, "-c", "import sys, _tools; _tools.mnnconvert(sys.argv)", "--framework", "ONNX"]
        convert += ["--modelFile", str(source), "--MNNModel", str(target), *flags]
        done = subprocess.run(convert, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if not target.exists():
            raise BackendMissing(f"MNN cannot convert the net: {done.stdout.strip().splitlines()[-1:]}")
        manager = mnn.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": threads},))
        module = mnn.nn.load_module_from_file(str(target), [INPUT], [OUTPUT], runtime_manager=manager)

    def run(images: np.ndarray) -> np.ndarray:
        (output,) = module.forward([mnn.expr.const(images, images.shape, mnn.expr.NCHW)])
        return np.array(output.read())

    return run


def mnn_dense(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """MNN, dense; its 3x3 convolutions are Winograd's."""
    return _in_mnn(traced(model, example), threads)


def mnn_compacted(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """MNN on the net without its dead units."""
    return _in_mnn(compacted(model, example), threads)


def mnn_sparse(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """MNN with sparse layers wherever its converter thinks that they pay."""
    return _in_mnn(traced(model, example), threads, "--detectSparseSpeedUp")
