"""What a cluster does to jobs: one training of each kind of run has its job ended, each in another way."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

METHODS = {
    "cancelled": ("dense",),
    "out of time": ("vd_finetune", "vd_warmup"),
    "killed": ("magnitude", "random"),  # as the kernel does when memory runs out: this Slurm limits none
}
STATES = {
    "cancelled": ("CANCELLED",),
    "out of time": ("TIMEOUT", "FAILED"),  # the latter if what it runs notices the signal and ends before Slurm ends it
    "killed": ("FAILED",),
}
MORE = {"MinMemoryNode", "TimeLimit"}  # what another attempt is to get more of


class Endings(threading.Thread):
    """Ends one job in each way, as soon as it has left a checkpoint that it can go on from."""

    def __init__(self, results: Path, environment: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self.results, self.environment = results, environment
        self.jobs: dict[str, str] = {}  # how it ended: the Slurm job
        self.cut_off: dict[str, list[Path]] = {}  # how it ended: the folders whose training it cut off
        self.over = threading.Event()

    def run(self) -> None:
        while len(self.jobs) < len(METHODS) and not self.over.wait(0.1):
            for how, process, job in self._chances():
                self._end(how, process, job)
                while self.describe(job)["JobState"] in ("RUNNING", "COMPLETING") and not self.over.wait(0.1):
                    pass
                # before it is started again
                self.cut_off[how] = list(self._unfinished(how))
                break

    def _chances(self) -> Iterator[tuple[str, int, str]]:
        """How a job can be ended now, the process of its training, and the job."""
        for how in METHODS.keys() - self.jobs.keys():
            for folder in self._unfinished(how):
                for process, job in self._trainings(folder):
                    yield how, process, job

    def _unfinished(self, how: str) -> Iterator[Path]:
        for method in METHODS[how]:
            for checkpoint in self.results.glob(f"*/{method}/seed*/resume.pt"):
                if not (checkpoint.parent / "weights.pt").exists():  # else what is there is all of it
                    yield checkpoint.parent

    def _trainings(self, folder: Path) -> Iterator[tuple[int, str]]:
        """The processes that train in a folder, and the Slurm jobs they belong to, from their environments."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                variables = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            # not Snakemake, nor the shells that started it
            if b"train" in words and os.fsencode(folder.relative_to(self.results.parents[1])) in words:
                found = [value.partition(b"=")[2] for value in variables if value.startswith(b"SLURM_JOB_ID=")]
                if found:
                    yield int(process.name), found[0].decode()

    def _end(self, how: str, process: int, job: str) -> None:
        print(f"job {job}, which trains, is to be {how}", flush=True)
        self.jobs[how] = job
        if how == "killed":
            os.kill(process, signal.SIGKILL)
        elif how == "cancelled":
            self._slurm("scancel", job)
        else:  # limits are whole minutes, this is one of seconds; Slurm looks every half minute
            self._slurm("scontrol", "update", f"JobId={job}", "EndTime=now+1")

    def describe(self, job: str) -> dict[str, str]:
        """What Slurm says of a job, one word to a key."""
        return dict(re.findall(r"(\w+)=(\S*)", self._slurm("scontrol", "--oneliner", "show", "job", job)))

    def _slurm(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def problems(self) -> Iterator[str]:
        """What did not end as meant, or was not tried again with more, from where it was; while Slurm still runs."""
        said = self._slurm("scontrol", "--oneliner", "show", "job").splitlines()
        everything = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in said]
        for how in METHODS:
            if how not in self.jobs:
                yield f"no job was {how}: none left a checkpoint before it ended"
                continue
            ended = self.describe(self.jobs[how])
            if ended["JobState"] not in STATES[how]:
                yield f"job {ended['JobId']} was to be {how}, and is {ended['JobState']}"
            again = [
                job
                for job in everything
                if Path(job["StdOut"]).parent == Path(ended["StdOut"]).parent
                and int(job["JobId"]) > int(ended["JobId"])
            ]
            if not again:
                yield f"job {ended['JobId']} was {how}, and not tried again"
            elif not all(_amount(again[0][key]) > _amount(ended[key]) for key in MORE):
                yield f"job {ended['JobId']} was {how}, and tried again with no more memory and time"
            for folder in self.cut_off[how]:
                said = (folder / "train.log").read_text().splitlines()
                resumed = [line for line in said if line.startswith("resumed after epoch")]
                print(f"{how}: {folder.relative_to(self.results)} {', '.join(resumed)}")
                if not resumed:
                    yield f"{folder} was trained from the start again after its job had been {how}"


def _amount(limit: str) -> float:
    """Of memory, as `4000M` or `4G`, or time, as `1-02:03:04`."""
    if limit[-1] in "MG":
        return float(limit[:-1]) * (1024 if limit[-1] == "G" else 1)
    days, _, clock = limit.rpartition("-")
    hours, minutes, _ = map(int, clock.split(":"))
    return int(days or 0) * 1440 + hours * 60 + minutes
