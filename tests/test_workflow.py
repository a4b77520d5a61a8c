"""The workflow as people use it: what runs, what runs again, and what is refused before anything runs."""

import base64
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TRAINED = """\
suite: tiny
timing: {batch_sizes: [1], threads: [1], rounds: 1, min_sample_s: 1.0e-4, backends: [torch_dense]}
experiments:
  fc:
    dataset: digits
    model: lenet300100
    seeds: [0]
    timed: [vd_warmup]
    methods:
      dense: {epochs: 1}
      vd_warmup: {epochs: 1}
  other:
    dataset: digits
    model: lenet300100
    seeds: [0]
    methods:
      dense: {epochs: 2}
"""
UNTRAINED = """\
synthetic:
  linear:
    line: {inputs: 8, outputs: 4, densities: [0.5, 0.25]}
"""
SUITE = TRAINED + UNTRAINED
FULL = (
    TRAINED
    + """\
      vd_finetune: {epochs: 2}
      vd_warmup: {epochs: 1}
      magnitude: {epochs: 2, prune_epochs: 1}
      random: {epochs: 2, prune_epochs: 1}
"""
)
REPORTING = {("collect", ""), ("table", ""), ("plot", ""), ("all", "")}
TIMED_RUN = ("time_inference", "fc/vd_warmup/0")
TIMED = {("time_inference", net) for net in ("fc/vd_warmup/0", "line/density0.5/0", "line/density0.25/0")}


