"""Provenance: enough to say where a number came from, and nothing about who ran it where."""

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from vdbench import provenance, pruning
from vdbench.config import Timing
from vdbench.job import Job
from vdbench.timing import time_inference


def strings(content: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(content, dict):
        yield from (text for item in content.items() for part in item for text in strings(part))
    elif isinstance(content, list):
        yield from (text for item in content for text in strings(item))
    elif isinstance(content, str):
        yield content


def assert_says_nothing_of_the_machine(path: Path) -> None:
    for text in strings(json.loads(path.read_text())):
        assert not re.search(r"(^|[\s=:'\"])(/|~/|[A-Z]:\\)\w", text), text
        assert not re.search(rf"\b{re.escape(platform.node())}\b", text), text


@pytest.mark.usefixtures("one_thread")
def test_records_of_every_stage_name_no_host_and_no_absolute_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/opt/bin/vdbench", "train", "--output", str(tmp_path)])
    spec = tiny.spec("dense", epochs=1)
    data = tiny.dataset(train=100, evaluation=20)
    tiny.train(spec, tmp_path, data)
    pruning.prune(spec, suite="tiny", output=tmp_path, data=data, weights=tmp_path / "weights.pt")
    timed = spec.model_copy(update={"timing": Timing(batch_sizes=[1], threads=[1], rounds=1, backends=["torch_dense"])})
    time_inference(timed, suite="tiny", output=tmp_path, pruned=tmp_path / "pruned.npz")
    for stage in ("train", "prune", "time"):
        assert_says_nothing_of_the_machine(tmp_path / f"{stage}.json")


def test_the_check_above_would_notice(tmp_path):
    for text in ("/home/someone/runs", "vdbench train --output=/tmp/x", f"ran on {platform.node()}", "~/runs"):
        (tmp_path / "record.json").write_text(json.dumps({"a": [text]}))
        with pytest.raises(AssertionError):
            assert_says_nothing_of_the_machine(tmp_path / "record.json")


def test_command_is_the_verb_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "/home/someone/suite.yaml"])
    record = Job("train", tiny.spec("dense"), "tiny").record(device="cpu", status="ok")
    assert record.provenance.command == "vdbench train"


def test_versions_are_those_installed():
    versions = provenance.package_versions()
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert "numpy" in versions


def test_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(provenance, "RECORDED_PACKAGES", ("numpy", "no-such-package"))
    assert provenance.package_versions().keys() == {"python", "numpy"}


def test_threads_and_determinism_are_what_the_run_had(one_thread):
    code = provenance.code()
    made = provenance.provenance(code, "cpu", "2026-01-01T00:00:00+00:00", "vdbench train")
    assert (made.threads, made.device, made.deterministic) == (1, "cpu", True)
    torch.set_num_threads(2)
    assert provenance.provenance(code, "cpu", "2026-01-01T00:00:00+00:00", "vdbench train").threads == 2


# --- the code's own state


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository with a package in it that stands for ours; `git` runs there."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    package = tmp_path / "vdbench"
    package.mkdir()
    (package / "a.py").write_text("one = 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)

    def git(*args: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *args], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    return git


def state() -> tuple[str | None, bool | None]:
    code = provenance.code()
    return code.commit, code.dirty


def test_commit_and_whether_files_were_changed_since(checkout):
    commit = checkout("rev-parse", "HEAD")
    assert state() == (commit, False)
    (provenance.PACKAGE / "new_result.json").write_text("{}")  # no change of the code
    assert state() == (commit, False)
    (provenance.PACKAGE / "a.py").write_text("one = 2\n")
    assert state() == (commit, True)


def test_a_module_that_was_never_committed_is_a_change_of_the_code(checkout):
    new = provenance.PACKAGE / "sub" / "new.py"
    new.parent.mkdir()
    new.write_text("two = 2\n")
    assert state() == (checkout("rev-parse", "HEAD"), True)


def test_record_names_the_code_that_its_job_started_with(checkout):
    job = Job("train", tiny.spec("dense"), "tiny")
    commit, digest = checkout("rev-parse", "HEAD"), provenance.code_digest()
    (provenance.PACKAGE / "a.py").write_text("one = 2\n")
    checkout("commit", "--quiet", "--all", "-m", "second")
    (provenance.PACKAGE / "a.py").write_text("one = 3\n")
    record = job.record(device="cpu", status="ok")
    assert (record.provenance.git_commit, record.provenance.git_dirty) == (commit, False)
    assert record.code_digest == digest != provenance.code_digest()


def test_without_a_repository_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "vdbench")
    assert state() == (None, None)


def test_without_git_the_commit_is_unknown(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert state() == (None, None)


def test_commit_of_another_project_that_vdbench_is_installed_in_is_not_ours(checkout, monkeypatch):
    installed = provenance.PACKAGE.parent / ".venv" / "lib" / "vdbench"
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance, "PACKAGE", installed)
    assert state() == (None, None)


def digest(package: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(provenance, "PACKAGE", package)
    return provenance.code_digest()


def test_code_digest_is_of_the_names_and_contents_of_the_source(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "x.py").write_text("1")
        (tmp_path / folder / "sub" / "y.py").write_text("2")
    first = digest(tmp_path / "a", monkeypatch)
    assert digest(tmp_path / "b", monkeypatch) == first  # wherever it lies
    (tmp_path / "b" / "note.txt").write_text("no code")
    assert digest(tmp_path / "b", monkeypatch) == first
    (tmp_path / "b" / "x.py").rename(tmp_path / "b" / "z.py")
    renamed = digest(tmp_path / "b", monkeypatch)
    (tmp_path / "b" / "sub" / "y.py").write_text("3")
    assert len({first, renamed, digest(tmp_path / "b", monkeypatch)}) == 3


def test_memory_is_in_mebibytes():
    before = provenance.peak_rss_mb()
    ballast = bytearray(64 * 2**20)
    ballast[:: 2**12] = b"x" * len(ballast[:: 2**12])  # touched, so that it is held
    assert before < 20_000
    assert provenance.peak_rss_mb() >= max(before, 64)
