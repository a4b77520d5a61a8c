"""Checkouts of one's own, for Snakemake to run small suites in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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
REPORTING = {("collect", ""), ("table", ""), ("plot", ""), ("all", "")}


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
