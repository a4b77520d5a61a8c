"""A suite through Slurm, on a Slurm of this machine's own: one training is cancelled on the way, one runs out of time,
one is killed, and results are to equal those of a local run.

    python tests/slurm/run.py [configs/smoke.yaml]

Runs the suite here first, which does nothing where that has been done, and then from an empty folder on Slurm. Installs
slurm-wlm and munge from the distribution if they are not there; says that it is skipped, and why, where that cannot be.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import cluster
from endings import Endings

from vdbench import current
from vdbench.config import Suite, load_suite

ROOT = Path(__file__).parent.parent.parent
PROFILE = "workflow/profiles/slurm"
# This Slurm knows no accounts and has one partition; jobs that take seconds are asked after every few seconds.
HERE = ["--default-resources", "slurm_account=test", "slurm_partition=cpu", "--latency-wait=10"]
HERE += ["--slurm-status-command=squeue", "--slurm-init-seconds-before-status-checks=3"]
WHOLE_SECONDS = 1.2  # records say when a job began to the second
RESULTS_THAT_TIME_DECIDES = ("speed", "runs")  # tables with seconds in them


def checkout(folder: Path, suite_file: Path) -> None:
    """What a run needs of this checkout, in a folder without results."""
    for name in ("workflow", "vdbench", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc", "__pycache__"))
    shutil.copyfile(ROOT / "Snakefile", folder / "Snakefile")
    shutil.copytree(ROOT / "results/recorded", folder / "results/recorded")
    shutil.copyfile(suite_file, folder / "suite.yaml")


def snakemake(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    """What Snakemake says; it runs in a session of its own, and what is left of that goes with us."""
    command = [sys.executable, "-m", "snakemake", "--nocolor", *arguments]
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = []
    try:
        assert process.stdout
        for line in process.stdout:
            said.append(line)
            if "Finished job" in line or "submitted" in line or "Error" in line or "restart" in line:
                print(f"  {line.rstrip()}", flush=True)
        if process.wait():
            raise SystemExit(f"{' '.join(command)} failed:\n{''.join(said[-100:])}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # upon which it cancels its jobs; SIGTERM would wait for them
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "".join(said)


def differences(suite: Suite, ours: Path, local: Path) -> list[str]:
    """What is not as in the local run: weights, tables, records that are missing."""
    found = []
    for stage, *run in suite.jobs():
        name = f"{'/'.join(map(str, run))} {stage}"
        (here, why), (there, _) = (current.find(folder, suite, stage, *run) for folder in (ours, local))
        if here is None or there is None or why:
            found.append(f"{name}: no record, or a stale one")
        elif here.weights_sha256 != there.weights_sha256 or here.metrics != there.metrics:
            found.append(
                f"{name}: {here.weights_sha256} {here.metrics}, locally {there.weights_sha256} {there.metrics}"
            )
    for table in sorted((local / "tables").glob("*.csv")):  # the others name the suite file, which has moved
        if not table.stem.startswith(RESULTS_THAT_TIME_DECIDES):
            made = ours / "tables" / table.name
            if not made.exists() or made.read_bytes() != table.read_bytes():
                found.append(f"{made}: not as in the local run")
    return found


def overlapping(suite: Suite, results: Path) -> list[str]:
    """Timing jobs during which another job ran."""
    spans = []
    for stage, *run in suite.jobs():
        record = current.find(results, suite, stage, *run)[0]
        if record is not None:
            # not by the file's time, which Snakemake sets anew at the end of a group
            begun = datetime.fromisoformat(record.provenance.started_at).timestamp()
            spans.append((stage, f"{'/'.join(map(str, run))} {stage}", begun, begun + record.wall_s))
    return [
        f"{name} was timed while {other} ran"
        for stage, name, start, end in spans
        if stage == "time"
        for _, other, begun, over in spans
        if other != name and begun < end - WHOLE_SECONDS and over > start + WHOLE_SECONDS
    ]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("suite", type=Path, nargs="?", default=ROOT / "configs/smoke.yaml")
    arguments.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="of the node (default: %(default)s)")
    args = arguments.parse_args()
    suite_file = args.suite.resolve()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    try:
        cluster.install()
    except cluster.Unavailable as reason:
        print(f"skipped: the suite was not run on Slurm: {reason}")
        return 0
    suite, began = load_suite(suite_file), time.monotonic()
    local = ROOT / "results" / suite.suite
    print(f"local run of {suite.suite}", flush=True)
    snakemake(ROOT, dict(os.environ), f"--cores={args.cpus}", "--configfile", str(suite_file))
    with tempfile.TemporaryDirectory(prefix="vdbench-suite.") as name:
        folder = Path(name)
        checkout(folder, suite_file)
        results = folder / "results" / suite.suite
        memory_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
        with cluster.running(args.cpus, memory_mb) as environment:
            print(f"Slurm is up; {suite.suite} on it", flush=True)
            endings = Endings(results, environment)
            endings.start()
            try:
                said = snakemake(
                    folder, environment, "--workflow-profile", PROFILE, *HERE, "--configfile", "suite.yaml"
                )
            finally:
                endings.over.set()
                endings.join()
            problems = list(endings.problems())
        submissions = said.count("has been submitted with SLURM jobid")
        problems += differences(suite, results, local) + overlapping(suite, results)
        if "Nothing to be done" not in snakemake(
            folder, dict(os.environ), "--cores", "1", "--configfile", "suite.yaml"
        ):
            problems.append("a local run after that on Slurm has something to do")
    print("\n".join(problems))
    if problems:
        return 1
    jobs = len(list(suite.jobs()))
    print(f"{jobs} jobs in {submissions} submissions, equal to the local run's, in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
