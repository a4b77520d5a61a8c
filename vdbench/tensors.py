"""Files of tensors, and the hash of a net's weights."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdbench import records


def state_sha256(state: dict[str, Tensor]) -> str:
    """Hash of a state dict's names and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    with records.atomic_write(path) as temporary:
        torch.save(content, temporary)


def load_tensors(path: Path) -> dict[str, Any]:
    """Read what `save_tensors` wrote; nothing in the file is executed. Raises RecordError naming the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise records.RecordError(f"{path}: no such weights; run the job that makes them") from None
    except Exception as error:
        raise records.RecordError(f"{path}: not readable as weights ({error}); delete it and rerun its job") from None


def load_state(model: nn.Module, path: Path) -> None:
    """Load weights into a model. Raises RecordError if the file cannot be read or holds those of another net."""
    try:
        model.load_state_dict(load_tensors(path))
    except (RuntimeError, TypeError, AttributeError):
        raise records.RecordError(
            f"{path}: holds the weights of another net than {type(model).__name__}; pass those of this run"
        ) from None


def file_sha256(path: Path) -> str:
    """Hash of a file. Raises RecordError if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise records.RecordError(f"{path}: cannot be read: {error.strerror}") from None
