"""Resumed runs end as undisturbed ones, killed at whatever moment; a checkpoint of another run is left alone."""

import logging
import multiprocessing
import signal
from pathlib import Path

import pytest
import tiny
from tiny import history, same_weights

from vdbench import provenance, pruning, records, stages, training

pytestmark = pytest.mark.usefixtures("one_thread")


def without_seconds(folder: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history(folder)]


def interrupt(steps, spec, folder, data, at_step):
    """Leave `resume.pt` behind."""
    steps.stop_at = at_step
    with pytest.raises(KeyboardInterrupt):
        tiny.train(spec, folder, data)
    steps.taken, steps.stop_at = 0, None


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
