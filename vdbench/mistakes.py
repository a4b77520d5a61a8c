"""What is wrong with a suite file, a spec or a disk, in words that can be acted on."""

import difflib
import errno
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

MOST_LINES = 30


def read_bounded(path: Path, limit: int) -> bytes:
    """Of a file that cannot be right if it is larger than `limit` bytes, and is then not read. Raises OSError."""
    with path.open("rb") as file:
        read = file.read(limit + 1)
    if len(read) > limit:
        raise OSError(errno.EFBIG, f"larger than the {limit >> 20} MiB that such a file never reaches", str(path))
    return read


def explain(error: ValidationError, where: str, kind: type[BaseModel]) -> str:
    """A line for every wrong key of a `kind`; unknown ones first, for a key may be missing because it was mistyped."""
    lines = []
    for item in sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden"):
        place = [str(part) for part in item["loc"] if not str(part).startswith("function-")]
        message = re.sub("^Value error, ", "", item["msg"])
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(place[-1], _keys_beside(place, kind), n=1)
            message = f"unknown key; {f'did you mean {close[0]}?' if close else 'configs/README.md lists every key'}"
        lines.append(f"{where}: {'.'.join(place) or 'top level'}: {message}")
    shown, more = lines[:MOST_LINES], len(lines) - MOST_LINES
    if more > 0:
        shown.append(f"{where}: and {more} more mistakes")
    return "\n".join(shown)


def _keys_beside(place: list[str], kind: type[BaseModel]) -> list[str]:
    """The keys of the section that a key lies in."""
    for part in place[:-1]:  # those that are no field are names, of experiments
        if part in kind.model_fields:
            kind = _section(kind.model_fields[part].annotation) or kind
    return list(kind.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


_MAKE_ROOM = "make room there and run the same command again: what is finished is kept"
_MAKE_WRITABLE = "make it writable and run the same command again, or name another folder: what is finished is kept"
_REMEDIES = {errno.ENOSPC: _MAKE_ROOM, errno.EDQUOT: _MAKE_ROOM, errno.EFBIG: _MAKE_ROOM}
_REMEDIES |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _MAKE_WRITABLE)


def reason(error: BaseException) -> str:
    """What an exception says, on one line, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """`reason` of an exception of a library that goes on for many lines."""
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())


def in_one_line(error: BaseException) -> str:
    """What went wrong, with what to do about it where that is known."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        remedy, path = _REMEDIES.get(error.errno or 0), error.filename2 or error.filename  # of two, the one written to
        return f"{path}: {error.strerror}" + (f"; {remedy}" if remedy else "")
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = " ".join(str(error).split())
    return text if type(error).__module__.startswith("vdbench.") and text else f"{type(error).__name__}: {text}"
