"""Every reader, given what hypothesis makes of files that are right: the documented exceptions come out and no others.

`FUZZ_EXAMPLES=20000 pytest tests/faults/test_fuzz.py` gives each of them so many files; results/recorded/faults says of
how many it was done.
"""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import damage_data
import factory
import pytest
import tiny
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vdbench import history, pruning, records, running, tensors, text
from vdbench.cli import EXPECTED_ERRORS
from vdbench.config import canonical, load_suite, parse_spec, parse_suite
from vdbench.sparse import storage
from vdbench.sparse.tracing import trace

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
ROOT = Path(__file__).parents[2]
SMOKE = (ROOT / "configs" / "smoke.yaml").read_bytes()
SUITE = factory.suite(fc=factory.experiment(seeds=[0]))
SPEC = canonical(SUITE.run_spec("fc", "vd_warmup", 0))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 1000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def picture(form: str) -> bytes:
    stream = io.BytesIO()
    Image.radial_gradient("L").resize((9, 7)).convert("RGB").save(stream, form)
    return stream.getvalue()


def archive(mode: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as made:  # type: ignore[call-overload]
        for name in (
            "train/a/1.png",
            "train/a/long-" + 120 * "x" + ".png",
            "train/b/1.png",
            "test/a/1.png",
            "test/b/1.png",
        ):
            info = tarfile.TarInfo(name)
            info.size = len(damage_data.PNG)
            made.addfile(info, io.BytesIO(damage_data.PNG))
    return stream.getvalue()


def compiled() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.npz"
        storage.save(path, trace(tiny.sparse_net("lenet300100"), torch.zeros(1, 1, 28, 28)), {}, "these")
        return path.read_bytes()


def read_picture(path: Path) -> None:
    damage_data.among_others(path.read_bytes())(path)
    damage_data.read_folder(path)


def read_words(path: Path) -> None:
    text.FolderText("text:words", path.parent).lines("train", None, None)


def read_spec(path: Path) -> None:
    parse_spec(path.read_bytes().decode("utf-8", errors="replace"))


BINARY: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {
    "weights": ("weights.pt", damage.saved({"w": damage.STATE["fc3.weight"]}), tensors.load_tensors),
    "checkpoint": ("resume.pt", damage.saved(damage.CHECKPOINT | {"state": {"history": []}}), damage.read_checkpoint),
    "pruned net": ("pruned.npz", damage.GOOD, pruning.load_net),
    "IDX": ("images", damage_data.IDX, damage_data.parsed),
    "suite": ("suite.yaml", SMOKE, load_suite),
    "record": ("train.json", damage.changed(), records.read),
    "history": ("history.csv", b"epoch,loss\n1,0.5\n2,0.25\n", history.read),
    "progress": ("progress.json", b'{"stage": "train", "epoch": 3}', lambda path: running.read_progress(path.parent)),
    "spec": ("spec.json", SPEC.encode(), read_spec),
    "text": ("train.txt", "one two\nÄpfel\n".encode(), read_words),
    "tar": ("pictures.tar", archive("w"), damage_data.read_archive),
    "tar.gz": ("pictures.tar", archive("w:gz"), damage_data.read_archive),
    "tar.xz": ("pictures.tar", archive("w:xz"), damage_data.read_archive),
    **{
        form: (f"train/a/{form}", picture(form), read_picture) for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
    },
}


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with bits flipped, bytes put in or taken out, parts of it twice, or its end missing; or any bytes."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        kind = draw(st.sampled_from(("flip", "set", "insert", "delete", "repeat", "cut")))
        if kind == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            changed[place : place + 4] = draw(st.sampled_from((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"-1e9")))
        elif kind == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del changed[place : place + draw(st.integers(1, 40))]
        elif kind == "repeat":
            changed[place:place] = changed[place : place + draw(st.integers(1, 300))]
        elif draw(st.integers(0, 3)) == 0:
            del changed[place:]
    return bytes(changed)


@pytest.mark.parametrize("name", BINARY)
def test_any_bytes_are_read_or_refused(name, tmp_path):
    file, content, read = BINARY[name]
    path = tmp_path / "given" / file
    path.parent.mkdir(parents=True)

    @fuzzed
    @given(mutated(content))
    def fuzz(changed: bytes) -> None:
        path.write_bytes(changed)
        try:
            read(path)
        except EXPECTED_ERRORS as error:
            assert "\n" not in str(error) or name in ("suite", "spec")

    fuzz()
    assert {path.name for path in tmp_path.iterdir()} == {"given"}


# JSON that parses, with any value in the place of any other

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from((-1, 2**63, 1e308))
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


def places(content: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [here] * bool(here) + [place for key, value in items for place in places(value, (*here, key))]


@st.composite
def revalued(draw: st.DrawFn, content: Any) -> Any:
    changed = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(changed)))
        inner = changed
        for key in way:
            inner = inner[key]
        if draw(st.booleans()):
            inner[last] = draw(VALUES)
        else:
            del inner[last]
        if not places(changed):
            break
    return changed


@fuzzed
@given(content=revalued(yaml.safe_load(SMOKE)))
def test_a_suite_of_any_values_is_a_suite_or_refused(content):
    try:
        suite = parse_suite(content, "suite.yaml")
    except EXPECTED_ERRORS:
        return
    for job in suite.jobs():
        canonical(suite.spec_of(*job))


@fuzzed
@given(content=revalued(damage.RECORD))
def test_a_record_of_any_values_is_a_record_or_refused(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "train.json"
    path.write_text(json.dumps(content))
    try:
        found = records.read(path)
    except EXPECTED_ERRORS as error:
        assert path.name in str(error) and "\n" not in str(error)
        return
    records.write(found, path)
    assert records.read(path) == found


@fuzzed
@given(content=revalued({"format": 1, "model": "lenet300100", "num_classes": 10, "spec_sha256": "0", "seed": 0}))
def test_a_net_with_any_meta_is_a_net_or_refused(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "pruned.npz"
    path.write_bytes(damage.net(json.dumps(content).encode(), **damage.sparse([2, 3], [1], [1.0])))
    with pytest.raises(EXPECTED_ERRORS):
        pruning.load_net(path)


def test_a_compiled_net_of_any_bytes_is_read_or_refused(tmp_path):
    path = tmp_path / "net.npz"

    @fuzzed
    @given(mutated(compiled()))
    def fuzz(changed: bytes) -> None:
        path.write_bytes(changed)
        try:
            storage.load(path, "these")
        except EXPECTED_ERRORS as error:
            assert "\n" not in str(error)

    fuzz()
