"""The record: one JSON a run and stage, that says by itself what was run, with what, and what came out."""

import contextlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vdbench.config import spec_sha256
from vdbench.mistakes import read_bounded

RESULT_VERSION = 1
STAGES = ("train", "prune", "time")
LARGEST = 64 << 20  # bytes of a record's file
PART = ".part"  # how the names of files end that are not yet in their place


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Layer(_Part):
    """One weight tensor; sparsity = zeros / total."""

    name: str
    shape: list[int]
    total: int
    nonzero: int
    sparsity: float


class Size(_Part):
    """Parameters of a pruned net. Biases are stated apart and log_sigma2 is never counted."""

    weights: int
    nonzero_weights: int
    biases: int
    sparsity: float
    compression_ratio: float = Field(description="|W| / |W != 0|")
    file_bytes: int | None = None


class MultiplyAdds(_Part):
    """Multiply-adds for one example, all of them and those with a weight that is not zero."""

    dense: int
    left: int
    theoretical_speedup: float


class Work(_Part):
    """What the weights that are left ask for, whatever way an engine goes about it: the sums over all layers."""

    multiply_adds: int = Field(description="for one example, those with padding left out")
    values: int = Field(description="numbers that go into and come out of layers, for one example")
    weights: int = Field(description="weights that are not zero")


def judged_by(measures: Collection[str]) -> str:
    """Which of its measures a net is judged by: the perplexity of a language model, the error of any other."""
    return "perplexity" if "perplexity" in measures else "error"


class _Measured(_Part):
    """What a net is judged by: the perplexity of a language model, the error in percent of any other."""

    error: float | None = None
    perplexity: float | None = None

    @property
    def value(self) -> float:
        """NaN where neither is known."""
        known = self.model_dump(include={"error", "perplexity"}, exclude_none=True)
        return known.get(judged_by(known), float("nan"))


class Control(_Measured):
    """The dense net a run is compared with."""

    weights_sha256: str


class CurvePoint(_Measured):
    threshold: float
    sparsity: float
    compression_ratio: float


class Words(_Part):
    """Which words a language model still tells apart, where some are dropped: a few examples each."""

    frequent_dropped: list[str] = Field(description="the most frequent ones that are not, most frequent first")
    rare_kept: list[str] = Field(description="the least frequent ones that are, least frequent first")


class LayerHistogram(_Part):
    """Weights of one layer counted by log alpha, in equal bins over [-8, 8]."""

    name: str
    counts: list[int]


class BackendTiming(_Part):
    """One backend in one setting: seconds a call, one entry an interleaved sample."""

    backend: str
    device: str
    threads: int
    batch_size: int
    steps: int = Field(1, description="words of every text in the batch, of a language model")
    samples_s: list[float]

    @property
    def examples(self) -> int:
        """Images in a call, or words."""
        return self.batch_size * self.steps

    @property
    def setting(self) -> tuple[int, int, int]:
        return self.threads, self.batch_size, self.steps

    @property
    def batch(self) -> str:
        """What a call is given, such as 64 images, or 64 x 35 words."""
        return f"{self.batch_size}" + (f" × {self.steps}" if self.steps > 1 else "")


class Provenance(_Part):
    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str]
    device: str
    cpu: str
    threads: int
    variance_dtype: str | None = Field(None, description="type in which a variational layer's variance is computed")
    deterministic: bool
    started_at: str
    command: str

    @property
    def hardware(self) -> str:
        """What computed: the GPU, else the CPU."""
        return self.cpu if self.device == "cpu" else self.device


class Record(_Part):
    result_version: Literal[1] = RESULT_VERSION
    suite: str
    experiment: str
    dataset: str
    model: str
    method: str
    stage: Literal["train", "prune", "time"]
    seed: int
    spec: dict[str, Any]
    spec_sha256: str
    versions: dict[str, int]
    code_digest: str
    status: Literal["ok", "diverged"]
    message: str = ""
    metrics: dict[str, float] = Field({}, description="of the last epoch; errors in percent")
    control: Control | None = None
    size: Size | None = None
    layers: list[Layer] = []
    multiply_adds: MultiplyAdds | None = None
    kept: dict[str, int] = Field({}, description="words, units and gates that a language model is left with")
    words: dict[Literal["read", "predicted"], Words] = Field({}, description="of a language model")
    threshold: float | None = None
    curve: list[CurvePoint] = []
    log_alpha_histogram: list[LayerHistogram] = []
    timing: list[BackendTiming] = []
    missing_backends: dict[str, str] = {}
    work: Work | None = None
    limits: dict[str, float] = Field({}, description="of one core, GFLOP/s, by where an operand comes from")
    history: str | None = Field(
        None, pattern=r"^[\w.-]+$", description="name of the CSV file beside the record, one row an epoch"
    )
    inputs: dict[str, str] = Field(
        {},
        description="of training: hashes of the `pretrained` and `matched` nets' weights, of the user's own `data`",
    )
    weights_sha256: str | None = None
    trained_sha256: str | None = Field(None, description="of the trained weights that a pruned net was made from")
    wall_s: float
    peak_rss_mb: float
    provenance: Provenance

    @property
    def value(self) -> float:
        """What the net is judged by: the perplexity of a language model, the error in percent of any other."""
        return self.metrics[judged_by(self.metrics)]

    @property
    def run(self) -> tuple[str, str, int]:
        return self.experiment, self.method, self.seed


class RecordError(ValueError):
    """A record that cannot be read or believed; the message names the file."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, synced, once the block succeeds.

    Raises OSError naming `path`, for a full disk say; what was there before is then still there.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write(record: Record, path: Path) -> None:
    write_json(path, record.model_dump(mode="json", exclude_defaults=True))


def read(path: Path) -> Record:
    """Read one record. Raises RecordError naming the file and what is wrong with it."""
    try:
        record = Record.model_validate_json(read_bounded(path, LARGEST))
    except FileNotFoundError:
        raise RecordError(f"{path}: no such record; run the job that makes it") from None
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}); delete it and rerun its job") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecordError(f"{path}: not a record ({where}: {first['msg']}); delete it and rerun its job") from None
    if spec_sha256(record.spec) != record.spec_sha256:
        raise RecordError(f"{path}: spec and spec_sha256 disagree; the file was edited: delete it and rerun its job")
    return record


def run_folder(results: Path, experiment: str, method: str, seed: int) -> Path:
    return results / experiment / method / f"seed{seed}"
