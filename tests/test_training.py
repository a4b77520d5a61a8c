"""Training: resumed runs end as undisturbed ones, seeds decide everything, schedules, divergence, bad inputs."""

import csv
import logging
import multiprocessing
import pickle
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from vdbench import metrics, provenance, pruning, records, schedules, stages, training
from vdbench.config import SuiteError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return tiny.dataset()


@pytest.fixture(scope="module")
def dense(data, tmp_path_factory):
    """The folder of a dense run, to start others from."""
    folder = tmp_path_factory.mktemp("dense")
    tiny.train(tiny.spec("dense"), folder, data)
    return folder


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_seconds(folder: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history(folder)]


def same_weights(one: Path, other: Path) -> bool:
    first, second = tiny.weights(one), tiny.weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def steps(monkeypatch):
    """Counts optimizer steps; `steps.stop_at` interrupts training before one of them."""

    class Steps:
        taken, stop_at = 0, None

    real_step = torch.optim.Adam.step

    def step(self):
        if Steps.taken == Steps.stop_at:
            raise KeyboardInterrupt
        Steps.taken += 1
        return real_step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    return Steps


def interrupt(steps, spec, folder, data, at_step):
    """Leave `resume.pt` behind."""
    steps.stop_at = at_step
    with pytest.raises(KeyboardInterrupt):
        tiny.train(spec, folder, data)
    steps.taken, steps.stop_at = 0, None


# --- resume


@pytest.fixture(scope="module")
def processes():
    """Real processes, forked from a server that has imported torch, so that none waits for imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vdbench.training", "vdbench.kernels", "torch._dynamo", "tiny"])
    return context


KILLS = [("step", 4), ("write resume.pt", 2), ("step", 8), ("wrote resume.pt", 1), ("wrote weights.pt", 1)]


@pytest.mark.parametrize(
    ("method", "model"),
    [("dense", "lenet300100"), ("vd_warmup", "lenet5"), ("magnitude", "lenet300100")],
)
def test_run_killed_at_any_moment_ends_as_an_undisturbed_one(method, model, processes, dense, tmp_path):
    spec = tiny.spec(method, model, epochs=5, batch_size=20, weight_decay=1e-5)
    inputs = {"pretrained": dense / "weights.pt", "matched": tiny.matched(tmp_path / "matched.json")}

    def exit_code(moment: tuple[str, int] | None, output: Path) -> int:
        process = processes.Process(target=tiny.train_until, args=(moment, spec, output), kwargs=inputs)
        process.start()
        process.join(300)
        return process.exitcode

    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    assert exit_code(None, undisturbed) == 0
    for moment in KILLS:
        assert exit_code(moment, disturbed) == -signal.SIGKILL, moment
        assert not (disturbed / "train.json").exists()
    assert exit_code(None, disturbed) == 0

    assert same_weights(disturbed, undisturbed)
    assert without_seconds(disturbed) == without_seconds(undisturbed)
    assert len(history(disturbed)) == 5
    ours, theirs = (records.read(folder / "train.json") for folder in (disturbed, undisturbed))
    assert (ours.metrics, ours.weights_sha256, ours.status) == (theirs.metrics, theirs.weights_sha256, "ok")


def test_resumed_run_does_not_repeat_finished_epochs(data, tmp_path, steps, monkeypatch, caplog):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    spec = tiny.spec("dense", epochs=4)
    interrupt(steps, spec, tmp_path, data, at_step=20)  # in the fourth epoch of six steps each
    caplog.set_level(logging.INFO, "vdbench")
    tiny.train(spec, tmp_path, data)
    assert steps.taken == 6
    assert "resumed after epoch 3" in caplog.text


def test_finished_run_whose_results_were_taken_back_is_not_trained_again(data, tmp_path, steps):
    spec = tiny.spec("vd_warmup", threshold=2.0)
    first = tiny.train(spec, tmp_path, data)
    taken = steps.taken
    for name in ("train.json", "weights.pt", "history.csv"):  # as Snakemake does when another job of a group fails
        (tmp_path / name).unlink()
    again = tiny.train(spec, tmp_path, data)
    assert steps.taken == taken > 0
    assert (again.weights_sha256, again.metrics) == (first.weights_sha256, first.metrics)
    assert again.wall_s >= first.wall_s
    pruning.prune(spec, suite="tiny", output=tmp_path, data=data, weights=tmp_path / "weights.pt")
    assert not (tmp_path / "resume.pt").exists()


def test_checkpoints_are_rare_enough_to_cost_nothing(data, tmp_path, steps):
    interrupt(steps, tiny.spec("dense"), tmp_path, data, at_step=14)
    assert not (tmp_path / "resume.pt").exists()


@pytest.mark.parametrize("other", [{"seed": 1}, {"learning_rate": 2e-3}, {"epochs": 3}])
def test_checkpoint_of_another_spec_is_ignored(other, data, tmp_path, steps, monkeypatch, caplog):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    interrupt(steps, tiny.spec("dense", **other), tmp_path / "used", data, at_step=8)
    spec = tiny.spec("dense", epochs=2)
    tiny.train(spec, tmp_path / "fresh", data)
    tiny.train(spec, tmp_path / "used", data)
    assert "starting over" in caplog.text
    assert same_weights(tmp_path / "used", tmp_path / "fresh")


def test_checkpoint_of_another_stage_version_is_ignored(data, tmp_path, steps, monkeypatch, caplog):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    interrupt(steps, tiny.spec("dense"), tmp_path, data, at_step=8)
    monkeypatch.setitem(stages.STAGE_VERSIONS, "train", 99)
    tiny.train(tiny.spec("dense"), tmp_path, data)
    assert "starting over" in caplog.text
    assert steps.taken == 18


def test_checkpoint_of_other_code_of_the_same_stage_version_goes_on_and_the_record_says_so(
    data, tmp_path, steps, monkeypatch
):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    interrupt(steps, tiny.spec("dense"), tmp_path / "cut", data, at_step=8)
    undisturbed = tiny.train(tiny.spec("dense"), tmp_path / "undisturbed", data)
    steps.taken = 0
    digest = undisturbed.code_digest
    monkeypatch.setattr(provenance, "code_digest", lambda: "that of other code")
    record = tiny.train(tiny.spec("dense"), tmp_path / "cut", data)
    assert steps.taken < 18
    assert record.message == f"code {digest} up to epoch 1, then that of other code"
    assert record.weights_sha256 == undisturbed.weights_sha256


def test_log_lines_go_around_the_progress_bar(data, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    console, written = logging.StreamHandler(sys.stdout), []
    monkeypatch.setattr(logging.getLogger(), "handlers", [*logging.getLogger().handlers, console])
    monkeypatch.setattr(training.tqdm, "write", lambda text, **_: written.append(text))
    tiny.train(tiny.spec("dense"), tmp_path, data, progress=True)
    assert [text.split()[1] for text in written] == ["1/3", "2/3", "3/3"]


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
