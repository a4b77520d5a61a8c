"""Training: seeds decide everything; what is written, where runs start, and what divergence leaves."""

import logging
import pickle
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import history, same_weights

from vdbench import metrics, pruning, records, schedules, training
from vdbench.config import SuiteError

pytestmark = pytest.mark.usefixtures("one_thread")


# --- seeds


def test_seed_decides_the_weights(data, tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(random.randrange(2**31))  # the caller's generator has no say
        tiny.train(tiny.spec("vd_warmup", seed=seed), tmp_path / folder, data)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    first, other = tiny.weights(tmp_path / "a"), tiny.weights(tmp_path / "c")
    assert all(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("stream", ["order", "noise", "initial"])
def test_each_purpose_and_epoch_has_randomness_of_its_own(stream):
    seeds = {schedules.derived_seed(seed, stream, epoch) for seed in range(5) for epoch in range(40)}
    others = {schedules.derived_seed(seed, "scores", epoch) for seed in range(5) for epoch in range(40)}
    assert len(seeds) == len(others) == 200
    assert not seeds & others


def test_generators_of_the_caller_are_left_alone(data, tmp_path):
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()
    tiny.train(tiny.spec("vd_warmup"), tmp_path, data)
    assert random.getstate() == before[0]
    assert pickle.dumps(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


# --- what is written


def test_log_lines_go_around_the_progress_bar(data, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    console, written = logging.StreamHandler(sys.stdout), []
    monkeypatch.setattr(logging.getLogger(), "handlers", [*logging.getLogger().handlers, console])
    monkeypatch.setattr(training.tqdm, "write", lambda text, **_: written.append(text))
    tiny.train(tiny.spec("dense"), tmp_path, data, progress=True)
    assert [text.split()[1] for text in written] == ["1/3", "2/3", "3/3"]


def test_history_says_what_was_used(data, tmp_path):
    recipe = {"epochs": 4, "constant_epochs": 2, "learning_rate": 2e-3, "kl_zero_epochs": 1, "kl_warmup_epochs": 2}
    record = tiny.train(tiny.spec("vd_warmup", **recipe), tmp_path, data)
    rows = [{key: float(value) for key, value in row.items()} for row in history(tmp_path)]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["learning_rate"] for row in rows] == [2e-3, 2e-3, 2e-3, 1e-3]
    assert [row["kl_weight"] for row in rows] == [0, 0, 0.5, 1]
    for row in rows:
        assert row["loss"] == pytest.approx(row["class_loss"] + row["kl_weight"] * row["kl"] / 600, rel=1e-4)
    assert record.metrics["error"] == pytest.approx(rows[-1]["error"])  # of the last epoch, not the best


# --- where a run starts


@pytest.mark.parametrize("method", ["vd_finetune", "magnitude"])
def test_run_starts_from_the_dense_weights(method, data, dense, tmp_path):
    matched = tiny.matched(tmp_path / "matched.json", compression=1.0)
    spec = tiny.spec(method, learning_rate=1e-12)
    tiny.train(spec, tmp_path, data, pretrained=dense / "weights.pt", matched=matched)
    start, end = tiny.weights(dense), tiny.weights(tmp_path)
    for name, value in start.items():
        torch.testing.assert_close(end[name], value, rtol=0, atol=1e-8)


def test_warmup_starts_from_the_seed_whatever_it_is_given(data, dense, tmp_path):
    tiny.train(tiny.spec("vd_warmup"), tmp_path / "a", data, pretrained=dense / "weights.pt")
    tiny.train(tiny.spec("vd_warmup"), tmp_path / "b", data)
    assert same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("method", ["vd_finetune", "magnitude", "random"])
def test_missing_dense_weights_are_one_clear_error(method, data, tmp_path):
    with pytest.raises(SuiteError, match=f"{method} .*--pretrained weights.pt"):
        tiny.train(tiny.spec(method), tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_missing_matched_record_is_one_clear_error(method, data, dense, tmp_path):
    with pytest.raises(SuiteError, match=f"{method} .*--matched prune.json"):
        tiny.train(tiny.spec(method), tmp_path, data, pretrained=dense / "weights.pt")


def test_weights_of_another_net_are_refused_by_name(data, dense, tmp_path):
    with pytest.raises(records.RecordError, match=r"weights\.pt"):
        tiny.train(tiny.spec("vd_finetune", "lenet5"), tmp_path, data, pretrained=dense / "weights.pt")


def test_batch_larger_than_the_training_set_is_refused(tmp_path):
    with pytest.raises(SuiteError, match="batch_size"):
        tiny.train(tiny.spec("dense", batch_size=1000), tmp_path, tiny.dataset(train=600))


class Payload:
    """What a malicious pickle does: run something as soon as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_weights_file_is_refused_not_run(data, tmp_path):
    torch.save({"fc1.weight": Payload(tmp_path / "executed")}, tmp_path / "weights.pt")
    with pytest.raises(records.RecordError, match=r"weights\.pt: not readable as weights"):
        tiny.train(tiny.spec("vd_finetune"), tmp_path / "run", data, pretrained=tmp_path / "weights.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"garbage"])
def test_damaged_weights_are_refused_by_name(damage, data, dense, tmp_path):
    (tmp_path / "weights.pt").write_bytes(damage((dense / "weights.pt").read_bytes()))
    with pytest.raises(records.RecordError, match=r"weights\.pt"):
        tiny.train(tiny.spec("vd_finetune"), tmp_path / "run", data, pretrained=tmp_path / "weights.pt")


# --- divergence


@pytest.fixture
def diverged(data, dense, tmp_path, monkeypatch):
    """A variational run that two epochs go well for, and its record."""
    real = training.learning_rate
    monkeypatch.setattr(training, "learning_rate", lambda recipe, epoch: real(recipe, epoch) if epoch < 2 else 1e30)
    spec = tiny.spec("vd_finetune", epochs=6)
    record = tiny.train(spec, tmp_path, data, pretrained=dense / "weights.pt")
    monkeypatch.undo()
    return spec, record


def test_diverged_run_keeps_the_last_good_epoch(diverged, data, tmp_path):
    spec, record = diverged
    assert record.status == "diverged"
    assert "epoch 3" in record.message
    assert record.metrics["epoch"] == len(history(tmp_path)) == 2
    weights = tiny.weights(tmp_path)
    assert all(bool(value.isfinite().all()) for value in weights.values())
    model = training.build_model(spec, 10, None)
    model.load_state_dict(weights)
    assert metrics.evaluate(model, data.eval_images, data.eval_labels)["error"] == record.metrics["error"]
    assert records.read(tmp_path / "train.json") == record


def test_diverged_run_is_pruned_as_diverged(diverged, data, tmp_path):
    spec, trained = diverged
    record = pruning.prune(spec, suite="tiny", output=tmp_path, data=data, weights=tmp_path / "weights.pt")
    assert (record.status, record.message) == ("diverged", trained.message)
    assert record.metrics["error"] == trained.metrics["error"]


def test_run_that_never_was_good_leaves_its_initial_weights(data, tmp_path):
    spec = tiny.spec("dense", learning_rate=1e30)
    record = tiny.train(spec, tmp_path, data)
    assert (record.status, record.metrics, history(tmp_path)) == ("diverged", {}, [])
    assert "epoch 1" in record.message
    initial = training.build_model(spec, 10, None).state_dict()
    assert all(torch.equal(value, initial[name]) for name, value in tiny.weights(tmp_path).items())
    pruned = pruning.prune(spec, suite="tiny", output=tmp_path, data=data, weights=tmp_path / "weights.pt")
    assert pruned.status == "diverged"


def test_a_parameter_that_is_no_number_after_the_last_step_is_divergence(data, tmp_path, monkeypatch):
    """Such a log_sigma2 would count as removed, and no loss has felt it yet."""
    step, taken = torch.optim.Adam.step, []

    def spoil(self):
        step(self)
        taken.append(None)
        if len(taken) == 12:  # two epochs
            with torch.no_grad():
                self.param_groups[1]["params"][0][0, 0] = torch.nan

    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    record = tiny.train(tiny.spec("vd_warmup"), tmp_path, data)
    assert (record.status, record.message) == ("diverged", "loss or weights stopped being numbers in epoch 2")
    assert all(value.isfinite().all() for value in tiny.weights(tmp_path).values())


def test_run_that_diverges_stops_at_once(data, tmp_path, steps):
    broken = replace(data, train_images=data.train_images * torch.nan)
    record = tiny.train(tiny.spec("dense", batch_size=2), tmp_path, broken)
    assert record.status == "diverged"
    assert steps.taken <= training.DIVERGENCE_CHECK_STEPS < 300
