"""What suites of 10, 1,000 and 20,000 runs cost before any of them is run, and 20,000 records after.

Targets: planning, building the workflow's graph and a dry run each within 5 s, 10 s and 3 min, growing with the number
of runs and no faster; collecting 20,000 records within 20 s and 1 GB. Each is a process of its own, as a user starts
it, and is measured by its processor time, which other work on the machine alters little. Nothing is asserted of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import factory
import pytest
import yaml

from vdbench import records
from vdbench.config import Suite, parse_suite, spec_sha256

ROOT = Path(__file__).parent.parent.parent
SECONDS = {10: 5.0, 1_000: 10.0, 20_000: 180.0}
RECORDS, RECORDS_SECONDS, RECORDS_MB = 20_000, 20.0, 1_000.0
_DRY_RUN = ["snakemake", "--dry-run", "--quiet", "all", "--snakefile", str(ROOT / "Snakefile")]
_ON_SLURM = ["--workflow-profile", str(ROOT / "workflow/profiles/slurm")]  # where jobs are grouped too
COMMANDS = {
    "plan": ["vdbench.cli", "plan"],
    "dry run": [*_DRY_RUN, "--cores=8", "--configfile"],
    "dry run for Slurm": [*_DRY_RUN, *_ON_SLURM, "--configfile"],
}


def content_of(runs: int) -> dict[str, Any]:
    """A suite of all five methods and at most ten seeds an experiment."""
    seeds = list(range(min(10, runs // 5)))
    experiments = {f"net{i}": factory.experiment(seeds=seeds, timed=[]) for i in range(runs // (5 * len(seeds)))}
    return {"suite": "scale", "experiments": experiments}


def cost(folder: Path, *command: str) -> dict[str, float]:
    """Processor seconds and peak memory of one command, run in a folder."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        assert process.returncode == 0, said.read()[-2000:]
    return {"processor_s": round(used.ru_utime + used.ru_stime, 2), "peak_mb": round(used.ru_maxrss / 1024)}


@pytest.mark.parametrize("runs", SECONDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_before_a_suite(benchmark, name, runs, tmp_path, capsys):
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content_of(runs)))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    found = benchmark.pedantic(cost, (tmp_path, *COMMANDS[name], "suite.yaml"))
    found |= {
        "of_target": round(found["processor_s"] / SECONDS[runs], 2),
        "ms_a_run": 1e3 * found["processor_s"] / runs,
    }
    benchmark.extra_info.update(found)
    with capsys.disabled():
        print(f"\n{name}, {runs:,} runs: {found['processor_s']} s, {found['of_target']} of the target")


def write_records(suite: Suite, folder: Path) -> None:
    """Records like those of the LeNet-300-100 that the project ships, in every place of a suite."""
    shipped = ROOT / "results/recorded/paper/lenet300100-mnist"
    for stage, experiment, method, seed in suite.jobs():
        spec = suite.spec_of(stage, experiment, method, seed)
        content = json.loads((shipped / method / "seed0" / f"{stage}.json").read_text())
        content |= {"suite": suite.suite, "experiment": experiment, "seed": seed}
        content |= {"spec": spec, "spec_sha256": spec_sha256(spec), "weights_sha256": "0", "trained_sha256": "0"}
        place = records.run_folder(folder, experiment, method, seed)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{stage}.json").write_text(json.dumps(content, indent=1))


def test_collecting(benchmark, tmp_path, capsys):
    content = content_of(RECORDS // 2)  # each is trained and pruned
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    write_records(parse_suite(content, "suite.yaml"), tmp_path / "results/scale")
    found = benchmark.pedantic(cost, (tmp_path, "vdbench.cli", "collect", "suite.yaml"))
    assert (tmp_path / "results/scale/collected.csv").read_text().count("\n") == 1 + RECORDS
    found |= {"of_target": round(found["processor_s"] / RECORDS_SECONDS, 2)}
    benchmark.extra_info.update(found)
    with capsys.disabled():
        print(
            f"\ncollecting {RECORDS:,} records: {found['processor_s']} s of processor time, {found['of_target']} of the"
            f" target, and {found['peak_mb']:,} MB of {RECORDS_MB:,.0f}"
        )
