"""What sparse inference aims at and what was measured, as vdbench/sparse/README.md shows it, from the recorded timings.

`python tests/benchmarks/reached.py` prints it; with `--write` it is put into that page.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from tabulate import tabulate

from vdbench import pages, records
from vdbench.records import BackendTiming, Record
from vdbench.stats import speedups

ROOT = Path(__file__).parent.parent.parent
RECORDED = ROOT / "results" / "recorded"
PAGE = ROOT / "vdbench" / "sparse" / "README.md"
DENSE = "the best dense engine"
PYTORCH = ("torch_dense", "torch_channels_last", "torch_compacted")
SUITES = ("paper", "cifar", "ptb", "inference")

VGG, LENET = "inference/vgglike/random_masks/seed0", "paper/lenet300100-mnist/vd_*/seed0"
LAYER = "inference/linear784-300/density0.011/seed0"
Found = Callable[[], str]

_read = cache(records.read)


def _runs(pattern: str) -> Iterator[Record]:
    for file in sorted(RECORDED.glob(f"{pattern}/time.json")):
        yield _read(file)


def _timing(record: Record, backend: str, batch: int, threads: int = 1) -> BackendTiming:
    return next(t for t in record.timing if (t.backend, t.batch_size, t.threads) == (backend, batch, threads))


def _span(values: list[float]) -> str:
    if not values:
        raise ValueError("nothing is recorded")
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def times(pattern: str, batch: int, reference: str = DENSE) -> Found:
    """How many times as fast as a backend, median of the ratios sample by interleaved sample, on one thread."""

    def ratio(record: Record) -> float:
        ours = _timing(record, "vdbench", batch)
        if reference != DENSE:
            return float(np.median(np.divide(_timing(record, reference, batch).samples_s, ours.samples_s)))
        (over,) = (speedup.over_best for speedup in speedups(record) if speedup.timing is ours)
        assert over
        return over.value

    def found() -> str:
        return f"{_span([ratio(record) for record in _runs(pattern)])}×"

    return found


def microseconds(pattern: str, batch: int) -> Found:
    def found() -> str:
        timed = [_timing(record, "vdbench", batch) for record in _runs(pattern)]
        return f"{_span([1e6 * float(np.median(t.samples_s)) / t.examples for t in timed])} µs"

    return found


def second_thread(pattern: str, batch: int) -> Found:
    def found() -> str:
        one, two = ([_timing(r, "vdbench", batch, threads) for r in _runs(pattern)] for threads in (1, 2))
        gains = [float(np.median(a.samples_s) / np.median(b.samples_s)) for a, b in zip(one, two, strict=True)]
        return f"{_span(gains)}×"

    return found


def behind_pytorch(threads: int) -> Found:
    """In how many settings, of all nets, layers and batches, PyTorch was more than 5 % faster."""

    def found() -> str:
        slower = settings = 0
        for record in (record for suite in SUITES for record in _runs(f"{suite}/*/*/*")):
            medians: dict[tuple[int, ...], dict[str, float]] = {}
            for timing in record.timing:
                if timing.threads == threads:
                    medians.setdefault(timing.setting, {})[timing.backend] = float(np.median(timing.samples_s))
            for seconds in medians.values():
                settings += 1
                slower += seconds["vdbench"] > 1.05 * min(seconds[name] for name in PYTORCH if name in seconds)
        return f"{slower} of {settings} settings"

    return found


AIMS: list[tuple[str, str, Found]] = [
    ("VGG-like, random masks, one image", f"12× {DENSE}", times(VGG, 1)),
    ("", "380 µs", microseconds(VGG, 1)),
    ("VGG-like, random masks, batch 64", f"12× {DENSE}", times(VGG, 64)),
    ("", "220 µs", microseconds(VGG, 64)),
    ("", "3× MNN, sparse", times(VGG, 64, "mnn_sparse")),
    ("", "1.7× one thread on two", second_thread(VGG, 64)),
    *(
        (
            f"3×3 convolutions, {sparsity} % sparse, batch 64",
            f"{aim}× {DENSE}",
            times(f"inference/conv*/{of}/seed0", 64),
        )
        for sparsity, aim, of in (
            (90, 5, "density0.1"),
            (96, 9, "density0.04"),
            (98, 12, "density0.02"),
            (99.5, 40, "density0.005"),
        )
    ),
    ("784 → 300, 98.9 % sparse, one image", f"5× {DENSE}", times(LAYER, 1)),
    ("", "3× SciPy", times(LAYER, 1, "scipy_csr")),
    ("784 → 300, 98.9 % sparse, batch 64", f"25× {DENSE}", times(LAYER, 64)),
    ("", "4× SciPy", times(LAYER, 64, "scipy_csr")),
    ("LeNet-300-100, trained, one image", f"4× {DENSE}", times(LENET, 1)),
    ("LeNet-300-100, trained, batch 256", f"25× {DENSE}", times(LENET, 256)),
    ("PyTorch, dense or compacted, over 5 % faster, one thread", "never", behind_pytorch(1)),
    ("the same on two threads", "never", behind_pytorch(2)),
]


def render() -> str:
    """The table, in Markdown, headed by the processor's name."""
    rows = [[case, asked, found()] for case, asked, found in AIMS]
    processor = next(_runs(VGG)).provenance.cpu
    return tabulate(rows, ["", "aim", processor], tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into vdbench/sparse/README.md")
    table = render()
    if parser.parse_args().write:
        pages.rewrite(PAGE, "reached", table)
    print(table)


if __name__ == "__main__":
    main()
