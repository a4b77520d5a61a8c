"""The engines that are timed side by side: equal outputs on all that nets are made of, a note for what is missing."""

import sys
from importlib.metadata import PackageNotFoundError
from typing import get_args

import numpy as np
import pytest
import tiny
import torch
from sparse_net import Calls
from torch import nn
from torch.nn import functional

from vdbench import outputs
from vdbench.config_timing import DENSE_BACKENDS, Backend
from vdbench.sparse import graph as g
from vdbench.sparse.backends import BACKENDS, BackendMissing
from vdbench.sparse.compact import compact
from vdbench.sparse.graph import Graph
from vdbench.sparse.onnx_graph import NoOnnxOperator, onnx_model
from vdbench.sparse.opaque import TorchOp
from vdbench.sparse.peers import matrices
from vdbench.sparse.peers.common import Run
from vdbench.sparse.tracing import trace
from vdbench.timing import check_equal

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)


def built(name: str, net: torch.nn.Module, images: np.ndarray = IMAGES, threads: int = 1) -> Run:
    """A backend's function; the test is skipped where it is not installed or there is nothing in the net for it."""
    try:
        return BACKENDS[name](net, images, threads)
    except BackendMissing as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("model", ["lenet300100", "lenet5"])
@pytest.mark.parametrize("name", BACKENDS)
def test_backends_compute_the_same_logits(name, model):
    net = tiny.sparse_net(model)
    run = built(name, net)
    with torch.no_grad():
        expected = net(torch.from_numpy(IMAGES)).numpy()
    for images, logits in ((IMAGES, expected), (IMAGES[:1], expected[:1])):  # a net takes any batch size
        np.testing.assert_allclose(run(images), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_compute_with_an_emptied_layer(name):
    net = tiny.sparse_net("lenet300100")
    torch.nn.init.zeros_(net.get_submodule("fc2").weight)
    with torch.no_grad():
        expected = net(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(built(name, net)(IMAGES), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_leave_the_net_as_it_was(name):
    net = tiny.sparse_net("lenet5")
    kinds = [type(module) for module in net.modules()]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    built(name, net)(IMAGES)
    assert [type(module) for module in net.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class Residual(nn.Module):
    """Every kind of operation that a peer may be given, on (N, 3, 9, 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, eps=1e-3)
        self.branch, self.strided = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(16, 4, 3, stride=2, dilation=2)
        self.leaky, self.pool, self.mean = nn.LeakyReLU(0.1), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.stem(input)))
        x = self.leaky(self.branch(x)) + x
        x = self.strided(torch.cat((x, x.clamp(-1, 0.5)), 1))
        return self.fc(torch.flatten(self.mean(self.pool(x)), 1))


def residual_graph() -> tuple[nn.Module, Graph]:
    """That net and its operations, written out by hand: normalised, added, concatenated and pooled."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Residual().eval()
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 1.5)
    scale = net.norm.weight / torch.sqrt(net.norm.running_var + 1e-3)
    shift = net.norm.bias - net.norm.running_mean * scale

    def arrays(layer: nn.Conv2d | nn.Linear) -> dict[str, np.ndarray]:
        return {"weight": layer.weight.detach().numpy(), "bias": layer.bias.detach().numpy()}

    place = {"shape": (8, 9, 9)}
    graph = Graph(
        (
            g.Input(name="x", shape=(3, 9, 9)),
            g.Conv2d(name="stem", inputs=("x",), **place, **arrays(net.stem), padding=(1, 1, 1, 1)),
            g.Affine(
                name="norm", inputs=("stem",), **place, scale=scale.detach().numpy(), shift=shift.detach().numpy()
            ),
            g.Clip(name="relu", inputs=("norm",), **place),
            g.Conv2d(name="branch", inputs=("relu",), **place, **arrays(net.branch), padding=(1, 1, 1, 1), groups=2),
            g.LeakyReLU(name="leaky", inputs=("branch",), **place, slope=0.1),
            g.Add(name="sum", inputs=("leaky", "relu"), **place),
            g.Clip(name="clipped", inputs=("sum",), **place, low=-1.0, high=0.5),
            g.Concat(name="both", inputs=("sum", "clipped"), shape=(16, 9, 9)),
            g.Conv2d(
                name="strided", inputs=("both",), shape=(4, 3, 3), **arrays(net.strided), stride=(2, 2), dilation=(2, 2)
            ),
            g.MaxPool2d(
                name="pool", inputs=("strided",), shape=(4, 2, 2), kernel=(2, 2), stride=(2, 2), ceil_mode=True
            ),
            g.AvgPool2d(name="mean", inputs=("pool",), shape=(4, 1, 1), kernel=(2, 2), stride=(1, 1)),
            g.Flatten(name="flat", inputs=("mean",), shape=(4,)),
            g.Linear(name="fc", inputs=("flat",), shape=(5,), **arrays(net.fc)),
        )
    )
    return net, graph


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "mnn_dense", "mnn_sparse", "torch_compacted"])
def test_engines_are_given_every_operation(name, monkeypatch):
    net, graph = residual_graph()
    monkeypatch.setattr("vdbench.sparse.peers.engines.traced", lambda model, example: graph)
    monkeypatch.setattr("vdbench.sparse.peers.pytorch.compacted", lambda model, example: graph)
    images = np.random.default_rng(0).normal(size=(5, 3, 9, 9)).astype(np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    run = built(name, net, images)
    check_equal({"torch": lambda x: expected[: len(x)], name: run}, images)
    check_equal({"torch": lambda x: expected[: len(x)], name: run}, images[:1])


def test_a_bias_that_differs_from_place_to_place_is_exported():
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 3, 3, 3), (4, 6, 5)))
    layer = g.Conv2d(name="c", inputs=("x",), shape=(4, 6, 5), weight=weight, bias=bias, padding=(1, 1, 0, 1))
    graph = Graph((g.Input(name="x", shape=(3, 6, 6)), layer))
    images = rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    (found,) = ort.InferenceSession(onnx_model(graph)).run(None, {"input": images})
    np.testing.assert_allclose(found, graph(torch.from_numpy(images)).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [nn.Tanh(), nn.Sigmoid(), nn.ELU(), nn.Hardsigmoid(), nn.Hardswish(), nn.Softmax(1), nn.LogSoftmax(1)],
    ids=str,
)
def test_smooth_functions_are_exported(function):
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    images = 3 * torch.randn(20, 7)
    model = onnx_model(trace(nn.Sequential(function).eval(), images))
    (found,) = ort.InferenceSession(model).run(None, {"input": images.numpy()})
    np.testing.assert_allclose(found, function(images).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Flatten(), nn.ReLU()], (6, 5)),
        ([nn.Unflatten(1, (2, 3, 5)), nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 4, 2)], (30,)),
        ([nn.ZeroPad2d((1, 0, 2, 1)), nn.ReLU(), nn.Flatten(2)], (2, 6, 5)),
        ([Calls(lambda x: x * x.mean((2, 3), keepdim=True) + x)], (2, 6, 5)),
        ([nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)], (6, 5)),
        ([nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)], (2, 3, 6, 5)),
        ([nn.Conv1d(6, 4, 2), nn.MaxPool1d(2), nn.Linear(2, 3)], (6, 5)),
    ],
)
def test_shapes_zeros_around_maps_and_products_are_exported(layers, shape):
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    net, images = nn.Sequential(*layers).eval(), torch.randn(3, *shape)
    graph = trace(net, images)
    for exported in (graph, compact(graph)):
        (found,) = ort.InferenceSession(onnx_model(exported)).run(None, {"input": images.numpy()})
        np.testing.assert_allclose(found, net(images).detach().numpy(), atol=1e-6)


