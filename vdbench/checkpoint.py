"""The side file that a training which was killed goes on from."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vdbench import posterior
from vdbench.config import RunSpec, spec_sha256
from vdbench.provenance import hardware
from vdbench.records import RecordError
from vdbench.stages import stage_versions
from vdbench.tensors import load_tensors, save_tensors

log = logging.getLogger("vdbench")


@dataclass(frozen=True)
class Identity:
    """Whose checkpoint it is, and what a run's numbers depend on besides.

    A checkpoint of another run is of no use and passed over. One of this run under other `circumstances` holds work
    that somebody may want back, and would give numbers that no run from the start gives: it is refused. Where `noted`
    differs the run goes on, and its record says so: other hardware changes last digits, and other code of the same
    stage version should change none.
    """

    run: dict[str, Any]
    circumstances: dict[str, Any]
    noted: dict[str, str]

    @classmethod
    def of(cls, spec: RunSpec, code_digest: str, inputs: dict[str, str], device: str) -> "Identity":
        return cls(
            {"spec": spec_sha256(spec.content()), "stages": stage_versions("train", spec.method), "inputs": inputs},
            {
                "threads": torch.get_num_threads(),
                "device": device,
                "torch": str(torch.__version__),
                "variance_dtype": posterior.variance_dtype(device, spec.recipe.matmul_precision),
            },
            {"hardware": hardware(device), "code": code_digest},
        )


@dataclass
class Checkpoint:
    """`resume.pt` of one run."""

    path: Path
    identity: Identity
    seconds_before: float = 0.0
    note: str = ""  # for the record, of what is not as it would have been in one go

    def load(self) -> dict[str, Any] | None:
        """The state to go on from, None where there is none of this run.

        Raises RecordError for a file that is damaged, or that was made with other threads, device, torch or types.
        """
        if not self.path.exists():
            return None
        saved = load_tensors(self.path)
        try:
            state, self.seconds_before = saved["state"], float(saved["seconds"])
            run, then, noted = saved["run"], dict(saved["circumstances"]), dict(saved["noted"])
            self.note = str(saved["note"])
            epochs = len(state["history"])
        except (KeyError, TypeError, ValueError):
            raise self.refusal("not a checkpoint of a training") from None
        if run != self.identity.run:
            log.warning("%s comes from another spec, stage version or input: starting over", self.path)
            self.seconds_before, self.note = 0.0, ""
            return None
        now = self.identity.circumstances
        changed = [f"{name} {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name]]
        if changed:
            raise RecordError(
                f"{self.path}: {epochs} epochs were trained with {'; '.join(changed)}: numbers would be neither the "
                "one's nor the other's; run it as it was begun, or delete the file to start over"
            )
        for what, value in self.identity.noted.items():
            if noted.get(what) != value:
                change = f"{what} {noted.get(what)} up to epoch {epochs}, then {value}"
                log.warning("%s: %s: last digits may differ from a run with one of them", self.path, change)
                self.note = "; ".join(filter(None, (self.note, change)))
        return state

    def save(self, state: dict[str, Any], seconds: float) -> None:
        """Raises OSError; the checkpoint before this one is then still there."""
        seconds += self.seconds_before
        save_tensors(self.path, {**asdict(self.identity), "state": state, "seconds": seconds, "note": self.note})

    def refusal(self, reason: object) -> RecordError:
        return RecordError(f"{self.path}: {reason}; delete it to start over")
