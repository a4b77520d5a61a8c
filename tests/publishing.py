"""A small data set and the servers that publish it, on 127.0.0.1."""

import gzip
import hashlib
import http.server
import struct
import threading
from pathlib import Path

import numpy as np

from vdbench import data
from vdbench.data import IdxArchive, IdxFile

COUNTS = {"train": 30, "test": 10}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


def entry(name: str, array: np.ndarray) -> IdxFile:
    return IdxFile.of("mnist", name, array.shape, hashlib.sha256(idx(array)).hexdigest())


class Server:
    """Files over HTTP; `script[path]` is consumed a request at a time before the file itself is served."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents
        self.script: dict[str, list[int | bytes]] = {}
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                queue = outer.script.get(self.path, [])
                answer = queue.pop(0) if queue else outer.contents.get(self.path.rpartition("/")[2], 404)
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def address(self, folder: str) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/{folder}/"

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


class World:
    """A small `mnist`, the two servers that publish it, a cache and a mirror folder (both empty)."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.arrays = {
            name: (rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 10)
            for name, n in COUNTS.items()
        }
        self.entries = {
            name: (entry(f"{name}-images", images), entry(f"{name}-labels", labels))
            for name, (images, labels) in self.arrays.items()
        }
        self.raw = {
            file.name: idx(array)
            for name in COUNTS
            for file, array in zip(self.entries[name], self.arrays[name], strict=True)
        }
        self.cache, self.mirror = folder / "cache", folder / "mirror"
        self.mirror.mkdir()
        self.server = Server({f"{name}.gz": gzip.compress(content) for name, content in self.raw.items()})
        self.archive = IdxArchive("mnist", 10, self.entries, self.servers)  # type: ignore[arg-type]

    def servers(self) -> list[str]:
        return [self.server.address("one"), self.server.address("two")]

    def fill(self, root: Path, *, gzipped: bool) -> None:
        (root / "mnist").mkdir(parents=True, exist_ok=True)
        for name, content in self.raw.items():
            path = root / "mnist" / (f"{name}.gz" if gzipped else name)
            path.write_bytes(gzip.compress(content) if gzipped else content)

    def fetch(self, mirror: bool = False) -> dict:
        return data.fetch("mnist", cache=self.cache, mirror=self.mirror if mirror else None)

    def load(self, validation_size: int = 0) -> data.Dataset:
        return data.load("mnist", validation_size=validation_size, cache=self.cache)