def test_an_operation_that_onnx_has_not_is_named():
    pytest.importorskip("onnx")
    odd = TorchOp(name="odd", inputs=("x",), shape=(3,), function=torch.sin)
    with pytest.raises(NoOnnxOperator, match="TorchOp odd"):
        onnx_model(Graph((g.Input(name="x", shape=(3,)), odd)))


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_run_a_layer_by_itself_a_net_with_normalisation_and_one_on_words(name):
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    blocks = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, eps=1e-3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(96, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4, bias=False),
    ).eval()  # fmt: skip
    nn.init.zeros_(blocks[-1].weight[:, :2])  # two units are dead
    layers = (nn.Linear(20, 7), (20,)), (nn.Conv2d(4, 6, 3, padding=1), (4, 8, 8))
    words = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(words[0].weight[:3])
    for net, shape in ((blocks, (3, 8, 8)), *layers, (words, (5, 6))):
        images = generator.normal(size=(3, *shape)).astype(np.float32)
        with torch.no_grad():
            expected = net(torch.from_numpy(images)).numpy()
        try:
            run = BACKENDS[name](net.eval(), images, 1)
        except BackendMissing as reason:
            if "not installed" in str(reason):
                pytest.skip(str(reason))
            assert "the net has no" in str(reason) and net is not blocks
            continue
        check_equal({"torch": lambda x, y=expected: y, name: run}, images)


PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "mnn_sparse": ("MNN", "onnx"),
    "sparse_dot_mkl": ("sparse_dot_mkl",),
}


@pytest.mark.parametrize(("name", "package"), [(name, package) for name, all in PACKAGES.items() for package in all])
def test_backend_that_is_not_installed_says_how_to_install_it(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "onnx":
        pytest.importorskip(PACKAGES[name][0])
    if package == "sparse_dot_mkl":
        pytest.importorskip(package)
    with pytest.raises(BackendMissing, match=rf"{package} is not installed: pip install -e '\.\[peers\]'"):
        BACKENDS[name](tiny.sparse_net("lenet300100"), IMAGES, 1)


def test_mkl_that_is_not_installed_is_named(monkeypatch):
    def nothing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(matrices, "files", nothing)
    with pytest.raises(BackendMissing, match="mkl is not installed: pip install"):
        matrices.sparse_dot_mkl(tiny.sparse_net("lenet300100"), IMAGES, 1)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name.endswith("_compacted")])
def test_a_net_without_dead_units_is_not_timed_twice_by_dense_engines(name):
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    with pytest.raises(BackendMissing, match="no dead units"):
        BACKENDS[name](net, np.ones((2, 6), np.float32), 1)


def test_every_backend_has_its_function_and_its_name():
    assert list(BACKENDS) == list(get_args(Backend)) == list(outputs.BACKENDS)
    assert set(DENSE_BACKENDS) < set(BACKENDS)
