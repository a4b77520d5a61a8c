"""Kill -9 at random moments, over a whole suite, until it is done: is the result an undisturbed run's?

`make faults` has the long campaign, over the smoke suite; .ci/run has a short one, over a small suite of every kind of
run. Killed are a job, Snakemake alone (its job lives on), or both together, after a random time; or a job kills itself
while it writes a file, see `dying.py`. After every kill each file that is in its place is read; then the documented
commands are given again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas

from vdbench import netfile, records, tensors
from vdbench.config import load_suite

ROOT = Path(__file__).parents[2]
SMALL = """\
suite: killed
timing: {batch_sizes: [1], threads: [1], rounds: 2, min_sample_s: 1.0e-4, backends: [torch_dense]}
experiments:
  fc:
    dataset: digits
    model: lenet300100
    seeds: [0]
    timed: [vd_finetune]
    methods:
      dense: {epochs: 12, batch_size: 20}
      vd_finetune: {epochs: 12, batch_size: 20, learning_rate: 2.0e-3, kl_warmup_epochs: 8}
      magnitude: {epochs: 12, batch_size: 20, prune_epochs: 8}
  words:
    dataset: text:words
    model: rnnlm_lstm_200
    seeds: [0]
    methods:
      dense: {epochs: 12, batch_size: 10, gradient_clip: 5}
      vd_warmup: {epochs: 12, batch_size: 10, gradient_clip: 5, initial_log_sigma2: -6}
