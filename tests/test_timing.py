"""Timing and the backends it compares: equal outputs, fair turns, and a note for what is not installed."""

import sys

import numpy as np
import pytest
import tiny
import torch

from vdbench import netfile, pruning, records, timing
from vdbench.config import Timing
from vdbench.sparse.backends import BACKENDS
from vdbench.timing import UnequalOutputs, check_equal, interleaved

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)


@pytest.fixture
def pruned(tmp_path):
    """The file of a sparse LeNet-300-100."""
    path = tmp_path / "pruned.npz"
    pruning.save_net(path, tiny.sparse_net("lenet300100"), {"model": "lenet300100", "num_classes": 10})
    return path


def spec(**changes):
    settings = {"batch_sizes": [1, 3], "threads": [1], "rounds": 2, "min_sample_s": 1e-6}
    return tiny.spec("dense").model_copy(update={"timing": Timing.model_validate(settings | changes)})


def time(pruned, tmp_path, **changes):
    return timing.time_inference(spec(**changes), suite="tiny", output=tmp_path, pruned=pruned)


# --- fair turns


class Clock:
    """Time that only calls and sleep move; `spinning`: seconds for which threads go on working after a call."""

    now = cpu = spinning = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.cpu

    def sleep(self, seconds: float) -> None:
        worked = min(seconds, self.spinning)
        self.now, self.cpu, self.spinning = self.now + seconds, self.cpu + worked, self.spinning - worked


class Contender:
    """Takes a fixed time, and writes down its turns and whether threads of another were still at work."""

    def __init__(self, name: str, seconds: float, clock: Clock, turns: list[str], spins: float = 0.0) -> None:
        self.name, self.seconds, self.clock, self.turns, self.spins = name, seconds, clock, turns, spins
        self.disturbed: list[bool] = []

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.disturbed.append(self.clock.spinning > 1e-9)
        self.clock.now += self.seconds
        self.clock.spinning = self.spins
        self.turns.append(self.name)
        return images


@pytest.fixture
def contenders(monkeypatch):
    """Contenders by name, of 1 and 3 ms a call, and the list of their turns."""
    clock, turns = Clock(), []
    monkeypatch.setattr(timing, "time", clock)
    return {
        "a": Contender("a", 1e-3, clock, turns, spins=0.2),
        "b": Contender("b", 3e-3, clock, turns),
    }, turns


def test_a_contender_waits_until_the_threads_of_the_one_before_are_at_rest(contenders):
    runs, _ = contenders
    interleaved(runs, IMAGES, rounds=3, min_sample_s=1e-9)
    assert not any(runs["b"].disturbed[1 + timing.WARM_UP_CALLS :])


def test_slow_contenders_are_warmed_up_once_and_not_before_a_sample(contenders, monkeypatch):
    runs, turns = contenders
    monkeypatch.setattr(timing, "SLOW_CALL_S", 2e-3)  # "a" takes 1 ms, "b" 3
    interleaved(runs, IMAGES, rounds=1, min_sample_s=1e-9)
    assert (turns.count("a"), turns.count("b")) == (1 + timing.WARM_UP_CALLS + 10 + 1, 1 + 1 + 1)


def test_contenders_take_turns(contenders):
    runs, turns = contenders
    interleaved(runs, IMAGES, rounds=4, min_sample_s=1e-9)
    assert turns[-4 * 16 :] == (["a"] * 11 + ["b"] * 5) * 4


def test_a_sample_is_of_calls_among_many(contenders):
    """Neither the warm-up nor the calls before each sample, 10 ms of them, count."""
    runs, turns = contenders
    samples = interleaved(runs, IMAGES, rounds=1, min_sample_s=1e-9)
    assert len(samples["a"]) == 1 and samples["b"] == [pytest.approx(3e-3)]
    assert turns == ["a"] * 6 + ["b"] * 6 + ["a"] * 10 + ["a"] + ["b"] * 4 + ["b"]


def test_sample_is_the_mean_of_as_many_calls_as_fill_the_time(contenders):
    runs, turns = contenders
    samples = interleaved(runs, IMAGES, rounds=2, min_sample_s=12e-3)
    assert samples == {"a": pytest.approx([1e-3, 1e-3]), "b": pytest.approx([3e-3, 3e-3])}
    assert turns[-60:] == (["a"] * (10 + 12) + ["b"] * (4 + 4)) * 2


# --- equal outputs


def test_unequal_outputs_are_refused():
    with pytest.raises(UnequalOutputs, match="broken differs from right"):
        check_equal({"right": lambda x: x, "also right": lambda x: x + 1e-7, "broken": lambda x: 1.01 * x}, IMAGES)


def test_outputs_that_are_no_numbers_are_refused():
    with pytest.raises(UnequalOutputs, match="broken"):
        check_equal({"right": lambda x: x, "broken": lambda x: x * np.nan}, IMAGES)


def break_a_backend(monkeypatch):
    monkeypatch.setitem(
        BACKENDS, "scipy_csr", lambda model, example, threads: lambda images: np.ones((len(images), 10))
    )


def test_broken_backend_leaves_no_record(pruned, tmp_path, monkeypatch):
    break_a_backend(monkeypatch)
    with pytest.raises(UnequalOutputs, match="scipy_csr differs from torch_dense"):
        time(pruned, tmp_path, backends=["torch_dense", "scipy_csr"])
    assert not (tmp_path / "time.json").exists()


def test_convolutions_after_winograd_may_be_less_exact():
    def off(images: np.ndarray) -> np.ndarray:
        return images + 5e-4

    check_equal({"torch_dense": lambda images: images, "mnn_dense": off}, IMAGES)
    with pytest.raises(UnequalOutputs, match="openvino differs from torch_dense"):
        check_equal({"torch_dense": lambda images: images, "openvino": off}, IMAGES)


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
    kept = sum(total // 20 for total in (784 * 300, 300 * 100, 100 * 10))
    assert record.work == records.Work(multiply_adds=kept, values=784 + 2 * (300 + 100) + 10, weights=kept)
    assert record.size is not None and record.size.nonzero_weights == kept


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
        time(pruned, tmp_path, threads=[2], backends=["torch_dense", "scipy_csr"])
    assert torch.get_num_threads() == 1


def test_missing_backend_is_noted_and_the_others_are_timed(pruned, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    record = time(pruned, tmp_path, backends=["torch_dense", "scipy_csr", "torch_csr", "onnxruntime"])
    assert list(record.missing_backends) == ["onnxruntime"]
    assert "pip install" in record.missing_backends["onnxruntime"]
    assert "onnxruntime left out" in caplog.text
    assert {t.backend for t in record.timing} == {"torch_dense", "scipy_csr", "torch_csr"}


def test_backend_with_nothing_to_do_is_noted(pruned, tmp_path):
    record = time(pruned, tmp_path, backends=["torch_dense", "torch_channels_last"])
    assert record.missing_backends == {"torch_channels_last": "the net has no Conv2d"}


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
