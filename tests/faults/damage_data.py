"""Data that is wrong in every way we could think of: published files, pictures, archives of them, and texts."""

import gzip
import hashlib
import io
import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

from damage import Case, flipped
from PIL import Image

from vdbench import files, pictures, text
from vdbench.data import IdxFile

CASES: dict[str, Case] = {}

# --- published files

IDX = struct.pack(">IIII", 0x0803, 2, 3, 3) + bytes(18)
DIGEST = hashlib.sha256(IDX).hexdigest()
PUBLISHED = IdxFile.of("set", "images", (2, 3, 3), DIGEST)


def obtained(path: Path) -> None:
    root = path.parents[1]
    files.obtain(PUBLISHED, files.Folders(root.parent / "cache", root), tuple)


def parsed(path: Path) -> None:
    PUBLISHED.parse(path.read_bytes())


ARCHIVES = {
    "truncated": gzip.compress(IDX)[:-9],
    "bit flipped": flipped(gzip.compress(IDX), 0.6),
    "a bomb": gzip.compress(bytes(32 << 20)),
    "not gzip": IDX,
    "other content": gzip.compress(IDX[:-1] + b"x"),
}
HEADERS = {
    "more images than there are": struct.pack(">IIII", 0x0803, 2**31, 3, 3) + bytes(18),
    "another rank": struct.pack(">IIII", 0x0801, 2, 3, 3) + bytes(18),
    "other numbers": struct.pack(">IIII", 0x0D03, 2, 3, 3) + bytes(18),
    "no values": IDX[:16],
}
CASES |= {f"archive, {what}": Case(obtained, "set/images.gz", content) for what, content in ARCHIVES.items()}
CASES |= {f"IDX, {what}": Case(obtained, "set/images", content) for what, content in HEADERS.items()}

# --- pictures

PICTURE = io.BytesIO()
Image.new("RGB", (6, 5), "red").save(PICTURE, "PNG")
PNG = PICTURE.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int) -> bytes:
    """A picture that says it is so large, and holds nothing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return PNG[:8] + head + chunk(b"IDAT", b"\x78\x9c\3\0\0\0\0\1") + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 5\n(executed) (w) file closefile\n"
PICTURES = {
    "a bomb": png(30_000, 30_000),
    "a small bomb": png(5_000, 5_000),
    "the largest there can be": png(2**31 - 1, 2**31 - 1),
    "of no size": png(0, 5),
    "truncated": PNG[:50],
    "bit flipped": flipped(PNG, 0.55),
    "empty": b"",
    "text": b"not a picture",
    "a program in PostScript": EPS,
    "a drawing": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a GIF without an end": b"GIF89a" + bytes(7),
}


def among_others(content: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"):
            other = path.parents[2] / name
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(PNG)
        path.write_bytes(content)

    return make


def read_folder(path: Path) -> None:
    pictures.in_folder(path.parents[2]).read("train")


CASES |= {f"picture, {what}": Case(read_folder, "train/a/2.png", among_others(c)) for what, c in PICTURES.items()}


def tar(*members: tuple[str, bytes, str], size: int | None = None) -> bytes:
    """Members as name, type and what they link to."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"):
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            archive.addfile(info, io.BytesIO(PNG))
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            if size:
                info.size = size
            archive.addfile(info)
    return stream.getvalue()


def read_archive(path: Path) -> None:
    with path.open("rb") as stream:
        pictures.in_archive(stream, str(path)).read("train")


FILE = tarfile.REGTYPE
TARS = {
    "way up": tar(("train/a/../../../outside.png", FILE, "")),
    "way to the root": tar(("/tmp/outside.png", FILE, "")),
    "symbolic link": tar(("train/a/2.png", tarfile.SYMTYPE, "/etc/passwd")),
    "hard link": tar(("train/a/2.png", tarfile.LNKTYPE, "../outside")),
    "device": tar(("train/a/2.png", tarfile.CHRTYPE, "")),
    "pipe": tar(("train/a/2.png", tarfile.FIFOTYPE, "")),
    "file of a terabyte": tar(("train/a/2.png", FILE, ""), size=1 << 40),
    "name of a terabyte": tar(("train/a/2.png", tarfile.GNUTYPE_LONGNAME, ""), size=1 << 40),
    "comment of a gigabyte": tar(("train/a/2.png", tarfile.XHDTYPE, ""), size=1 << 30),
    "truncated": tar()[:700],
    "truncated, compressed": gzip.compress(tar())[:-40],
    "bit flipped, compressed": flipped(gzip.compress(tar()), 0.5),
    "xz without an end": lzma.compress(tar())[:-30],
    "not compressed as it says": b"BZh9" + tar(),
    "garbage": b"garbage" * 200,
    "empty": b"",
    "without classes": tar(("train/3.png", FILE, "")),
}
CASES |= {f"pictures, {what}": Case(read_archive, "pictures.tar", content) for what, content in TARS.items()}

# --- texts


def read_text(path: Path) -> None:
    for split in text.SPLITS:
        (path.parent / f"{split}.txt").exists() or (path.parent / f"{split}.txt").write_text("a b\n")
    text.FolderText("text:words", path.parent).load(0, None, None)


WORDS = {
    "in Latin 1": "café\n".encode("latin-1"),
    "in UTF-16": "words\n".encode("utf-16"),
    "of bytes": bytes(range(256)),
    "cut inside a letter": "é".encode()[:1],
    "a folder": Path.mkdir,
}
CASES |= {f"text, {what}": Case(read_text, "train.txt", content) for what, content in WORDS.items()}
