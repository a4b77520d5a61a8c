"""The workflow before anything runs: what each suite needs, what is sent where on clusters, and what is refused."""

import re
import threading
import time
from pathlib import Path

import pytest
from checkout import REPORTING, SUITE, TRAINED, UNTRAINED

pytestmark = pytest.mark.slow

FULL = (
    TRAINED
    + """\
      vd_finetune: {epochs: 2}
      vd_warmup: {epochs: 1}
      magnitude: {epochs: 2, prune_epochs: 1}
      random: {epochs: 2, prune_epochs: 1}
"""
)


def test_a_suite_of_untrained_nets_needs_no_data(fresh):
    fresh.write("suite: tiny\n" + UNTRAINED)
    assert fresh.planned() == REPORTING | {
        ("time_inference", "line/density0.5/0"),
        ("time_inference", "line/density0.25/0"),
    }


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
