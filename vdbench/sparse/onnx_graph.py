"""A network's operations as an ONNX model, which ONNX Runtime, OpenVINO and MNN read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vdbench.sparse.graph import (
    Add,
    Affine,
    AvgPool2d,
    Clip,
    Concat,
    Conv2d,
    Expand,
    Flatten,
    Graph,
    Input,
    InputOfPlaces,
    LeakyReLU,
    Linear,
    MaxPool2d,
    Multiply,
    Op,
    Pointwise,
    Pool2d,
)
from vdbench.sparse.opaque import ChannelsFirst, ChannelsLast, Pad, Reshape, Softmax

INPUT, OUTPUT = "input", "output"


class NoOnnxOperator(NotImplementedError):
    """An operation that is not written for ONNX; the message names it."""


def onnx_model(graph: Graph) -> bytes:
    """The network, zeros and all, as a serialised model from `input` (n, *shape) to `output`, for any batch size.

    Raises:
        NoOnnxOperator: the network has an operation not written here. ImportError: onnx is not installed.
    """
    import onnx
    from onnx import TensorProto, helper

    parts = _Parts(graph)
    content = helper.make_graph(
        parts.nodes,
        "net",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", *graph.input.example])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n", *graph.output.shape])],
        parts.constants,
    )
    model = helper.make_model(content, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


_OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
    "elu": ("Elu", {}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6}),
    "hardswish": ("HardSwish", {}),
}


class _Parts:
    """Nodes and constants of a graph. A value keeps its name, but for those that come in and go out."""

    def __init__(self, graph: Graph) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.names = {graph.input.name: INPUT} | {op.name: f"value/{op.name}" for op in graph.ops[1:]}
        self.names[graph.output.name] = OUTPUT
        if graph.input.given:
            self.names[graph.input.name] = "value/input"
            self.given(graph.input)
        for op in graph.ops[1:]:
            self.add(op)

    def given(self, op: Input) -> None:
        """The input, in the shape in which it is read."""
        if isinstance(op, InputOfPlaces):
            self.channels_first(op, of=INPUT)
        else:
            self.node("Reshape", op, self.sizes(op, [0, *op.shape]), of=INPUT)

    def channels_first(self, op: Op, of: str = "") -> None:
        channels, *places = op.shape
        self.node("Reshape", op, self.sizes(op, [0, *places, channels]), of=of, output=f"{op.name}/places")
        self.node("Transpose", op, of=f"{op.name}/places", perm=[0, 3, 1, 2])

    def node(self, operator: str, op: Op, *constants: str, of: str = "", output: str = "", **attributes: Any) -> None:
        """From the operation's inputs, or from `of`, to its value, or to `output`."""
        from onnx import helper

        inputs = [of] if of else [self.names[name] for name in op.inputs]
        inputs += constants
        self.nodes.append(
            helper.make_node(operator, inputs, [output or self.names[op.name]], output or op.name, **attributes)
        )

    def constant(self, op: Op, kind: str, array: np.ndarray, dtype: type = np.float32) -> str:
        from onnx import numpy_helper

        name = f"{op.name}/{kind}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array, dtype=dtype), name))
        return name

    def sizes(self, op: Op, numbers: Sequence[int]) -> str:
        return self.constant(op, "sizes", np.array(numbers), np.int64)

    def add(self, op: Op) -> None:
        match op:
            case Linear():
                self.node(
                    "Gemm", op, self.constant(op, "weight", op.weight), self.constant(op, "bias", op.bias), transB=1
                )
            case Conv2d():
                self.convolution(op)
            case Affine():
                one, zero = np.ones_like(op.scale), np.zeros_like(op.scale)
                parameters = {"scale": op.scale, "shift": op.shift, "mean": zero, "variance": one}
                constants = [self.constant(op, kind, array) for kind, array in parameters.items()]
                self.node("BatchNormalization", op, *constants, epsilon=0.0)
            case Clip(low=0.0, high=np.inf):
                self.node("Relu", op)
            case Clip():
                bounds = [self.constant(op, kind, np.array(x)) for kind, x in (("low", op.low), ("high", op.high))]
                self.node("Clip", op, *bounds)
            case LeakyReLU():
                self.node("LeakyRelu", op, alpha=op.slope)
            case Pointwise(function=function) if function in _OPERATORS:
                operator, attributes = _OPERATORS[function]
                self.node(operator, op, **attributes)
            case Softmax():
                self.node("LogSoftmax" if op.log else "Softmax", op, axis=1)
            case MaxPool2d():
                self.node("MaxPool", op, dilations=op.dilation, **_pooling(op))
            case AvgPool2d(divisor=None):
                self.node("AveragePool", op, count_include_pad=int(op.count_include_pad), **_pooling(op))
            case Flatten():
                self.node("Flatten", op)
            case Reshape():
                self.node("Reshape", op, self.sizes(op, [0, *op.shape]))
            case ChannelsFirst():
                self.channels_first(op)
            case ChannelsLast():
                self.node("Transpose", op, output=f"{op.name}/places", perm=[0, 2, 3, 1])
                self.node("Reshape", op, self.sizes(op, [0, *op.shape]), of=f"{op.name}/places")
            case Pad():
                top, bottom, left, right = op.padding
                self.node("Pad", op, self.sizes(op, [0, 0, top, left, 0, 0, bottom, right]))
            case Add():
                self.node("Add", op)
            case Multiply():
                self.node("Mul", op)
            case Expand():
                self.node("Expand", op, self.sizes(op, [1, 1, *op.shape[1:]]))
            case Concat():
                self.node("Concat", op, axis=1)
            case _:
                raise NoOnnxOperator(f"no ONNX operator is written for {type(op).__name__} {op.name}")

    def convolution(self, op: Conv2d) -> None:
        """ONNX has no bias that differs from place to place: such a one is added afterwards."""
        top, bottom, left, right = op.padding
        attributes = {"strides": op.stride, "pads": [top, left, bottom, right], "dilations": op.dilation}
        weight, bias = self.constant(op, "weight", op.weight), self.constant(op, "bias", op.bias)
        if op.bias.ndim == 1:
            self.node("Conv", op, weight, bias, group=op.groups, **attributes)
        else:
            product = f"{op.name}/product"
            self.node("Conv", op, weight, output=product, group=op.groups, **attributes)
            self.node("Add", op, bias, of=product)


def _pooling(op: Pool2d) -> dict[str, Any]:
    return {
        "kernel_shape": op.kernel,
        "strides": op.stride,
        "pads": [*op.padding, *op.padding],
        "ceil_mode": int(op.ceil_mode),
    }
