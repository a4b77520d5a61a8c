"""Published files, verified before every use: from the cache, else a mirror folder, else by download."""

import hashlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from vdbench.records import atomic_write

WAITS_S = (1.0, 2.0, 4.0)  # between the attempts at one server: one attempt more than there are waits
TIMEOUT_S = 30.0  # without a byte from a server
SETTING = "the mirror setting (`mirror` in the suite file, or the environment variable VDBENCH_MIRROR)"

log = logging.getLogger("vdbench")


class DataError(RuntimeError):
    """Data that cannot be had or believed; the message says what was expected, what was found and what to do."""


@dataclass(frozen=True)
class Folders:
    """Where files are looked for before they are downloaded; what is downloaded or mirrored is kept in `cache`."""

    cache: Path
    mirror: Path | None

    @classmethod
    def in_force(cls, cache: Path | None, mirror: Path | None) -> "Folders":
        """VDBENCH_CACHE stands in for a cache not given; VDBENCH_MIRROR overrides the mirror given.

        Raises DataError where the mirror is not a folder.
        """
        cache = cache or Path(os.environ.get("VDBENCH_CACHE") or "~/.cache/vdbench")
        override = os.environ.get("VDBENCH_MIRROR")
        mirror = Path(override) if override else mirror
        if mirror is None:
            return cls(cache.expanduser(), None)
        if not mirror.expanduser().is_dir():
            origin = "VDBENCH_MIRROR" if override else "the suite file or --mirror"
            raise DataError(f"mirror folder {mirror} (from {origin}) does not exist: correct or unset {SETTING}")
        return cls(cache.expanduser(), mirror.expanduser())


@dataclass(frozen=True)
class PublishedFile:
    """A file known by size and sha256 of its content: `<folder>/<name>` or, gzipped, `<folder>/<name>.gz`."""

    suffix: ClassVar[str] = ".gz"  # servers have it as <name><suffix>

    folder: str
    name: str
    size: int
    sha256: str

    def paths(self, root: Path) -> tuple[Path, Path]:
        """Where `root` may have it: plain, gzipped."""
        return root / self.folder / self.name, root / self.folder / f"{self.name}.gz"

    def is_in(self, root: Path | None) -> bool:
        """Whether the file is there, by looking and not by reading."""
        return root is not None and any(path.exists() for path in self.paths(root))

    def verified(self, stream: BinaryIO, *, gzipped: bool) -> bytes:
        """The content, read from `stream`, and never much more of it than is expected.

        Raises DataError naming what was expected and what was found.
        """
        limit = self.size + self.size // 1000 + 1024 if gzipped else self.size  # deflate adds less than 0.1 %
        content, found = stream.read(limit + 1), None
        if gzipped:
            unpacker = zlib.decompressobj(wbits=31)
            try:
                content = unpacker.decompress(content, self.size + 1)
                if not unpacker.eof and len(content) <= self.size:
                    found = f"a gzip file that ends after {len(content):,} bytes of content"
            except zlib.error as error:
                found = f"no intact gzip file ({error})"
        if found is None and len(content) != self.size:
            found = "more than that" if len(content) > self.size else f"{len(content):,} bytes"
        if found is None:
            digest = hashlib.sha256(content).hexdigest()
            if digest == self.sha256:
                return content
            found = f"sha256 {digest}"
        raise DataError(f"expected {self.size:,} bytes of content with sha256 {self.sha256}, found {found}")


@dataclass(frozen=True)
class PublishedPlain(PublishedFile):
    """One that servers have as it is: an archive, or a text."""

    suffix = ""


class FromFiles:
    """A data set in files known by their digests; `servers` gives the addresses of folders to download from, best
    first, and none for files that are published nowhere."""

    name: str
    servers: Callable[[], Sequence[str]]

    @property
    def all_files(self) -> Sequence[PublishedFile]:
        raise NotImplementedError

    def fetch(self, cache: Path | None, mirror: Path | None) -> dict[str, dict[str, Any]]:
        """See to it that the files are in the cache, and say of each what it is and where it came from."""
        folders = Folders.in_force(cache, mirror)
        return {
            file.name: {"sha256": file.sha256, "bytes": file.size, "source": obtain(file, folders, self.servers)[1]}
            for file in self.all_files
        }

    def available(self, cache: Path | None, mirror: Path | None) -> str:
        """`cached`, `in mirror`, `to download` or `only by mirror folder`, by looking and not by reading."""
        folders = Folders.in_force(cache, mirror)
        if all(file.is_in(folders.cache) for file in self.all_files):
            return "cached"
        if all(file.is_in(folders.cache) or file.is_in(folders.mirror) for file in self.all_files):
            return "in mirror"
        return "to download" if self.servers() else "only by mirror folder"


def obtain(file: PublishedFile, folders: Folders, servers: Callable[[], Sequence[str]]) -> tuple[bytes, str]:
    """Verified content, in the cache from now on, and where it came from: `cache`, `mirror` or an address.

    `servers` gives the addresses of folders to download `<name><suffix>` from, best first. Raises DataError:
    a wrong file is refused and not passed over, and a failed download names every source tried.
    """
    content = _read(file, folders.cache, "delete it and run again to have it fetched anew")
    if content is not None:
        return content, "cache"
    source = "mirror"
    if folders.mirror is not None:
        content = _read(file, folders.mirror, f"replace it with the published file or change {SETTING}")
    if content is None:
        content, source = _download(file, folders, servers())
    target = file.paths(folders.cache)[0]
    try:
        with atomic_write(target) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written ({error.strerror}); make room for it, or name another cache folder with "
            "the environment variable VDBENCH_CACHE"
        ) from None
    return content, source


def _read(file: PublishedFile, root: Path, remedy: str) -> bytes | None:
    """Verified content, None where `root` lacks the file. Raises DataError for a file that is not right."""
    for path, gzipped in zip(file.paths(root), (False, True), strict=True):
        try:
            with path.open("rb") as stream:
                return file.verified(stream, gzipped=gzipped)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
        except DataError as error:
            raise DataError(f"{path}: refused: {error}; {remedy}") from None
    return None


def _download(file: PublishedFile, folders: Folders, servers: Sequence[str]) -> tuple[bytes, str]:
    forms = ", plain or gzipped" if file.suffix else ""
    mirror = "not set" if folders.mirror is None else f"{folders.mirror / file.folder}: not there{forms}"
    tried = [f"cache {folders.cache / file.folder}: not there", f"mirror folder {mirror}"]
    for server in servers:
        address = f"{server.rstrip('/')}/{file.name}{file.suffix}"
        try:
            return _download_from(address, file), address
        except DataError as error:
            tried.append(f"{address}: {error}")
    advice = "Check the network and run again, or point" if servers else "It is published nowhere: point"
    raise DataError(
        "\n  ".join((f"{file.folder}/{file.name} could not be had:", *tried))
        + f"\n{advice} {SETTING} at a folder that has {file.folder}/{file.name}{file.suffix}."
    )


def _download_from(address: str, file: PublishedFile) -> bytes:
    """Verified content from one server, tried again after each of WAITS_S unless the server says there is no use."""
    log.info("downloading %s", address)
    request = urllib.request.Request(address, headers={"User-Agent": "vdbench"})
    for attempt, wait in enumerate((*WAITS_S, None), start=1):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                return file.verified(response, gzipped=bool(file.suffix))
        except (OSError, http.client.HTTPException, DataError) as error:
            no_use = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429)
            if wait is None or no_use:
                raise DataError(f"{error} ({attempt} attempt{'s' if attempt > 1 else ''})") from None
            log.warning("%s: %s; trying again in %g s", address, error, wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")
