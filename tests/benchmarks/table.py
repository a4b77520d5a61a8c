"""What a training step of variational dropout costs, as docs/training.md shows it, from what benchmarks wrote down.

`python tests/benchmarks/table.py results/benchmarks.json` prints it; without files it is that of those recorded, one a
processor, and with `--write` it is put into that page.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from vdbench import pages

ROOT = Path(__file__).parent.parent.parent
RECORDED = ROOT / "results" / "recorded" / "benchmarks"
PAGE = ROOT / "docs" / "training.md"
_HEADERS = ["net", "variational step", "target", "textbook layer", "cplxmodule", "memory", "target"]


def render(files: Iterable[Path]) -> str:
    """A table a processor, in Markdown."""
    parts = []
    for file in files:
        written = json.loads(file.read_text(encoding="utf-8"))
        parts += [f"{written['machine_info']['cpu']}:", _table(written["benchmarks"])]
    return "\n\n".join(parts)


def _table(benchmarks: Iterable[dict[str, Any]]) -> str:
    """A row a net. A net's step and its memory may have been measured by two benchmarks."""
    nets: dict[str, dict[str, Any]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if "net" in info:
            nets.setdefault(info["net"], {}).update(info)
    if not nets:
        raise ValueError("no training step was measured: run the benchmarks named *_step")
    keys = ("variational", "target", "textbook", "cplxmodule", "memory", "memory_target")
    rows = [[net, *(f"{info[key]:.3g}" if key in info else "–" for key in keys)] for net, info in nets.items()]
    return tabulate(rows, _HEADERS, tablefmt="github", disable_numparse=True)


def recorded() -> str:
    return render(sorted(RECORDED.glob("*.json")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="what --benchmark-json wrote")
    parser.add_argument("--write", action="store_true", help="put the table into docs/training.md")
    chosen = parser.parse_args()
    table = render(chosen.files) if chosen.files else recorded()
    print(table)
    if chosen.write:
        pages.rewrite(PAGE, "steps", table)


if __name__ == "__main__":
    main()
