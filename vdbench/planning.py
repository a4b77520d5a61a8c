"""How many jobs a suite has left and how long they take, from past records on this hardware, else a stated guess."""

import heapq
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vdbench import records, shipping
from vdbench.config import BASELINE_METHODS, VARIATIONAL_METHODS, Suite
from vdbench.progress import states
from vdbench.provenance import cpu_model
from vdbench.records import Record

Node = tuple[str, ...]

# Seconds an epoch of 60,000 examples takes one core of a 2020s server: for what has not been run before.
GUESSED_EPOCH_S = {
    "lenet300100": {"dense": 1.8, "vd_finetune": 4.0, "vd_warmup": 4.0, "magnitude": 2.0, "random": 2.0},
    "lenet5": {"dense": 18.0, "vd_finetune": 34.0, "vd_warmup": 34.0, "magnitude": 19.0, "random": 19.0},
    "rnnlm_tanh": {"dense": 30.0, "vd_finetune": 34.0, "vd_warmup": 34.0, "magnitude": 32.0, "random": 32.0},
    "rnnlm_tanh_200": {"dense": 10.0, "vd_finetune": 12.0, "vd_warmup": 12.0, "magnitude": 11.0, "random": 11.0},
    "rnnlm_lstm": {"dense": 50.0, "vd_finetune": 60.0, "vd_warmup": 60.0, "magnitude": 52.0, "random": 52.0},
    "rnnlm_lstm_200": {"dense": 13.0, "vd_finetune": 16.0, "vd_warmup": 16.0, "magnitude": 14.0, "random": 14.0},
    "rnnlm_lstm_onehot": {"dense": 50.0, "vd_finetune": 60.0, "vd_warmup": 60.0, "magnitude": 52.0, "random": 52.0},
}
for _model, _dense, _variational in (
    ("vgglike_k025", 70.0, 130.0),
    ("vgglike_k050", 210.0, 400.0),
    ("vgglike_k100", 800.0, 1500.0),
    ("vgglike_k150", 1800.0, 3300.0),
):
    GUESSED_EPOCH_S[_model] = dict.fromkeys(("dense", *BASELINE_METHODS), _dense)
    GUESSED_EPOCH_S[_model] |= dict.fromkeys(VARIATIONAL_METHODS, _variational)
GUESSED_S = {"prune": 20.0, "time": 120.0, "layer": 15.0, "fetch": 10.0, "collect": 5.0, "table": 10.0, "plot": 60.0}
_TRAIN_RULES = {"dense": "pretrain", **dict.fromkeys(BASELINE_METHODS, "baseline")}


@dataclass(frozen=True)
class Job:
    """One job of the workflow: `after` are those it waits for, `seconds` the estimate, `basis` what that stands on."""

    name: Node
    rule: str
    after: frozenset[Node]
    seconds: float
    basis: str
    is_done: bool
    alone: bool = False


def jobs(suite: Suite, results: Path, past: Iterable[Record]) -> list[Job]:
    """Every job of the workflow, each after those it waits for."""
    past, found = list(past), []

    for dataset in dict.fromkeys(experiment.dataset for experiment in suite.experiments.values()):
        is_done = (results / "data" / f"{dataset}.json").exists()
        found.append(Job(("fetch", dataset), "fetch", frozenset(), *_guess("fetch"), is_done))
    for state in states(suite, results):
        run = (state.experiment, state.method, str(state.seed))
        after = frozenset(_after(suite, state.stage, *run))
        spec = suite.spec_of(state.stage, state.experiment, state.method, state.seed)
        seconds, basis = estimate(state.stage, spec, past)
        rule = _rule(state.stage, state.method)
        found.append(Job((state.stage, *run), rule, after, seconds, basis, state.is_done, alone=state.stage == "time"))
    leaves = frozenset(job.name for job in found)
    is_done = all(job.is_done for job in found)
    for rule, output in (("collect", "collected.csv"), ("table", "tables"), ("plot", "figures")):
        found.append(Job((rule,), rule, leaves, *_guess(rule), is_done and (results / output).exists()))
    return found


def _rule(stage: str, method: str) -> str:
    if stage == "train":
        return _TRAIN_RULES.get(method, method)
    return {"time": "time_inference"}.get(stage, stage)


def _after(suite: Suite, stage: str, experiment: str, method: str, seed: str) -> Iterator[Node]:
    if experiment in suite.cases():
        return
    described = suite.experiments[experiment]
    if stage == "train":
        yield "fetch", described.dataset
        if method != "dense":
            for needed in described.prerequisites(method):  # type: ignore[arg-type]
                yield ("train" if needed == "dense" else "prune"), experiment, needed, seed
    elif stage == "prune":
        yield "train", experiment, method, seed
        if method != "dense":
            yield "prune", experiment, "dense", seed
    else:
        yield "prune", experiment, method, seed


