"""Fixtures that tests of several files share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import factory
import pytest
import tiny
import torch
from checkout import Project
from publishing import World
from sparse_net import EXAMPLE, network
from tiny_suite import SUITE, run_jobs, write_suite

from vdbench import cli, config, data, files, posterior
from vdbench.sparse import compile_sparse


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, so that sums have one order, and torch's global settings as they were afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


@pytest.fixture(params=["fused", "plain", "float64"])
def dtype(request, monkeypatch) -> torch.dtype:
    """The number type of a test that runs once on every path: float32 through the kernels, float32 and float64 through
    torch."""
    if request.param == "plain":
        monkeypatch.setattr(posterior, "is_fused", lambda *tensors: False)
    elif request.param == "fused":
        assert posterior.is_fused(torch.ones(3, 4), torch.ones(3, 4))
    return torch.float64 if request.param == "float64" else torch.float32


@pytest.fixture
def engine_cache(tmp_path_factory, monkeypatch):
    """Kernels and plans are kept in a folder of the tests' own, the same for all of them."""
    monkeypatch.setenv("VDBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VDBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return compile_sparse(network(), EXAMPLE, threads=1)


@pytest.fixture(scope="session", name="data")
def small_data():
    return tiny.dataset()


@pytest.fixture(scope="session")
def dense(data, tmp_path_factory):
    """The folder of a dense run, to start others from."""
    folder = tmp_path_factory.mktemp("dense")
    tiny.train(tiny.spec("dense"), folder, data)
    return folder


@pytest.fixture
def steps(monkeypatch):
    """Counts optimizer steps; `steps.stop_at` interrupts training before one of them."""

    class Steps:
        taken, stop_at = 0, None

    real_step = torch.optim.Adam.step

    def step(self):
        if Steps.taken == Steps.stop_at:
            raise KeyboardInterrupt
        Steps.taken += 1
        return real_step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    return Steps


@pytest.fixture
def suite():
    return factory.suite()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The tiny suite, all its jobs done; read only."""
    folder = tmp_path_factory.mktemp("trained")
    run_jobs(folder / "results/tiny", config.parse_suite(SUITE, "tiny"))
    return folder


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    """A folder of one's own with the tiny suite done, as the current one."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    write_suite(tmp_path)
    return tmp_path


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_suite(tmp_path)
    return tmp_path


@pytest.fixture
def fresh(tmp_path):
    """A checkout without results."""
    return Project(tmp_path)


@pytest.fixture
def recorded(project):
    assert cli.main(["record", "tiny.yaml"]) == 0
    return project / "results/recorded/tiny"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes the text data set `text:mine` in a mirror folder, and returns its name."""
    monkeypatch.setenv("VDBENCH_MIRROR", str(tmp_path))

    def make(**texts):
        (tmp_path / "mine").mkdir()
        for split in ("train", "valid", "test"):
            content = texts.get(split, "the cat saw the dog\nthe dog saw\n")
            (tmp_path / "mine" / f"{split}.txt").write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
        return "text:mine"

    return make


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, listed and not waited."""
    seen: list[float] = []
    monkeypatch.setattr(files.time, "sleep", seen.append)
    return seen


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[World]:
    made = World(tmp_path)
    monkeypatch.setitem(data.DATASETS, "mnist", made.archive)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("VDBENCH_MIRROR", raising=False)
    monkeypatch.delenv("VDBENCH_CACHE", raising=False)
    yield made
    made.server.close()