"""
# files to die of the writing of, by the file that is made last; in the order in which they come
WRITES = {
    "train.json": ["resume.pt", "resume.pt", "weights.pt", "history.csv", "train.json", "progress.json"],
    "prune.json": ["pruned.npz", "prune.json"],
    "time.json": ["time.json"],
    "collected.csv": ["collected.csv"],
    "runs.tex": ["table1.csv", "runs.md"],
    "error_vs_compression.svg": ["error_vs_compression.png", "error_vs_compression.svg"],
}
KINDS = ("job", "snakemake", "group", "write")
LONGEST_S = 12.0  # from the start of Snakemake, or the last kill, to a kill
IN_A_ROW = 5  # jobs killed under one Snakemake
ROUND = 50  # kills at most, then the suite is let finish
SAME = ("table1.csv", "table1.md", "table1.tex")


class Campaign:
    """One checkout, killed over and over."""

    def __init__(self, folder: Path, seed: int, suite: str) -> None:
        self.folder, self.draw, self.counts = folder, random.Random(seed), Counter()
        for name in ("workflow", "vdbench", "configs"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc*", "*.tmp*"))
        shutil.copyfile(ROOT / "Snakefile", folder / "Snakefile")
        (folder / "suite.yaml").write_text(suite)
        self.suite = load_suite(folder / "suite.yaml").suite
        self.results = folder / "results" / self.suite
        # jobs are run by the `vdbench` beside the Python that runs Snakemake: here one that can be made to die
        self.python, command = folder / "bin" / "python", folder / "bin" / "vdbench"
        command.parent.mkdir()
        self.python.symlink_to(Path(sys.executable).resolve())
        command.write_text(f'#!/bin/sh\nexec {self.python} {Path(__file__).with_name("dying.py")} "$@"\n')
        command.chmod(0o755)
        words = folder / "mirror" / "words"
        words.mkdir(parents=True)
        for name, lines in {"train": 120, "valid": 20, "test": 20}.items():
            spoken = [" ".join(self.draw.choices("abcdefghij", k=12)) for _ in range(lines)]
            (words / f"{name}.txt").write_text("\n".join(spoken) + "\n")
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join((str(folder), sysconfig.get_paths()["purelib"])),
            "VDBENCH_MIRROR": str(folder / "mirror"),
            "VDBENCH_CACHE": str(folder / "cache"),
            "DYING_PLAN": str(folder / "dying.json"),
        }

    def start(self) -> subprocess.Popen[bytes]:
        """The documented commands: take off the lock of a Snakemake that was killed, and run."""
        command = [str(self.python), "-m", "snakemake", "--cores=1", "--configfile=suite.yaml"]
        if any((self.folder / ".snakemake" / "locks").glob("*")):
            unlock = subprocess.run([*command, "--unlock"], cwd=self.folder, env=self.environment, capture_output=True)
            assert unlock.returncode == 0, unlock.stderr.decode()
            self.counts["locks taken off"] += 1
        with (self.folder / "snakemake.log").open("ab") as log:
            return subprocess.Popen(
                [*command, "--workflow-profile=workflow/profiles/local"],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def undisturbed(self) -> None:
        """Run the suite in peace, and put the result aside."""
        process = self.start()
        assert process.wait() == 0, (self.folder / "snakemake.log").read_text()[-3000:]
        self.made = Counter(path.name for path in self.results.rglob("*.*"))
        self.results.rename(self.folder / "undisturbed")
        shutil.rmtree(self.folder / ".snakemake")

    def round(self, kills: int) -> None:
        """Run the suite from nothing to its end, killing, and compare; at most so many kills."""
        shutil.rmtree(self.results, ignore_errors=True)
        shutil.rmtree(self.folder / ".snakemake", ignore_errors=True)
        before = self.counts["kills"]
        while self._run(kill=self.counts["kills"] - before < kills) != 0:
            self.check_files()
        self.compare()
        self.counts["rounds"] += 1

    def _run(self, kill: bool) -> int:
        process, kind = self.start(), self.draw.choice(KINDS)
        try:
            if not kill:
                code = process.wait()
                assert code == 0, (self.folder / "snakemake.log").read_text()[-3000:]
                return code
            if kind in ("job", "write"):
                self._kill_jobs(process, kind)
                return process.wait()
            if not _ended(process, self._moment()):
                self._kill(process.pid, kind)
            return process.wait()
        finally:
            if kind != "snakemake":  # whose job lives on, on purpose
                _kill_group(process.pid)

    def _kill_jobs(self, process: subprocess.Popen[bytes], kind: str) -> None:
        """Up to `IN_A_ROW` jobs, one after the other, while Snakemake goes on with others; then everything."""
        for _ in range(IN_A_ROW):
            if kind == "write":
                self._let_one_die(process)
            elif not _ended(process, self._moment()):
                self._kill(process.pid, kind)
            if process.poll() is not None:
                return
            self.check_files()
        self._kill(process.pid, "group")

    def _let_one_die(self, process: subprocess.Popen[bytes]) -> None:
        """The job that next writes a certain file, if that happens soon."""
        plan, deadline = self._plan_death(), time.monotonic() + LONGEST_S
        while plan.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if plan.exists():
            plan.unlink(missing_ok=True)
        else:
            self._count("write", True)

    def _moment(self) -> float:
        return self.draw.uniform(0.3, LONGEST_S)

    def _kill(self, group: int, kind: str) -> None:
        everything = list(members(group))
        jobs = [pid for pid, command in everything if "dying.py" in command]
        victims = {"snakemake": [group], "group": [pid for pid, _ in everything], "job": jobs[:1]}[kind]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        self._count(kind, bool(jobs))

    def _plan_death(self) -> Path:
        """Let the job that next writes one of the files that are still to come die of it."""
        made = Counter(path.name for path in self.results.rglob("*.*"))
        pending = [names for last, names in WRITES.items() if made[last] < self.made[last]]
        name = self.draw.choice([name for names in pending[:2] for name in names] or ["progress.json"])
        passes = self.draw.choice((0, 1, 2, 5)) if name == "resume.pt" else 0
        plan = {"name": name, "moment": self.draw.choice(("begun", "half", "written", "replaced")), "passes": passes}
        path = self.folder / "dying.json"
        path.write_text(json.dumps(plan))
        return path

    def _count(self, kind: str, at_work: bool) -> None:
        self.counts["kills"] += kind != "job" or at_work
        self.counts[f"kills: {kind}"] += kind != "job" or at_work
        self.counts["kills while a job was at work"] += at_work
        print(f"kill {self.counts['kills']}: {kind}", flush=True)
        parts = list(self.results.rglob(f".*{records.PART}"))
        self.counts["kills that left a half-written temporary file"] += bool(parts)

    def check_files(self) -> None:
        """Read every file that is in its place. Raises what its reader raises."""
        for path in self.results.rglob("*"):
            if path.name.startswith("."):
                continue
            try:
                if path.name in ("train.json", "prune.json", "time.json"):
                    records.read(path)
                elif path.suffix == ".pt":
                    tensors.load_tensors(path)
                elif path.suffix == ".npz":
                    netfile.read_arrays(path)
                elif path.suffix in (".json", ".csv", ".md", ".svg"):
                    assert path.read_bytes().rstrip(b"\n ")[-1:], path
                    if path.suffix == ".json":
                        json.loads(path.read_bytes())
            except (FileNotFoundError, records.RecordError) as error:
                if path.exists():  # a job that outlived Snakemake may have replaced or removed it meanwhile
                    raise AssertionError(f"{path} is not whole") from error
                continue
            self.counts["files read after kills"] += path.suffix in (".json", ".pt", ".npz", ".csv", ".md", ".svg")

    def compare(self) -> None:
        """Every weight, net and table as in the undisturbed run; nothing left over of what was killed."""
        then, now = self.folder / "undisturbed", self.results
        made = {path.relative_to(now) for path in now.rglob("*") if path.is_file()}
        kept = {path.relative_to(then) for path in then.rglob("*") if path.is_file()}
        assert kept <= made, kept - made
        for name in sorted(kept):
            old, new = then / name, now / name
            if name.name == "weights.pt":
                old, new = (tensors.state_sha256(tensors.load_tensors(path)) for path in (old, new))
            elif name.name in ("train.json", "prune.json"):
                old, new = (_numbers(path) for path in (old, new))
            elif name.name == "runs.csv":
                old, new = (_untimed(path) for path in (old, new))
            elif name.suffix == ".npz" or name.name in SAME:
                old, new = old.read_bytes(), new.read_bytes()
            else:
                continue
            assert old == new, f"{name} is not what an undisturbed run made"
            self.counts["files compared"] += 1
        litter = [path for path in made if path.name in ("resume.pt", "progress.json")]
        litter += [path for path in made if path.name.endswith(records.PART) and "seed" in str(path)]
        assert not litter, litter
        logs = [path.read_text() for path in now.rglob("train.log.?")]
        self.counts["resumes"] += sum("resumed after epoch" in log for log in logs)
        self.counts["jobs that waited for one that outlived Snakemake"] += sum("is at work here" in log for log in logs)


def _numbers(path: Path) -> dict[str, Any]:
    """Of a record, what does not depend on when and how often it was tried."""
    record = records.read(path)
    assert record.message == ""
    return record.model_dump(exclude={"wall_s", "peak_rss_mb", "provenance"})


def _untimed(path: Path) -> str:
    return pandas.read_csv(path).drop(columns=["wall_s", "peak_rss_mb"]).to_csv()


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process ends within this time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def members(group: int) -> Iterator[tuple[int, str]]:
    """Process ids and command lines of a process group."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == group:
                yield int(entry.name), (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue


def _kill_group(group: int) -> None:
    for pid, _ in members(group):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suite", type=Path, help="suite file (default: a small suite)")
    parser.add_argument("--folder", type=Path, help="a new folder to work in, kept (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="report to write (JSON)")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "killed"
        folder.mkdir(parents=True)
        campaign = Campaign(folder.resolve(), args.seed, args.suite.read_text() if args.suite else SMALL)
        run(campaign, args.kills)
    minutes = round((time.monotonic() - started) / 60, 1)
    report = {
        "suite": campaign.suite,
        "seed": args.seed,
        **dict(sorted(campaign.counts.items())),
        "differences": 0,
        "minutes": minutes,
    }
    print(json.dumps(report, indent=1))
    if args.output:
        records.write_json(args.output, report)


def run(campaign: Campaign, kills: int) -> None:
    """Rounds until there have been so many kills. Raises AssertionError for the first difference."""
    campaign.undisturbed()
    while campaign.counts["kills"] < kills:
        campaign.round(min(ROUND, kills - campaign.counts["kills"]))
        print(json.dumps(campaign.counts), flush=True)


if __name__ == "__main__":
    main()
