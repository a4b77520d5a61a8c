"""Files that are wrong in every way we could think of, each with the reader that has to refuse it."""

import functools
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import factory
import numpy as np
import tiny
import torch

from vdbench import history, provenance, pruning, records, tensors
from vdbench.checkpoint import Checkpoint, Identity
from vdbench.config import load_suite
from vdbench.models import MODELS
from vdbench.sparse import storage


class Payload:
    """What a malicious pickle does: run something as soon as it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("executed",)


@dataclass(frozen=True)
class Case:
    """`content` is what the file `name` holds, or makes it there; `read` refuses it."""

    read: Callable[[Path], object]
    name: str
    content: bytes | Callable[[Path], object]

    def make(self, folder: Path) -> Path:
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content)
        return path


def flipped(content: bytes, place: float) -> bytes:
    """With one bit another, that far into it."""
    changed = bytearray(content)
    changed[int(place * len(content))] ^= 16
    return bytes(changed)


def large(path: Path) -> None:
    """20 GiB of nothing, on a disk that does not keep it."""
    path.touch()
    os.truncate(path, 20 << 30)


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


# --- weights and checkpoints

STATE = MODELS["lenet300100"](10).state_dict()
WEIGHTS = saved(STATE)
IDENTITY = Identity.of(tiny.spec("dense"), "code", {}, "cpu")
CHECKPOINT = {
    **asdict(IDENTITY),
    "seconds": 1.0,
    "note": "",
    "state": {"model": STATE, "optimizer": {}, "masks": {}, "history": []},
}


def read_weights(path: Path) -> None:
    tensors.load_state(MODELS["lenet300100"](10), path)


def read_checkpoint(path: Path) -> None:
    Checkpoint(path, IDENTITY).load()


def go_on(path: Path) -> None:
    tiny.train(tiny.spec("dense"), path.parent)


def with_checkpoint(**changes: Any) -> Callable[[Path], None]:
    """A checkpoint of the very run that reads it, but for its state."""

    def make(path: Path) -> None:
        code = provenance.code_digest()
        own = Identity.of(tiny.spec("dense"), code, {}, "cpu")
        path.write_bytes(saved(CHECKPOINT | asdict(own) | {"state": CHECKPOINT["state"] | changes}))

    return make


TENSORS = {
    "empty": b"",
    "garbage": b"garbage" * 100,
    "truncated": WEIGHTS[: len(WEIGHTS) // 2],
    "without its end": WEIGHTS[:-10],
    "bit of a weight flipped": flipped(WEIGHTS, 0.5),
    "bit of its index flipped": flipped(WEIGHTS, 0.9995),
    "pickle with code": saved({"fc1.weight": Payload()}),
    "bare pickle with code": pickle.dumps(Payload()),
    "archive of a pickle with code": zipped({"archive/data.pkl": pickle.dumps(Payload()), "archive/version": b"3"}),
    "compressed bomb": zipped({"archive/data.pkl": bytes(64 << 20)}, zipfile.ZIP_DEFLATED),
    "a list": saved([torch.zeros(2)]),
    "of another net": saved(MODELS["lenet5"](10).state_dict()),
    "numbers for tensors": saved(dict.fromkeys(STATE, 1)),
    "JSON": b'{"fc1.weight": [1, 2]}',
    "larger than any": large,
    "a script": zipped({"x/data.pkl": pickle.dumps(1), "x/code/x.py": b"", "x/constants.pkl": pickle.dumps(())}),
    "a folder": Path.mkdir,
}
CASES: dict[str, Case] = {
    **{f"weights, {what}": Case(read_weights, "weights.pt", content) for what, content in TENSORS.items()},
    "checkpoint, truncated": Case(read_checkpoint, "resume.pt", saved(CHECKPOINT)[:-9000]),
    "checkpoint, weights in its place": Case(read_checkpoint, "resume.pt", WEIGHTS),
    "checkpoint, of nothing": Case(read_checkpoint, "resume.pt", saved({})),
    "checkpoint, with a word for seconds": Case(
        read_checkpoint, "resume.pt", saved({**CHECKPOINT, "seconds": "a while"})
    ),
    "checkpoint, with code": Case(read_checkpoint, "resume.pt", saved({**CHECKPOINT, "note": Payload()})),
    "checkpoint, of a net without layers": Case(go_on, "resume.pt", with_checkpoint(model={})),
    "checkpoint, without an optimizer": Case(go_on, "resume.pt", with_checkpoint()),
}

# --- pruned and compiled nets


def net(meta: dict[str, Any] | bytes | None = None, **arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    text = (
        meta if isinstance(meta, bytes) else json.dumps({"format": 1, "model": "lenet300100", **(meta or {})}).encode()
    )
    np.savez_compressed(stream, allow_pickle=True, meta=np.frombuffer(text, np.uint8), **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def sparse(shape: list[int], gaps: list[int], values: list[float], dtype: Any = np.uint8) -> dict[str, np.ndarray]:
    parts = {"shape": np.array(shape, np.int64), "gaps": np.array(gaps, dtype), "values": np.array(values, np.float32)}
    return {f"fc1.weight:{name}": array for name, array in parts.items()}


def lying(content: bytes) -> bytes:
    """An archive whose index says that its first file is 3.9 GiB long when unpacked."""
    index = content.index(b"PK\1\2")
    return content[: index + 24] + struct.pack("<I", 0xF9999999) + content[index + 28 :]


GOOD = net(**sparse([2, 3], [1, 2], [1.0, 2.0]))
NETS = {
    "empty": b"",
    "garbage": b"PK\3\4 garbage",
    "truncated": GOOD[: len(GOOD) // 2],
    "bit flipped": flipped(GOOD, 0.3),
    "pickle with code": net(**{"fc1.bias": np.array([Payload()], object)}),
    "bare pickle with code": pickle.dumps(Payload()),
    "no meta": zipped({"fc1.bias.npy": b""}),
    "meta is not JSON": net(b"{"),
    "meta is a list": net(b"[1]"),
    "another format": net({"format": 9}),
    "of an unknown model": net({"model": "../../etc"}),
    "model is a list": net({"model": ["lenet5"], "num_classes": 10}),
    "classes are a word": net({"num_classes": "ten"}),
    "classes without number": net({"num_classes": 1e308}),
    "no classes": net({"num_classes": 0}),
    "shape of terabytes": net(**sparse([1 << 20, 1 << 22], [1], [1.0])),
    "shape below zero": net(**sparse([-2, 3], [1], [1.0])),
    "shape that overflows": net(**sparse([1 << 32, 1 << 32], [1], [1.0])),
    "positions outside": net(**sparse([2, 3], [9], [1.0])),
    "positions that fall": net(**sparse([2, 3], [3, -1], [1.0, 2.0], np.int8)),
    "more values than positions": net(**sparse([2, 3], [1], [1.0, 2.0])),
    "an index that lies about sizes": lying(GOOD),
    "larger than any": large,
}
INPUT = {"kind": "Input", "name": "x", "inputs": [], "shape": [4]}


def ops(*content: Any) -> bytes:
    return net({"ops": content, "removed": {}, "plans": {}, "measured_with": ""})


COMPILED = {
    "truncated": GOOD[:-30],
    "a pruned net": GOOD,
    "of unknown operations": ops({"kind": "system", "name": "x"}),
    "operations are numbers": ops(1, 2),
    "no input": ops({"kind": "Flatten", "name": "x", "inputs": ["y"], "shape": [4]}),
    "an input of terabytes": ops({**INPUT, "shape": [1 << 20, 1 << 20]}),
    "another shape than it computes": ops(INPUT, {"kind": "Flatten", "name": "y", "inputs": ["x"], "shape": [99]}),
    "a value from nowhere": ops(INPUT, {"kind": "Flatten", "name": "y", "inputs": ["z"], "shape": [4]}),
    "one name for two": ops(INPUT, INPUT),
    "plans are words": net({"ops": [], "removed": {}, "plans": {"single": "fast"}, "measured_with": ""}),
}
CASES |= {f"net, {what}": Case(pruning.load_net, "pruned.npz", content) for what, content in NETS.items()}
CASES |= {
    f"compiled net, {what}": Case(functools.partial(storage.load, measured_with=""), "net.npz", content)
    for what, content in COMPILED.items()
}

# --- records and histories

RECORD = factory.record(factory.suite(fc=factory.experiment(seeds=[0])), "fc", "vd_warmup", 0).model_dump(
    mode="json", exclude_defaults=True
)


def changed(**changes: Any) -> bytes:
    return json.dumps(RECORD | changes).encode()


RECORDS = {
    "empty": b"",
    "not JSON": b"{'seed': 0}",
    "cut short": changed()[:-200],
    "a list": b"[]",
    "not UTF-8": changed(message="é").replace(b"\\u00e9", b"\xe9"),
    "NaN": changed(metrics={"error": float("nan")}),
    "infinity": changed(wall_s=float("inf")),
    "a word for a number": changed(seed="zero"),
    "a number for a list": changed(layers=3),
    "a fraction of a weight": changed(size=RECORD["size"] | {"weights": 1.5}),
    "a key too many": changed(error=1.0),
    "a key too few": json.dumps({key: value for key, value in RECORD.items() if key != "stage"}).encode(),
    "spec edited": changed(spec=RECORD["spec"] | {"threshold": 2.9}),
    "another version": changed(result_version=2),
    "nested without end": b'{"spec": ' + b'{"a": ' * 100_000,
    "a history elsewhere": changed(history="../../../etc/passwd"),
    "larger than any": large,
    "a folder": Path.mkdir,
}
HISTORIES = {
    "words": b"epoch,loss\n1,low\n",
    "no epochs": b"loss\n1\n",
    "ragged": b"epoch\n1,2,3\n4\n",
    "bytes": b"\xff\0",
}
CASES |= {f"record, {what}": Case(records.read, "train.json", content) for what, content in RECORDS.items()}
CASES |= {f"history, {what}": Case(history.read, "history.csv", content) for what, content in HISTORIES.items()}

# --- suites

LAUGHS = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 30)
)
SUITES = {
    "not UTF-8": b"suite: caf\xe9\n",
    "not YAML": b"suite: [\n\t",
    "of bytes": bytes(range(256)),
    "code": b"!!python/object/apply:os.mkdir [executed]\n",
    "code in a value": b"suite: !!python/object/new:os.mkdir [executed]\n",
    "a list": b"- suite\n",
    "a word": b"suite\n",
    "a map that is none": b"suite: !!map x\n",
    "a date that is none": b"suite: !!timestamp x\n",
    "a number that is none": b"suite: !!int x\n",
    "a billion laughs": LAUGHS + b"suite: *a29\nexperiments: *a29\n",
    "laughing seeds": LAUGHS + b"experiments: {fc: {dataset: *a29, model: *a29, seeds: *a29, methods: *a29}}\n",
    "a snake that eats itself": b"&a {suite: *a, experiments: *a}\n",
    "nested without end": b"[" * 50_000,
    "a key twice": b"suite: a\nsuite: b\n",
    "larger than any": large,
}
CASES |= {f"suite, {what}": Case(load_suite, "suite.yaml", content) for what, content in SUITES.items()}