def estimate(stage: str, spec: dict, past: Iterable[Record]) -> tuple[float, str]:
    """Seconds, and where they are from: the median of what the same took on this CPU, else on another, else a guess."""
    alike = [r for r in past if (r.stage, r.dataset, r.model) == (stage, spec["dataset"], spec["model"])]
    if stage == "train":
        alike = [r for r in alike if r.method == spec["method"]]
    if "arguments" in spec:
        alike = [r for r in alike if r.spec["arguments"] == spec["arguments"]]
    here = [record for record in alike if record.provenance.cpu == cpu_model()]
    chosen = here or alike
    if not chosen:
        return _guess("layer" if "layer" in spec.get("densities", ()) else stage, spec)
    where = "this CPU" if here else f"another CPU ({chosen[0].provenance.cpu})"
    if stage == "train":
        epoch_s = statistics.median(r.wall_s / r.spec["recipe"]["epochs"] for r in chosen)
        return epoch_s * spec["recipe"]["epochs"], f"{epoch_s:.3g} s an epoch, {_runs(chosen)} on {where}"
    seconds = statistics.median(record.wall_s for record in chosen)
    return seconds, f"{seconds:.3g} s, {_runs(chosen)} on {where}"


def _runs(chosen: list[Record]) -> str:
    return "one run" if len(chosen) == 1 else f"median of {len(chosen)} runs"


def _guess(stage: str, spec: dict | None = None) -> tuple[float, str]:
    if stage != "train" or spec is None:
        return GUESSED_S[stage], f"{GUESSED_S[stage]:g} s, a guess"
    from vdbench import data

    known = data.DATASETS.get(spec["dataset"])  # of the user's own data nothing is known before it is read
    share = known.examples["train"] / 60_000 if known else 1.0
    epoch_s = GUESSED_EPOCH_S[spec["model"]][spec["method"]] * share
    return epoch_s * spec["recipe"]["epochs"], f"{epoch_s:.3g} s an epoch, a guess: never run before"


def past_records(*folders: Path) -> Iterator[Record]:
    """Every finished run under the folders, once if it was recorded too; files that are no records say nothing."""
    seen = set()
    for folder in folders:
        for stage in records.STAGES:
            for path in folder.glob(f"**/{stage}.json"):
                try:
                    record = records.read(path)
                except records.RecordError:
                    continue
                made = record.suite, record.stage, record.run, record.provenance.started_at
                if record.status == "ok" and made not in seen:
                    seen.add(made)
                    yield record


def makespan(planned: Iterable[Job], cores: int) -> float:
    """Seconds until all is done, whatever is ready being started as soon as a core is free; timing jobs run alone."""
    waiting = list(planned)
    unfinished = {job.name for job in waiting}
    running: list[tuple[float, Node, int]] = []
    clock, free = 0.0, cores
    while waiting or running:
        for job in list(waiting):
            needed = cores if job.alone else 1
            if needed <= free and not job.after & unfinished:
                heapq.heappush(running, (clock + job.seconds, job.name, needed))
                waiting.remove(job)
                free -= needed
        clock, name, released = heapq.heappop(running)
        unfinished.remove(name)
        free += released
    return clock


def describe(suite: Suite, results: Path, *, cores: int) -> str:
    """The jobs of a suite by rule, with the hours that are left and what the estimates stand on."""
    planned = jobs(suite, results, past_records(results.parent, shipping.recorded()))
    left = [job for job in planned if not job.is_done]
    lines = [f"suite {suite.suite}: {len(planned)} jobs, {len(left)} to do"]
    if not left:
        return lines[0]
    lines += ["", "rule              jobs  to do  core hours"]
    for rule in dict.fromkeys(job.rule for job in planned):
        own = [job for job in planned if job.rule == rule]
        to_do = [job for job in own if not job.is_done]
        lines.append(f"{rule:16}{len(own):6}{len(to_do):7}{sum(job.seconds for job in to_do) / 3600:12.2f}")
    total = sum(job.seconds for job in left)
    lines += ["", f"{_duration(total)} of work, {_duration(makespan(left, cores))} on {cores} cores. Estimated from:"]
    lines += dict.fromkeys(f"  {_subject(suite, job)}: {job.basis}" for job in left)
    return "\n".join(lines)


def _subject(suite: Suite, job: Job) -> str:
    if job.name[0] not in records.STAGES:
        return job.rule
    if job.name[1] in suite.cases():
        return f"{job.name[0]} {job.name[1]}"
    described = suite.experiments[job.name[1]]
    which = f" {job.name[2]}" if job.name[0] == "train" else ""
    return f"{job.name[0]} {described.model} on {described.dataset}{which}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
