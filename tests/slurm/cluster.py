"""A Slurm of one node, this machine, for as long as a `with` block lasts."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """\
ClusterName=vdbench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=bf_interval=2,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=5
MinJobAge=86400
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
    """There can be no Slurm on this machine; the message says why."""


def install() -> None:
    """See to it that Slurm's daemons are there, from the distribution's packages. Raises Unavailable."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    if os.geteuid() != 0:
        raise Unavailable("needs root, to install and start Slurm")
    if all(map(shutil.which, DAEMONS)):
        return
    if not shutil.which("apt-get"):
        raise Unavailable("there is no apt-get to install Slurm with")
    waiting = ["-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "-qq"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        try:
            done = subprocess.run(
                ["apt-get", *waiting, *command], env=environment, capture_output=True, text=True, timeout=300
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"apt-get {command[0]} took more than five minutes") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["without a word"])[-1]
            raise Unavailable(f"apt-get {command[0]} failed: {reason}")
    missing = [name for name in DAEMONS if not shutil.which(name)]
    if missing:
        raise Unavailable(f"{' '.join(PACKAGES)} brought no {', '.join(missing)}")


@contextlib.contextmanager
def running(cpus: int, memory_mb: int) -> Iterator[dict[str, str]]:
    """Start the three daemons, and stop them, and what they started, by process id. Yields the environment in which
    Slurm's commands find them."""
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="vdbench-slurm.") as name, contextlib.ExitStack() as stack:
        folder, host = Path(name), socket.gethostname().partition(".")[0]
        stack.callback(_stop, started)
        config = CONFIG.format(host=host, ports=_free_ports(2), folder=folder, cpus=cpus, memory_mb=memory_mb)
        (folder / "slurm.conf").write_text(config)
        for part in ("state", "spool"):
            (folder / part).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        environment = _finding(folder / "slurm.conf")
        munge = [f"--{what}={folder}/munge.{what.partition('-')[0]}" for what in ("socket", "key-file", "pid-file")]
        munge += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
        _start(started, folder, environment, ["munged", "--foreground", "--force", *munge])
        _until(lambda: (folder / "munge.socket").exists(), started, folder, "munged made no socket")
        _start(started, folder, environment, ["slurmctld", "-D"])
        _start(started, folder, environment, ["slurmd", "-D"])
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%n"]
        _until(lambda: host in _output(idle, environment), started, folder, "the node is not ready")
        stack.callback(_cancel_all, environment)
        yield environment


def _finding(config: Path) -> dict[str, str]:
    """The environment for a configuration that is not where Slurm looks. Snakemake's jobs call `srun` without any of
    Slurm's variables, so that one is told in a script of its name."""
    commands = config.parent / "bin"
    commands.mkdir()
    (commands / "srun").write_text(f'#!/bin/sh\nSLURM_CONF={config} exec {shutil.which("srun")} "$@"\n')
    (commands / "srun").chmod(0o755)
    return os.environ | {"SLURM_CONF": str(config), "PATH": os.pathsep.join((str(commands), os.environ["PATH"]))}


def _start(
    started: list[subprocess.Popen[bytes]], folder: Path, environment: dict[str, str], command: Sequence[str]
) -> None:
    with (folder / f"{command[0]}.out").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    started.append(process)


def _until(condition, started: list[subprocess.Popen[bytes]], folder: Path, otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline or any(process.poll() is not None for process in started):
            logs = "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in folder.glob("*.out"))
            raise RuntimeError(f"{otherwise}\n{logs}")
        time.sleep(0.2)


def _cancel_all(environment: dict[str, str]) -> None:
    """Jobs are not children of the daemons, so they have to end while those are there to end them."""
    _output(["scancel", "--user=root"], environment)
    deadline = time.monotonic() + 30
    while _output(["squeue", "--noheader"], environment) and time.monotonic() < deadline:
        time.sleep(0.2)


def _stop(started: list[subprocess.Popen[bytes]]) -> None:
    """The last one first: Slurm's before its authentication."""
    for process in reversed(started):
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _output(command: Sequence[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
