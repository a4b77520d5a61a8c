"""What results stand on: the versions of the stages that made them."""

from vdbench.config_recipes import BASELINE_METHODS

# Raise a stage's version when a change to its code can alter numbers: every result that stands on it becomes stale.
STAGE_VERSIONS = {"data": 1, "train": 1, "prune": 1, "time": 9}
UPSTREAM = {"data": ("data",), "train": ("data", "train"), "prune": ("data", "train", "prune")}
UPSTREAM["time"] = (*UPSTREAM["prune"], "time")


def stage_versions(stage: str, method: str) -> dict[str, int]:
    """The versions a record of `stage` stands on: its own and those of the stages before it.

    A baseline's training comes after the pruning of the run it is matched to.
    """
    names = UPSTREAM["prune"] if stage == "train" and method in BASELINE_METHODS else UPSTREAM[stage]
    return {name: STAGE_VERSIONS[name] for name in names}
