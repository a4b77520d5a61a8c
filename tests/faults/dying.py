"""`vdbench`, with a checkpoint after every epoch, and dying by SIGKILL while it writes a file if it is told to.

DYING_PLAN names a JSON file: `name` of the file, `passes` of its writes that go well before, and the `moment`: "begun",
nothing of it is written; "half" of it is; "written", all of it, but it is not in its place; "replaced", it has just
taken its place. The plan is gone once somebody has died of it.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from vdbench import cli, records

PLAN = Path(os.environ.get("DYING_PLAN", "no plan"))
passed = 0


def planned(path: Path) -> str | None:
    """The moment to die at in this write, if any."""
    global passed
    try:
        plan = json.loads(PLAN.read_text())
    except FileNotFoundError:
        return None
    if plan["name"] != path.name:
        return None
    passed += 1
    return plan["moment"] if passed > plan["passes"] else None


def die() -> None:
    PLAN.unlink(missing_ok=True)
    os.kill(os.getpid(), signal.SIGKILL)


real_write = records.atomic_write


@contextlib.contextmanager
def write(path: Path) -> Iterator[Path]:
    moment = planned(path)
    with real_write(path) as temporary:
        if moment == "begun":
            die()
        yield temporary
        if moment == "half":
            os.truncate(temporary, temporary.stat().st_size // 2)
        if moment in ("half", "written"):
            die()
    if moment == "replaced":
        die()


def main() -> int:
    records.atomic_write = write
    if "train" in sys.argv[1:2]:
        from vdbench import training

        training.CHECKPOINT_SECONDS = -1.0
    from vdbench import collecting, files, netfile
    from vdbench.tables import render

    for module in (collecting, files, netfile, render):
        module.atomic_write = write  # type: ignore[attr-defined]
    if "train" in sys.argv[1:2]:
        from vdbench import history

        history.atomic_write = write
    if "plot" in sys.argv[1:2]:
        from vdbench.plots import style

        style.atomic_write = write
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
