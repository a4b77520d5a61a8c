"""Where a number came from: code, versions, hardware. No host names, no absolute paths."""

import hashlib
import platform
import resource
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vdbench.records import Provenance

PACKAGE = Path(__file__).parent
RECORDED_PACKAGES = ("vdbench", "torch", "triton", "numpy", "scipy", "numba", "llvmlite")
RECORDED_PACKAGES += ("onnxruntime", "openvino", "MNN", "mkl", "sparse_dot_mkl")  # engines that are timed


def code_digest() -> str:
    """Hash of the package's source: tells, for information, whether two records come from the same code."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE.parent), *args], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def gpu_model() -> str | None:
    """The GPU that torch can use, if any."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def hardware(device: str) -> str:
    """What computes on a device, as torch names it: the GPU's name or the CPU's."""
    return gpu_model() or device if device == "cuda" else cpu_model()


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_rss_mb() -> float:
    """The most memory this process has held at once."""
    scale = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20, 1)


@dataclass(frozen=True)
class Code:
    """The package's source at one moment; commit and dirty are None where it is not under version control."""

    digest: str
    commit: str | None
    dirty: bool | None


def code() -> Code:
    """The code as it is now: for a job to ask when it starts, for files may change while it runs."""
    if _git("ls-files", "--error-unmatch", str(PACKAGE)) is None:
        return Code(code_digest(), None, None)
    changed = _git("status", "--porcelain", "--untracked-files=no")
    added = _git("ls-files", "--others", "--", str(PACKAGE / "*.py"))
    return Code(code_digest(), _git("rev-parse", "HEAD"), bool(changed or added))


def provenance(
    code: Code, device: str, started_at: str, command: str, matmul_precision: str | None = None
) -> Provenance:
    """This process, its machine and the code it started with. `device` as torch names it: "cpu", "cuda"; the precision
    is what the recipe asks for."""
    import torch

    from vdbench import posterior

    return Provenance(
        git_commit=code.commit,
        git_dirty=code.dirty,
        versions=package_versions(),
        device=hardware(device) if device == "cuda" else "cpu",
        cpu=cpu_model(),
        threads=torch.get_num_threads(),
        variance_dtype=posterior.variance_dtype(device, matmul_precision),
        deterministic=device == "cpu",
        started_at=started_at,
        command=command,
    )