class Project:
    """A checkout of one's own, without results, in which the suite file is `tiny.yaml`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        passing = shutil.ignore_patterns("*.pyc*", "*.tmp*")  # other processes may be writing them
        for name in ("workflow", "vdbench", "configs"):
            shutil.copytree(ROOT / name, folder / name, ignore=passing)
        shutil.copyfile(ROOT / "Snakefile", folder / "Snakefile")
        self.write(SUITE)
        commands = folder / "bin"
        commands.mkdir()
        (commands / "vdbench").write_text(f'#!/bin/sh\nexec {sys.executable} -m vdbench.cli "$@"\n')
        (commands / "vdbench").chmod(0o755)

    def write(self, suite: str) -> None:
        (self.folder / "tiny.yaml").write_text(suite)

    def snakemake(
        self, *arguments: str, suite: str = "tiny.yaml", path: str = "", cores: str = "--cores=2"
    ) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join((path, str(self.folder))).strip(os.pathsep),
            "PATH": os.pathsep.join((str(self.folder / "bin"), os.environ["PATH"])),
        }
        command = [sys.executable, "-m", "snakemake", "--nocolor", *cores.split(), *arguments]
        command += ["--configfile", suite] if suite else []
        return subprocess.run(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def planned(self, *arguments: str, **options: str) -> set[tuple[str, str]]:
        """What a dry run would do: rule and run, such as ("prune", "fc/dense/0"); nothing for jobs of a whole suite."""
        done = self.snakemake("--dry-run", *arguments, **options)
        assert done.returncode == 0, done.stdout
        jobs = set()
        for block in re.split(r"\n(?=(?:local)?rule )", done.stdout)[1:]:
            rule = re.match(r"(?:local)?rule (\w+):", block)
            run = re.search(r"wildcards: .*experiment=([\w-]+), method=([\w.]+), seed=(\d+)", block)
            assert rule
            jobs.add((rule[1], "/".join(run.groups()) if run else ""))
        return jobs


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


@pytest.fixture
def fresh(tmp_path):
    return Project(tmp_path)


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


def test_a_suite_of_untrained_nets_needs_no_data(fresh):
    fresh.write("suite: tiny\n" + UNTRAINED)
    assert fresh.planned() == REPORTING | {
        ("time_inference", "line/density0.5/0"),
        ("time_inference", "line/density0.25/0"),
    }


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


def test_every_method_starts_from_what_it_needs(fresh):
    fresh.write(FULL)
    jobs = fresh.planned("results/tiny/other/random/seed0/prune.json")
    assert jobs == {
        ("fetch", ""),
        ("pretrain", "other/dense/0"),
        ("prune", "other/dense/0"),
        ("vd_finetune", "other/vd_finetune/0"),
        ("prune", "other/vd_finetune/0"),
        ("baseline", "other/random/0"),
        ("prune", "other/random/0"),
    }


def test_planning_imports_nothing_heavy_and_knows_the_default_suite(fresh):
    forbidding = fresh.folder / "forbidding"
    for name in ("torch", "sklearn", "scipy", "matplotlib"):
        package = forbidding / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise AssertionError('{name} imported')")
    jobs = fresh.planned(suite="", path=str(forbidding))
    assert ("vd_warmup", "lenet5-mnist/vd_warmup/0") in jobs


@pytest.mark.parametrize(
    ("suite", "named"),
    [
        (SUITE.replace("seeds:", "seed:", 1), "tiny.yaml: experiments.fc.seed: unknown key"),
        (SUITE.replace("epochs: 2", "epoch: 2"), "tiny.yaml: experiments.other.methods.dense.epoch: unknown key"),
        (SUITE.replace("digits", "digit", 1), "tiny.yaml: experiments.fc.dataset: "),
    ],
)
def test_a_mistyped_suite_is_refused_by_name_before_any_job(fresh, suite, named):
    fresh.write(suite)
    done = fresh.snakemake()
    assert done.returncode == 1
    assert named in done.stdout
    assert "Building DAG" not in done.stdout.partition(named)[2]
    assert not (fresh.folder / "results").exists()


def test_a_suite_is_one_file_and_what_it_says(fresh):
    overridden = fresh.snakemake("--dry-run", "--config", "description=other")
    assert overridden.returncode == 1
    assert "--config description: a suite is what its file says" in overridden.stdout
    merged = fresh.snakemake("--dry-run", "--configfile", "configs/smoke.yaml", suite="")
    assert merged.returncode == 0
    both = fresh.snakemake("--dry-run", "--configfile", "configs/smoke.yaml", "tiny.yaml", suite="")
    assert both.returncode == 1
    assert "one suite at a time" in both.stdout


def test_another_working_directory_is_refused_with_the_right_one(fresh):
    (fresh.folder / "elsewhere").mkdir()
    done = fresh.snakemake("--dry-run", "--directory", "elsewhere")
    assert done.returncode == 1
    assert f"in the project's folder, where results go too: cd {fresh.folder}" in done.stdout


def test_on_slurm_runs_of_minutes_share_a_submission_and_no_cpu_job_asks_for_a_gpu(fresh):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    fresh.write(FULL)
    done = fresh.snakemake("--dry-run", "--workflow-profile", "workflow/profiles/slurm", cores="")
    assert done.returncode == 0, done.stdout
    groups = re.findall(r"Group job (\w+) ", done.stdout)
    assert sorted(groups) == ["short_baseline", "short_dense", "short_variational"]
    assert "gpu=0" in done.stdout and "gpu=1" not in done.stdout
    timed = re.search(r"rule time_inference:.*?resources: ([^\n]*)", done.stdout, re.DOTALL)
    assert timed and "slurm_extra=--exclusive" in timed[1] and "cpus_per_task=1" in timed[1]


def test_on_kubernetes_every_file_is_found_in_the_volume(fresh):
    plugins = [pytest.importorskip(f"snakemake_{name}") for name in ("executor_plugin_kubernetes", "storage_plugin_fs")]
    beside = str(Path(plugins[0].__file__).parents[1])
    profile = ["--workflow-profile", "workflow/profiles/kubernetes", "--default-storage-prefix", str(fresh.folder)]
    done = fresh.snakemake("--dry-run", *profile, cores="", path=beside)
    assert done.returncode == 0, done.stdout
    trained = re.search(r"rule pretrain:.*?resources: ([^\n]*)", done.stdout, re.DOTALL)
    assert trained and "gpu=1, gpu_manufacturer=nvidia" in trained[1]


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


def test_a_second_snakemake_on_the_same_results_is_refused(fresh):
    fresh.write("suite: tiny\n" + TRAINED.partition("\n")[2])
    first = threading.Thread(target=fresh.snakemake, args=("results/tiny/data/digits.json",))
    first.start()
    locks = fresh.folder / ".snakemake/locks"
    while not any(locks.glob("*")):
        assert first.is_alive()
        time.sleep(0.05)
    second = fresh.snakemake("results/tiny/data/digits.json")
    first.join()
    assert second.returncode == 1
    assert "cannot be locked" in second.stdout and "--unlock" in second.stdout
    assert (fresh.folder / "results/tiny/data/digits.json").exists()
