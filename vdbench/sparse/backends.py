"""The ways to run a pruned net that are timed side by side. Each takes the net, in eval mode, and a thread count, and
gives a function from a float32 (N, C, H, W) array to an array of logits."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vdbench.sparse.linear import to_cpu_sparse

Run = Callable[[np.ndarray], np.ndarray]


class BackendMissing(RuntimeError):
    """A backend that is not installed; the message says how to install it."""


def _through_torch(model: nn.Module) -> Run:
    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).numpy()

    return run


def torch_dense(model: nn.Module, threads: int) -> Run:
    """PyTorch, zeros and all."""
    return _through_torch(model)


def scipy_csr(model: nn.Module, threads: int) -> Run:
    """Linear layers as SciPy CSR matrices, which use one thread; convolutions dense in PyTorch."""
    return _through_torch(to_cpu_sparse(model))


class _TorchCsrLinear(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.weight = layer.weight.detach().to_sparse_csr()
        self.bias = layer.bias[:, None].detach()

    def forward(self, input: Tensor) -> Tensor:
        return (self.weight @ input.t() + self.bias).t()


def torch_csr(model: nn.Module, threads: int) -> Run:
    """Linear layers as PyTorch CSR tensors; convolutions dense."""
    model = copy.deepcopy(model)
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            setattr(model, name, _TorchCsrLinear(child))

    @torch.no_grad()  # CSR products raise in inference mode
    def run(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).numpy()

    return run


def onnxruntime(model: nn.Module, threads: int) -> Run:
    """ONNX Runtime, dense: it stores zeros like any other number."""
    try:
        import onnxruntime as ort

        graph = _onnx_graph(model)
    except ImportError as error:
        raise BackendMissing(f"{error.name} is not installed: pip install vdbench[peers]") from None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(None, {"input": images})[0])


def _onnx_graph(model: nn.Module) -> bytes:
    """A chain of the layers our nets are made of, as a serialised ONNX model."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []
    for name, layer in model.named_children():
        inputs = [nodes[-1].output[0] if nodes else "input"]
        for kind, tensor in layer.named_parameters():
            array = np.ascontiguousarray(tensor.detach().numpy())
            constants.append(numpy_helper.from_array(array, f"{name}.{kind}"))
            inputs.append(f"{name}.{kind}")
        operator, attributes = _onnx_operator(layer)
        nodes.append(helper.make_node(operator, inputs, [name], **attributes))
    graph = helper.make_graph(
        nodes,
        type(model).__name__,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", "c", "h", "w"])],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["n", "classes"])],
        constants,
    )
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(content)
    return content.SerializeToString()


def _onnx_operator(layer: nn.Module) -> tuple[str, dict[str, Any]]:
    match layer:
        case nn.Linear():
            return "Gemm", {"transB": 1}
        case nn.Conv2d():
            return "Conv", {"strides": layer.stride, "pads": [*layer.padding, *layer.padding]}  # type: ignore[misc]
        case nn.MaxPool2d():
            return "MaxPool", {"kernel_shape": [layer.kernel_size] * 2, "strides": [layer.stride] * 2}
        case nn.ReLU():
            return "Relu", {}
        case nn.Flatten():
            return "Flatten", {}
    raise NotImplementedError(f"no ONNX operator written for {type(layer).__name__}")


BACKENDS: dict[str, Callable[[nn.Module, int], Run]] = {
    "torch_dense": torch_dense,
    "scipy_csr": scipy_csr,
    "torch_csr": torch_csr,
    "onnxruntime": onnxruntime,
}
