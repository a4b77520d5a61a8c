"""Whatever is in a file: one line that names it and says what to do, nothing run, nothing written, memory bounded."""

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import damage
import damage_data
import pytest

from vdbench.cli import EXPECTED_ERRORS

REMEDIES = "delete|rerun|replace|correct it|save it as|pack|put |README|start over|compile|should be|change|no higher"
REMEDIES += "|unknown key|pass those|is a folder with|Field required|name a suite file"
CASES = damage.CASES | damage_data.CASES
ROOM = 1 << 30  # bytes that a reader may use, beyond what the process has


@pytest.fixture
def little_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_there_are_many_kinds_of_damage():
    assert len(CASES) >= 100


@pytest.mark.parametrize("name", CASES)
def test_damaged_files_are_refused_in_one_line(name, tmp_path, monkeypatch, little_memory, one_thread):
    case, work = CASES[name], tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    path = case.make(tmp_path / "given" / "here")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EXPECTED_ERRORS) as caught:
        case.read(path)
    message = str(caught.value)
    if name.startswith("suite"):  # which has a line for every mistake
        assert all(path.name in line for line in message.splitlines())
    else:
        assert "\n" not in message and len(message) < 600, message
    assert path.name in message or path.parent.parent.name in message
    assert re.search(REMEDIES, message), message
    made = set(tmp_path.rglob("*")) - set(before)
    assert {file.name for file in made} <= {"valid.txt", "test.txt"}  # which a case adds
    assert not (work / "executed").exists() and not Path("executed").exists()
