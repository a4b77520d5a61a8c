"""`vdbench status`: what the files of a suite's runs say of them, live, and the exit status for scripts."""

import os
import time

import factory
import pytest
import yaml

from vdbench import cli, history, progress, records
from vdbench.progress import FAILED, NOT_YET
from vdbench.running import PROGRESS, at_work

SUITE = factory.suite(fc=factory.experiment(seeds=[0], timed=[], methods={"dense": {"epochs": 9}}))
RUN = "fc/dense/seed0"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the one run, as the suite in the current folder has it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE.model_dump(mode="json", exclude_defaults=True)))
    run = tmp_path / "results/synthetic" / RUN
    run.mkdir(parents=True)
    return run


def status(capsys) -> tuple[int, str]:
    code = cli.main(["status", "suite.yaml"])
    return code, capsys.readouterr().out


def begin(folder, **facts):
    (folder / PROGRESS).unlink(missing_ok=True)
    records.write_json(folder / PROGRESS, {"stage": "train", "process": "process 7 on node3", **facts})


FAR = {"epoch": 3, "epochs": 9, "loss": 0.25, "error": 2.5, "sparsity": 0.75, "seconds_left": 600, "peak_rss_mb": 812.3}


def test_a_job_at_work_is_shown_as_it_goes(folder, capsys):
    begin(folder, **FAR)
    code, out = status(capsys)
    assert code == NOT_YET
    line = next(line for line in out.splitlines() if line.startswith(RUN))
    assert line == f"{RUN}  running  missing  -     3/9    0.2500  2.50 %  75.00 %   10 min  812 MB"
    assert f"running: {RUN} train: process 7 on node3" in out
    assert "2 jobs: 1 running, 1 missing" in out


def test_perplexity_stands_for_the_error_of_a_language_model(folder, capsys):
    begin(folder, epoch=3, epochs=9, perplexity=113.4)
    assert "ppl 113.40" in status(capsys)[1]


def test_a_job_that_went_silent_was_interrupted(folder, capsys):
    begin(folder, **FAR)
    os.utime(folder / PROGRESS, (time.time() - 3600,) * 2)
    code, out = status(capsys)
    assert code == NOT_YET
    assert f"interrupted: {RUN} train: process 7 on node3, silent for 60 min" in out


def test_a_checkpoint_without_a_job_is_an_interrupted_run(folder, capsys):
    (folder / "resume.pt").write_bytes(b"")
    assert f"interrupted: {RUN} train: goes on from resume.pt" in status(capsys)[1]


def test_silence_is_measured_by_the_clock_of_the_files(folder, monkeypatch, capsys):
    """A machine whose clock is hours off sees the same."""
    begin(folder, **FAR)
    real = time.time
    for offset in (-7200, 7200):
        monkeypatch.setattr(time, "time", lambda offset=offset: real() + offset)
        assert "1 running" in status(capsys)[1]


def test_a_failed_job_says_of_what_and_where_its_log_is(folder, capsys):
    with pytest.raises(records.RecordError), at_work(folder, "train"):
        raise records.RecordError("weights.pt: gone; rerun its job")
    os.utime(folder / PROGRESS, (time.time() - 3600,) * 2)  # however long ago
    code, out = status(capsys)
    assert code == FAILED == 3
    assert f"failed: {RUN} train: weights.pt: gone; rerun its job (see results/synthetic/{RUN}/train.log)" in out


def test_a_failed_stage_is_not_that_of_another(folder, capsys):
    begin(folder, stage="prune", state="failed", failure="no")
    code, out = status(capsys)
    assert code == FAILED
    assert "2 jobs: 1 missing, 1 failed" in out


def test_what_is_done_says_what_came_out(folder, capsys):
    made = [factory.record(SUITE, "fc", "dense", 0, stage) for stage in ("train", "prune")]
    made[0] = made[0].model_copy(update={"metrics": {"epoch": 9, "error": 1.5, "loss": 0.125}, "peak_rss_mb": 900.0})
    made[1] = made[1].model_copy(update={"metrics": {"error": 1.75}})
    for record in made:
        records.write(record, folder / f"{record.stage}.json")
    code, out = status(capsys)
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith(RUN))
    assert line == f"{RUN}  done   done   -     9/9    0.1250  1.75 %  0.00 %    -     900 MB"


def test_a_stale_run_that_is_being_made_again_is_running(folder, capsys):
    other = factory.suite(fc=factory.experiment(seeds=[0], threshold=1.0))
    records.write(factory.record(other, "fc", "dense", 0, "train"), folder / "train.json")
    assert "1 stale" in status(capsys)[1]
    begin(folder, **FAR)
    assert "1 running" in status(capsys)[1]


def test_a_history_may_learn_a_column_on_the_way(tmp_path):
    history.write(tmp_path / "history.csv", [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "error": 3.0}])
    read = history.read(tmp_path / "history.csv")
    assert list(read) == ["epoch", "loss", "error"] and list(read["loss"]) == [0.5, 0.25]
    assert read["error"].isna().tolist() == [True, False] and read["error"][1] == 3.0


def test_durations_are_in_units_that_tell_something():
    shown = [progress.duration(seconds) for seconds in (5, 119, 120, 7140, 7200, 86400)]
    assert shown == ["5 s", "119 s", "2 min", "119 min", "2.0 h", "24.0 h"]
