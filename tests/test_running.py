"""Jobs at work: alone in their folder, saying how far they are, and keeping the logs of past runs."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny

from vdbench import records, running, training
from vdbench.mistakes import first_line, in_one_line
from vdbench.running import Progress, at_work, read_progress

ROOT = Path(__file__).parent.parent


def wait_for(condition, what: str) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come")


def test_a_job_says_how_far_it_is_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "BEAT_S", 0.01)
    with at_work(tmp_path / "run", "train") as work:
        assert not work.waited
        found, _ = read_progress(tmp_path / "run")
        assert (found.stage, found.state, found.epoch) == ("train", "running", None)
        assert f"process {os.getpid()} on " in found.process
        work.report({"epoch": 3, "epochs": 9, "loss": 0.5, "error": 2.0, "sparsity": 0.9, "seconds_left": 60.0})
        wait_for(lambda: read_progress(tmp_path / "run")[0].epoch == 3, "the next beat")
        found, _ = read_progress(tmp_path / "run")
        assert (found.loss, found.error, found.sparsity, found.seconds_left) == (0.5, 2.0, 0.9, 60.0)
        assert found.peak_rss_mb > 10
    assert {path.name for path in (tmp_path / "run").iterdir()} == {running.LOCK}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (records.RecordError("weights.pt: gone; rerun its job"), "weights.pt: gone; rerun its job"),
        (OSError(28, "No space left on device", "a.pt"), "a.pt: No space left on device; make room there"),
        (KeyboardInterrupt(), "interrupted"),
        (RuntimeError("two\nlines"), "RuntimeError: two lines"),
    ],
)
def test_a_job_that_fails_says_of_what(error, said, tmp_path):
    with pytest.raises(type(error)), at_work(tmp_path, "prune"):
        raise error
    found, _ = read_progress(tmp_path)
    assert (found.stage, found.state) == ("prune", "failed")
    assert found.failure.startswith(said)
    assert in_one_line(error) == found.failure


@pytest.mark.parametrize(
    ("said", "expected"), [("\n\n a  b\nand more", "a b"), ("a\rb", "a"), (" \n", "ValueError"), ("", "ValueError")]
)
def test_the_first_line_of_a_message_is_the_first_that_says_something(said, expected):
    assert first_line(ValueError(said)) == expected


def test_what_a_killed_job_was_writing_is_swept(tmp_path):
    half = tmp_path / f".weights.pt.abc{records.PART}"
    half.write_bytes(b"half")
    (tmp_path / ".other").write_bytes(b"not ours")
    with at_work(tmp_path, "train"):
        assert not half.exists()
    assert (tmp_path / ".other").exists()


def test_two_jobs_are_never_in_one_folder_at_once(tmp_path, caplog):
    order = []

    def second() -> None:
        with at_work(tmp_path, "train") as work:
            order.append(("second", work.waited))

    with at_work(tmp_path, "train"):
        thread = threading.Thread(target=second)
        thread.start()
        wait_for(lambda: "is at work here: waiting for its end" in caplog.text, "the second job")
        order.append(("first", False))
    thread.join()
    assert order == [("first", False), ("second", True)]
    assert f"the train job of process {os.getpid()} on " in caplog.text


def test_the_lock_of_a_killed_job_holds_nobody_up(tmp_path):
    code = "import sys, time; from pathlib import Path; from vdbench.running import at_work\n"
    code += "with at_work(Path(sys.argv[1]), 'train'): time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_for(lambda: read_progress(tmp_path) is not None, "the job")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert read_progress(tmp_path)[0].state == "running"  # as far as anybody has said
    with at_work(tmp_path, "train") as work:
        assert not work.waited


def test_a_file_system_without_locks_is_said_and_no_obstacle(tmp_path, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with at_work(tmp_path, "train") as work:
        assert not work.waited
    assert "no locks on this file system (No locks available): see to it" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": 3}', '{"stage": "train", "loss": NaN}'])
def test_a_damaged_progress_file_is_no_progress(content, tmp_path):
    (tmp_path / running.PROGRESS).write_text(content)
    assert read_progress(tmp_path) is None


def test_the_result_of_the_job_waited_for_is_taken(tmp_path, one_thread, monkeypatch):
    made = tiny.train(tiny.spec("dense"), tmp_path)
    monkeypatch.setattr("torch.optim.Adam.step", lambda self: pytest.fail("trained again"))
    assert tiny.train(tiny.spec("dense"), tmp_path, waited=True) == made


@pytest.mark.parametrize("spoil", ["train.json", "weights.pt", "history.csv", "threads", "spec"])
def test_another_result_or_half_of_one_is_not(spoil, tmp_path, one_thread, monkeypatch):
    made = tiny.train(tiny.spec("dense"), tmp_path)
    spec = tiny.spec("dense", epochs=2) if spoil == "spec" else tiny.spec("dense")
    if spoil == "threads":
        content = json.loads((tmp_path / "train.json").read_text())
        content["provenance"]["threads"] = 7
        (tmp_path / "train.json").write_text(json.dumps(content))
    elif spoil != "spec":
        (tmp_path / spoil).unlink()
    again = tiny.train(spec, tmp_path, waited=True)
    assert again.provenance.started_at >= made.provenance.started_at and again != made
    assert records.read(tmp_path / "train.json") == again


def test_training_reports_every_epoch(tmp_path, one_thread):
    told = []
    record = tiny.train(tiny.spec("vd_warmup"), tmp_path, report=told.append)
    assert [Progress(stage="train", **facts).epoch for facts in told] == [1, 2, 3]
    assert told[-1]["epochs"] == 3 and told[-1]["seconds_left"] == 0
    assert told[-1]["loss"] == record.metrics["loss"] and told[-1]["error"] == record.metrics["error"]


def test_logs_of_past_runs_are_kept(tmp_path):
    log = tmp_path / "logs" / "collect.log"
    command = [sys.executable, "-m", "vdbench.cli", "collect", "missing.yaml", "--log", str(log)]

    def run() -> None:
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")

    run()
    assert log.read_text().startswith("vdbench: error: missing.yaml: no such suite file")
    log.unlink()  # as Snakemake does before it runs a job again
    first = log.with_name("collect.log.1")
    first.write_text("the run before")
    for number in range(2, 10):
        log.with_name(f"collect.log.{number}").write_text(str(number))
    run()
    assert log.read_text() == first.read_text() != "the run before"
    assert log.with_name("collect.log.2").read_text() == "the run before"
    assert log.with_name("collect.log.9").read_text() == "8"
    assert {path.name for path in log.parent.iterdir()} == {"collect.log", *(f"collect.log.{n}" for n in range(1, 10))}


def test_checkpoints_are_what_a_waiting_job_goes_on_from(tmp_path, one_thread, monkeypatch, caplog):
    """The job waited for was killed: its checkpoint counts, and no result is there to be taken."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    caplog.set_level("INFO", "vdbench")

    def killed(facts):
        if facts["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.train(tiny.spec("dense"), tmp_path, report=killed)
    tiny.train(tiny.spec("dense"), tmp_path, waited=True)
    assert "resumed after epoch 1" in caplog.text
