"""The file of a pruned net: a NumPy archive without pickle, its weights stored as positions and values.

`meta` is the JSON text of a dict; of every weight there are `<name>:shape`, `<name>:values` and `<name>:gaps`, the
distances between the flat positions of its nonzero values; every other tensor is stored as it is.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from vdbench.mistakes import reason
from vdbench.records import RecordError, atomic_write

FORMAT = 1
LARGEST = 4 << 30  # bytes of all tensors together
_OF_RECURRENT_LAYERS = re.compile(r"weight_(ih|hh|hr)_l\d+(_reverse)?")  # these have several, and name them


class NetFileError(RecordError):
    """A file that is not a net of the kind expected, or a damaged one; the message names the file."""


def parameter_name(layer: str) -> str:
    """The name in a state dict of a layer's weight tensor; a model that is itself the layer has the empty name."""
    if _OF_RECURRENT_LAYERS.fullmatch(layer.rpartition(".")[2]):
        return layer
    return f"{layer}.weight" if layer else "weight"


def is_compiled(meta: dict[str, Any]) -> bool:
    """Whether a file with this meta dict is of `CompiledNet.save`."""
    return "ops" in meta


def write_arrays(
    path: Path, weights: dict[str, np.ndarray], others: dict[str, np.ndarray], meta: dict[str, Any]
) -> None:
    """Write a net: `weights` sparse, `others` (biases, statistics) dense. The same content makes the same bytes."""
    text = json.dumps({"format": FORMAT, **meta}, sort_keys=True)
    content: dict[str, np.ndarray] = {"meta": np.frombuffer(text.encode(), np.uint8)}
    for name, weight in weights.items():
        flat = weight.ravel()
        positions = np.flatnonzero(flat)
        gaps = np.diff(positions, prepend=0)
        narrow = np.uint8 if gaps.max(initial=0) < 2**8 else np.uint16 if gaps.max() < 2**16 else np.uint32
        content[f"{name}:shape"] = np.array(weight.shape, np.uint32)
        content[f"{name}:gaps"] = gaps.astype(narrow)
        content[f"{name}:values"] = flat[positions]
    content.update(others)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **content)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Every tensor of the net as a dense array, by parameter name, and the meta dict.

    Raises:
        NetFileError: no such file, not a net, or its parts contradict each other.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("no NumPy archive, or cut short")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                if sum(member.file_size for member in archive.zip.infolist()) > LARGEST:
                    raise ValueError(f"unpacks to more than {LARGEST >> 30} GiB")
                content = {name: archive[name] for name in archive.files}
        meta = json.loads(content.pop("meta").tobytes())
        if meta.pop("format") != FORMAT:
            raise ValueError("another format version")
        arrays = {}
        for name in [key.removesuffix(":shape") for key in content if key.endswith(":shape")]:
            shape, gaps = tuple(int(n) for n in content.pop(f"{name}:shape")), content.pop(f"{name}:gaps")
            values, positions = content.pop(f"{name}:values"), np.cumsum(gaps, dtype=np.int64)
            total = int(np.prod(shape, dtype=np.int64))
            if gaps.dtype.kind != "u" or (gaps[1:] == 0).any():
                raise ValueError(f"{name}: positions do not rise")
            if not 0 <= total <= LARGEST // 4 or min(shape, default=0) < 0:
                raise ValueError(f"{name}: shape {shape} is of no net")
            if values.shape != positions.shape or (len(positions) and positions[-1] >= total):
                raise ValueError(f"{name}: positions and values do not fit shape {shape}")
            arrays[name] = np.zeros(total, values.dtype)
            arrays[name][positions] = values
            arrays[name] = arrays[name].reshape(shape)
    except FileNotFoundError:
        raise NetFileError(f"{path}: no such file") from None
    except Exception as error:  # zipfile, zlib and NumPy's header parser each raise their own kinds on damaged bytes
        raise NetFileError(
            f"{path}: not a file of vdbench's ({reason(error)}); if vdbench wrote it, rerun what did"
        ) from None
    return arrays | content, meta
