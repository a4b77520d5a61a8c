"""The workflow as people use it: what runs, what runs again, and what is left when it is done."""

import base64
import os
import re
import shutil
import subprocess
import sys

import pytest
from checkout import REPORTING, SUITE, Project

pytestmark = pytest.mark.slow

TIMED_RUN = ("time_inference", "fc/vd_warmup/0")
TIMED = {("time_inference", net) for net in ("fc/vd_warmup/0", "line/density0.5/0", "line/density0.25/0")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose tiny suite has been run."""
    made = Project(tmp_path_factory.mktemp("project"))
    done = made.snakemake()
    assert done.returncode == 0, done.stdout
    return made


@pytest.fixture
def project(finished):
    """The finished project; what a test changes in suite file or package is put back."""
    package = {path: path.read_bytes() for path in finished.folder.glob("vdbench/**/*.py")}
    yield finished
    finished.write(SUITE)
    for path, content in package.items():
        path.write_bytes(content)


def test_a_run_leaves_tables_figures_and_a_log_an_epoch(finished):
    results = finished.folder / "results/tiny"
    assert (results / "collected.csv").read_text().count("\n") == 1 + 7 + 2
    assert "this machine" in (results / "tables/table1.md").read_text()
    assert (results / "figures/error_vs_compression.svg").stat().st_size > 0
    assert re.search(r"^epoch 1/1 .*min left$", (results / "fc/dense/seed0/train.log").read_text(), re.MULTILINE)


def test_recorded_runs_are_shown_beside_those_of_this_machine(project):
    recorded = project.folder / "results/recorded/tiny"
    shutil.copytree(project.folder / "results/tiny", recorded)
    try:
        done = project.snakemake("results/tiny/tables/table1.md", "--force")
        assert done.returncode == 0, done.stdout
        table = (project.folder / "results/tiny/tables/table1.md").read_text()
        assert "recorded" in table and "this machine" in table
    finally:
        shutil.rmtree(recorded)
        project.snakemake()


def test_a_second_run_does_nothing(project):
    done = project.snakemake()
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout


def test_a_new_seed_runs_only_itself(project):
    project.write(SUITE.replace("seeds: [0]", "seeds: [0, 1]", 1))
    assert project.planned() == REPORTING | {
        ("pretrain", "fc/dense/1"),
        ("prune", "fc/dense/1"),
        ("vd_warmup", "fc/vd_warmup/1"),
        ("prune", "fc/vd_warmup/1"),
    }


def test_editing_an_experiment_reruns_only_that_experiment(project):
    project.write(SUITE.replace("dense: {epochs: 2}", "dense: {epochs: 3}"))
    assert project.planned() == REPORTING | {("pretrain", "other/dense/0"), ("prune", "other/dense/0")}


def test_editing_how_it_is_timed_retrains_nothing(project):
    project.write(SUITE.replace("rounds: 1", "rounds: 2"))
    assert project.planned() == REPORTING | TIMED


def test_a_new_density_times_only_itself(project):
    project.write(SUITE.replace("densities: [0.5, 0.25]", "densities: [0.5, 0.25, 0.125]"))
    assert project.planned() == REPORTING | {("time_inference", "line/density0.125/0")}


def test_comments_and_the_order_of_keys_rerun_nothing(project):
    lines = SUITE.splitlines()
    project.write("\n".join(["# a comment", *lines[2:], lines[1], lines[0]]) + "\n")
    assert project.planned() == set()


def test_where_data_comes_from_is_in_the_commands_and_reruns_nothing(project, fresh):
    named = "mirror: ../our mirror\n" + SUITE
    project.write(named)
    assert project.planned() == set()
    fresh.write(named)
    done = fresh.snakemake("--dry-run", "--printshellcmds")
    for verb in ("fetch", "train", "prune", "time"):
        commands = re.findall(rf"vdbench {verb} .*", done.stdout)
        assert commands and {"--mirror '../our mirror'" in command for command in commands} == {verb != "time"}


def test_editing_plots_retrains_nothing(project):
    for path in project.folder.glob("vdbench/plots/*.py"):
        path.write_text(path.read_text() + "\n# edited\n")
    assert project.planned() == set()


def raise_version(project: Project, stage: str) -> None:
    path = project.folder / "vdbench/stages.py"
    text, count = re.subn(rf'(?<="{stage}": )\d+', lambda found: str(int(found[0]) + 1), path.read_text(), count=1)
    assert count == 1
    path.write_text(text)


def test_raising_the_training_version_retrains(project):
    raise_version(project, "train")
    assert project.planned() == REPORTING | {
        ("pretrain", "fc/dense/0"),
        ("prune", "fc/dense/0"),
        ("vd_warmup", "fc/vd_warmup/0"),
        ("prune", "fc/vd_warmup/0"),
        ("pretrain", "other/dense/0"),
        ("prune", "other/dense/0"),
        *TIMED,
    }


def test_raising_the_timing_version_times_again(project):
    raise_version(project, "time")
    assert project.planned() == REPORTING | TIMED


def test_the_report_has_captions_and_categories(project):
    done = project.snakemake("--report", "report.html")
    assert done.returncode == 0, done.stdout
    text = (project.folder / "report.html").read_text()
    for expected in (
        "table1.html",
        "Table 1: error and compression",
        "error_vs_compression.png",
        "Tables",
        "Figures",
        "one point a run",
    ):
        assert expected in text


def test_recorded_runs_give_their_tables_without_data_or_training(project, fresh):
    environment = os.environ | {"PYTHONPATH": str(project.folder)}
    record = [sys.executable, "-m", "vdbench.cli", "record", "tiny.yaml"]
    done = subprocess.run(record, cwd=project.folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    advised = done.stdout.splitlines()[-1].split()
    assert advised[0] == "snakemake"
    recorded = fresh.folder / "results/recorded"
    shutil.move(project.folder / "results/recorded", recorded)
    assert fresh.planned("tables") == {("tables", "")}
    made = []
    for cores in ("--cores=1", ""):
        done = fresh.snakemake(*advised[1:], suite="", cores=cores)
        assert done.returncode == 0, done.stdout
        made.append(
            {path: path.read_bytes() for name in ("tables", "figures") for path in recorded.glob(f"tiny/{name}/*")}
        )
    assert {path.name for path in made[0]} >= {"table1.csv", "table1.md", "error_vs_compression.png"}
    assert made[0] == made[1]


def test_a_fetch_that_was_cut_off_hides_nothing_that_is_missing(project):
    """Its report is there, Snakemake has not noted that, and something that stands on it is missing."""
    report, missing = "results/tiny/data/digits.json", project.folder / "results/tiny/collected.csv"
    marker = project.folder / ".snakemake/incomplete" / base64.b64encode(report.encode()).decode()
    kept = missing.read_bytes()
    marker.touch()
    missing.unlink()
    try:
        assert project.planned("--rerun-incomplete") == {("collect", ""), ("all", "")}
    finally:
        missing.write_bytes(kept)
        marker.unlink()


def test_a_clock_that_was_set_back_repeats_what_is_quick_to_tell_from_files(project):
    """Weights from the future are newer than all that was made of them; what they are has not changed."""
    weights = project.folder / "results/tiny/fc/dense/seed0/weights.pt"
    stamps = weights.stat()
    os.utime(weights, (stamps.st_atime, stamps.st_mtime + 86400))
    try:
        assert project.planned() == REPORTING | {("prune", "fc/dense/0"), ("prune", "fc/vd_warmup/0"), TIMED_RUN}
    finally:
        os.utime(weights, (stamps.st_atime, stamps.st_mtime))
