"""Timing and the backends it compares: equal outputs, fair turns, and a note for what is not installed."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from vdbench import metrics, netfile, pruning, records, timing
from vdbench.baselines import GradualPruner
from vdbench.config import Timing
from vdbench.models import MODELS
from vdbench.sparse import backends
from vdbench.sparse.backends import BACKENDS, BackendMissing
from vdbench.timing import UnequalOutputs, check_equal, interleaved

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)


def sparse_net(model: str) -> torch.nn.Module:
    """A net with 95 % of its weights removed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MODELS[model](10)
    kept = {layer.name: layer.total // 20 for layer in metrics.layers(net)}
    GradualPruner(net, kept).update(1.0)
    return net.eval()


@pytest.fixture
def pruned(tmp_path):
    """The file of a sparse LeNet-300-100."""
    path = tmp_path / "pruned.npz"
    pruning.save_net(path, sparse_net("lenet300100"), {"model": "lenet300100", "num_classes": 10})
    return path


def built(name: str, net: torch.nn.Module, images: np.ndarray = IMAGES, threads: int = 1) -> backends.Run:
    """A backend's function; the test is skipped where it is not installed or there is nothing in the net for it."""
    try:
        return BACKENDS[name](net, images, threads)
    except BackendMissing as reason:
        pytest.skip(str(reason))


def spec(**changes):
    settings = {"batch_sizes": [1, 3], "threads": [1], "rounds": 2, "min_sample_s": 1e-6}
    return tiny.spec("dense").model_copy(update={"timing": Timing.model_validate(settings | changes)})


def time(pruned, tmp_path, **changes):
    return timing.time_inference(spec(**changes), suite="tiny", output=tmp_path, pruned=pruned)


# --- backends


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", BACKENDS)
def test_backends_compute_the_same_logits(name, model):
    net = sparse_net(model)
    run = built(name, net)
    with torch.no_grad():
        expected = net(torch.from_numpy(IMAGES)).numpy()
    for images, logits in ((IMAGES, expected), (IMAGES[:1], expected[:1])):  # a net takes any batch size
        np.testing.assert_allclose(run(images), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_compute_with_an_emptied_layer(name):
    net = sparse_net("lenet300100")
    torch.nn.init.zeros_(net.get_submodule("fc2").weight)
    with torch.no_grad():
        expected = net(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(built(name, net)(IMAGES), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_leave_the_net_as_it_was(name):
    net = sparse_net("lenet5")
    kinds = [type(module) for module in net.modules()]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    built(name, net)(IMAGES)
    assert [type(module) for module in net.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("package", ["onnxruntime", "onnx"])
def test_backend_that_is_not_installed_says_how_to_install_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "onnx":
        pytest.importorskip("onnxruntime")
    with pytest.raises(BackendMissing, match=f"{package} is not installed: pip install"):
        backends.onnxruntime(sparse_net("lenet300100"), IMAGES, 1)


# --- fair turns


class Contender:
    """Takes a fixed time on a clock that only contenders move, and writes down its turns."""

    def __init__(self, name: str, seconds: float, clock: SimpleNamespace, turns: list[str]) -> None:
        self.name, self.seconds, self.clock, self.turns = name, seconds, clock, turns

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.clock.now += self.seconds
        self.turns.append(self.name)
        return images


@pytest.fixture
def contenders(monkeypatch):
    """Contenders by name, of 1 and 3 ms a call, and the list of their turns."""
    clock, turns = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return {name: Contender(name, seconds, clock, turns) for name, seconds in (("a", 1e-3), ("b", 3e-3))}, turns


def test_contenders_take_turns(contenders):
    runs, turns = contenders
    interleaved(runs, IMAGES, rounds=4, min_sample_s=1e-9)
    assert turns[-8:] == ["a", "b"] * 4


def test_warm_up_is_no_sample(contenders):
    runs, turns = contenders
    samples = interleaved(runs, IMAGES, rounds=1, min_sample_s=1e-9)
    assert turns.count("a") > len(samples["a"]) == 1


def test_sample_is_the_mean_of_as_many_calls_as_fill_the_time(contenders):
    runs, turns = contenders
    samples = interleaved(runs, IMAGES, rounds=2, min_sample_s=12e-3)
    assert samples == {"a": pytest.approx([1e-3, 1e-3]), "b": pytest.approx([3e-3, 3e-3])}
    assert turns[-32:] == (["a"] * 12 + ["b"] * 4) * 2


# --- equal outputs


def test_unequal_outputs_are_refused():
    with pytest.raises(UnequalOutputs, match="broken differs from right"):
        check_equal({"right": lambda x: x, "also right": lambda x: x + 1e-7, "broken": lambda x: 1.01 * x}, IMAGES)


def test_outputs_that_are_no_numbers_are_refused():
    with pytest.raises(UnequalOutputs, match="broken"):
        check_equal({"right": lambda x: x, "broken": lambda x: x * np.nan}, IMAGES)


def break_a_backend(monkeypatch):
    monkeypatch.setitem(BACKENDS, "scipy_csr", lambda model, example, threads: lambda images: np.ones((len(images), 10)))


def test_broken_backend_leaves_no_record(pruned, tmp_path, monkeypatch):
    break_a_backend(monkeypatch)
    with pytest.raises(UnequalOutputs, match="scipy_csr differs from torch_dense"):
        time(pruned, tmp_path)
    assert not (tmp_path / "time.json").exists()


# --- the job


def test_record_has_every_contender_at_every_setting(pruned, tmp_path):
    names = ["torch_dense", "scipy_csr", "torch_csr"]
    record = time(pruned, tmp_path, threads=[1, 2], backends=names)
    assert records.read(tmp_path / "time.json") == record
    assert [(t.threads, t.batch_size, t.backend) for t in record.timing] == [
        (threads, batch, name) for threads in (1, 2) for batch in (1, 3) for name in names
    ]
    assert all(len(t.samples_s) == 2 and min(t.samples_s) > 0 for t in record.timing)
    assert record.missing_backends == {}


def test_backends_run_with_the_threads_they_are_recorded_with(pruned, tmp_path, monkeypatch):
    seen = []

    def spy(model, example, threads):
        def run(images):
            seen.append((threads, torch.get_num_threads()))
            return BACKENDS["torch_dense"](model, example, threads)(images)

        return run

    monkeypatch.setitem(BACKENDS, "scipy_csr", spy)
    time(pruned, tmp_path, threads=[2, 1], backends=["torch_dense", "scipy_csr"])
    assert set(seen) == {(1, 1), (2, 2)}


def test_all_threads_are_named_by_number_and_timed_once(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "available_cores", lambda: 2)
    record = time(pruned, tmp_path, threads=[1, 2, "all"], batch_sizes=[1], backends=["torch_dense"])
    assert [t.threads for t in record.timing] == [1, 2]


def test_thread_count_is_restored(pruned, tmp_path):
    time(pruned, tmp_path, threads=[2], backends=["torch_dense"])
    assert torch.get_num_threads() == 1


def test_thread_count_is_restored_after_an_error(pruned, tmp_path, monkeypatch):
    break_a_backend(monkeypatch)
    with pytest.raises(UnequalOutputs):
        time(pruned, tmp_path, threads=[2])
    assert torch.get_num_threads() == 1


def test_missing_backend_is_noted_and_the_others_are_timed(pruned, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    record = time(pruned, tmp_path)
    assert list(record.missing_backends) == ["onnxruntime"]
    assert "pip install" in record.missing_backends["onnxruntime"]
    assert "onnxruntime left out" in caplog.text
    assert {t.backend for t in record.timing} == {"torch_dense", "scipy_csr", "torch_csr"}


def test_nothing_to_time_is_a_record_of_what_is_missing(pruned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    record = time(pruned, tmp_path, backends=["onnxruntime"])
    assert (record.timing, list(record.missing_backends)) == ([], ["onnxruntime"])


def test_spec_without_timing_is_refused(pruned, tmp_path):
    with pytest.raises(ValueError, match="timing"):
        timing.time_inference(tiny.spec("dense"), suite="tiny", output=tmp_path, pruned=pruned)


def test_file_that_is_no_net_is_refused(tmp_path):
    (tmp_path / "pruned.npz").write_bytes(b"garbage")
    with pytest.raises(netfile.NetFileError):
        time(tmp_path / "pruned.npz", tmp_path)
