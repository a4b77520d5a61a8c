"""Files of tensors, and the hash of a net's weights."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdbench import records
from vdbench.mistakes import first_line


def state_sha256(state: dict[str, Tensor]) -> str:
    """Hash of a state dict's names and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, and what else torch reads back without running code. Raises OSError naming the file."""
    with records.atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch reports a full disk as an archive that is not as long as it should be
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_tensors(path: Path) -> dict[str, Any]:
    """Read what `save_tensors` wrote; nothing in the file is executed. Raises RecordError naming the file."""
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}")
        return content
    except FileNotFoundError:
        raise records.RecordError(f"{path}: no such weights; run the job that makes them") from None
    except Exception as error:  # zipfile, torch and its unpickler each raise their own kinds on damaged bytes
        raise records.RecordError(
            f"{path}: not readable as weights ({first_line(error)}); delete it and rerun its job"
        ) from None


def _check_archive(path: Path) -> None:
    """Every byte of a tensor file under its checksum, which torch does not look at; nothing in it unpacks to more than
    it is. Raises ValueError, or what `zipfile` raises."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("compressed, which its writer never does")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")


def load_state(model: nn.Module, path: Path) -> None:
    """Load weights into a model. Raises RecordError if the file cannot be read or holds those of another net."""
    try:
        model.load_state_dict(load_tensors(path))
    except (RuntimeError, TypeError, AttributeError):
        raise records.RecordError(
            f"{path}: holds the weights of another net than {type(model).__name__}; pass those of this run"
        ) from None
