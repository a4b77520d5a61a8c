"""Recorded is not run: the runs the project ships, apart from those of this machine."""

import difflib
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from vdbench import current, records
from vdbench.config import VARIATIONAL_METHODS, Suite

if TYPE_CHECKING:
    from torch import nn

FOLDER = Path("results/recorded")
_SHIPPED = (Path(__file__).parent / "recorded", Path(__file__).parent.parent / FOLDER)
LARGEST_NET = 2_500_000  # bytes of a pruned net; one that is hardly sparse is recorded, and stays behind itself
LARGEST_BASELINE = 100_000  # bytes of one that is there to compare with
LARGEST_SET = 3_500_000  # bytes of all nets of a suite
_TOO_LARGE = (
    f"over {LARGEST_NET / 1e6:g} MB (a baseline's {LARGEST_BASELINE / 1e6:g}), or over {LARGEST_SET / 1e6:g} MB with "
    "nets of earlier seeds or that lose less"
)
_EXPLORED = "judged by held-out examples: nets of an exploration are not shipped"
_BESIDE = {"train": "history.csv", "prune": "pruned.npz"}


def recorded(suite_name: str = "") -> Path:
    """The recorded runs of a suite, or of all: in this folder's checkout, else as they came with the package."""
    found = [folder for folder in (FOLDER, *_SHIPPED) if (folder / suite_name).is_dir()]
    return (found or [FOLDER])[0] / suite_name


def record(suite: Suite, results: Path, target: Path, *, partial: bool = False) -> list[str]:
    """Put the current records of a suite, their histories and pruned nets in place of what `target` held.

    All or nothing: `target` is replaced once everything is copied. Nets that are not `shippable` stay behind. Returns
    what was left out. Raises RecordError if a run is stale or missing, unless `partial`.
    """
    found, notes = current.load(results, suite)
    if notes and not partial:
        shown, more = notes[:10], len(notes) - 10
        if more > 0:
            shown.append(f"and {more} more")
        listed = "\n  ".join(shown)
        raise records.RecordError(f"{results} is not complete (--partial records the rest):\n  {listed}")
    if not found:
        raise records.RecordError(f"{results} holds no current record of suite {suite.suite}; run snakemake first")
    shipped = shippable(found)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        new = Path(temporary) / "new"
        for item in found:
            source, copy = (records.run_folder(root, *item.run) for root in (results, new))
            copy.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / f"{item.stage}.json", copy / f"{item.stage}.json")
            beside = _BESIDE.get(item.stage)
            if not beside or not (source / beside).exists() or (item.stage == "prune" and item.method == "dense"):
                continue
            if item.stage == "prune" and item.run not in shipped:
                why = _EXPLORED if _explores(item) else _TOO_LARGE
                notes.append(f"{'/'.join(map(str, item.run))} {beside}: {why}")
                continue
            shutil.copyfile(source / beside, copy / beside)
        old = Path(temporary) / "old"
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
    return notes


def shippable(found: Iterable[records.Record]) -> set[tuple[str, str, int]]:
    """The runs of a suite whose nets travel with their records: of those that are small and judged by a test set, as
    many as fit into a set, first seeds first, then by how little is lost to the dense control."""
    pruned = [r for r in found if r.stage == "prune" and r.method != "dense" and r.status == "ok" and r.size]
    pruned = [r for r in pruned if not _explores(r)]
    chosen, room = set(), LARGEST_SET
    for record in sorted(pruned, key=lambda r: (r.seed, r.value - r.control.value if r.control else 0.0, r.run)):
        size = record.size.file_bytes or 0  # type: ignore[union-attr]
        largest = LARGEST_NET if record.method in VARIATIONAL_METHODS else LARGEST_BASELINE
        if size <= min(room, largest):
            chosen.add(record.run)
            room -= size
    return chosen


def _explores(record: records.Record) -> bool:
    """Whether a net was judged by held-out examples."""
    return record.spec["validation_size"] > 0


def nets() -> dict[str, dict[str, Path]]:
    """The pruned nets that are shipped: by "<experiment>-<method>" and "seed<n>", their files."""
    found: dict[str, dict[str, Path]] = {}
    for folder in (FOLDER, *_SHIPPED):  # this folder's own runs first, but they may be of other nets
        for path in sorted(folder.glob("*/*/*/*/pruned.npz")):
            experiment, method, seed = path.parts[-4:-1]
            found.setdefault(f"{experiment}-{method}", {}).setdefault(seed, path)
    return found


def load(name: str, *, sparse: bool = False) -> "nn.Module":
    """A pruned net that is shipped with the project, in eval mode, on the CPU.

    Args:
        name: `<experiment>-<method>-seed<n>`, such as `lenet5-mnist-vd_warmup-seed0`; without a seed, the first one.
        sparse: give back the net as `to_cpu_sparse` makes it, computing with its nonzero weights alone.

    Raises:
        KeyError: no net of that name is shipped; the message has similar names.
    """
    from vdbench.pruning import load_net
    from vdbench.sparse import to_cpu_sparse

    model, _ = load_net(net_file(name))
    return to_cpu_sparse(model) if sparse else model


def net_file(name: str) -> Path:
    """Where a net lies that is shipped under a name. Raises KeyError as `load` does."""
    found = nets()
    paths = {f"{run}-{seed}": path for run, seeds in found.items() for seed, path in seeds.items()}
    paths |= {run: next(iter(seeds.values())) for run, seeds in found.items()}
    if name not in paths:
        similar = ", ".join(difflib.get_close_matches(name, paths))
        hint = f"did you mean {similar}? " if similar else ""
        raise KeyError(f"no shipped net is called {name!r}; {hint}vdbench info lists them all")
    return paths[name]
