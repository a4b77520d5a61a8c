"""How many jobs a suite has left, and how long they take together."""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vdbench import records, shipping
from vdbench.config import BASELINE_METHODS, Suite
from vdbench.estimates import Past, guess, past_records
from vdbench.progress import duration, states

Node = tuple[str, ...]

_TRAIN_RULES = {"dense": "pretrain", **dict.fromkeys(BASELINE_METHODS, "baseline")}


@dataclass(frozen=True)
class PlannedJob:
    """One job of the workflow: `after` are those it waits for, `seconds` the estimate, `basis` what that stands on."""

    name: Node
    rule: str
    after: frozenset[Node]
    seconds: float
    basis: str
    is_done: bool
    alone: bool = False


def jobs(suite: Suite, results: Path, past: Past) -> list[PlannedJob]:
    """Every job of the workflow, each after those it waits for."""
    found = []
    for dataset in dict.fromkeys(experiment.dataset for experiment in suite.experiments.values()):
        is_done = (results / "data" / f"{dataset}.json").exists()
        found.append(PlannedJob(("fetch", dataset), "fetch", frozenset(), *guess("fetch"), is_done))
    for state in states(suite, results):
        run = (state.experiment, state.method, str(state.seed))
        after = frozenset(_after(suite, state.stage, *run))
        spec = suite.spec_of(state.stage, state.experiment, state.method, state.seed)
        seconds, basis = past.seconds(state.stage, spec)
        rule = _rule(state.stage, state.method)
        found.append(
            PlannedJob((state.stage, *run), rule, after, seconds, basis, state.is_done, alone=state.stage == "time")
        )
    leaves = frozenset(job.name for job in found)
    is_done = all(job.is_done for job in found)
    for rule, output in (("collect", "collected.csv"), ("table", "tables"), ("plot", "figures")):
        found.append(PlannedJob((rule,), rule, leaves, *guess(rule), is_done and (results / output).exists()))
    return found


def _rule(stage: str, method: str) -> str:
    if stage == "train":
        return _TRAIN_RULES.get(method, method)
    return "time_inference" if stage == "time" else stage


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


def makespan(planned: Iterable[PlannedJob], cores: int) -> float:
    """Seconds until all is done, whatever is ready being started as soon as a core is free; timing jobs run alone."""
    work = {job.name: job for job in planned}
    order = {name: place for place, name in enumerate(work)}
    waits_for = {name: len(job.after & work.keys()) for name, job in work.items()}
    followers: dict[Node, list[Node]] = defaultdict(list)
    for name, job in work.items():
        for needed in job.after & work.keys():
            followers[needed].append(name)
    ready = {
        alone: [(order[name], name) for name, job in work.items() if job.alone == alone and not waits_for[name]]
        for alone in (False, True)
    }
    running: list[tuple[float, Node, int]] = []
    clock, free = 0.0, cores
    while True:
        while queues := [ready[alone] for alone in (False, True) if ready[alone] and (cores if alone else 1) <= free]:
            _, name = heapq.heappop(min(queues))
            needed = cores if work[name].alone else 1
            heapq.heappush(running, (clock + work[name].seconds, name, needed))
            free -= needed
        if not running:
            return clock
        clock, name, released = heapq.heappop(running)
        free += released
        for follower in followers[name]:
            waits_for[follower] -= 1
            if not waits_for[follower]:
                heapq.heappush(ready[work[follower].alone], (order[follower], follower))


def describe(suite: Suite, results: Path, *, cores: int) -> str:
    """The jobs of a suite by rule, with the hours that are left and what the estimates stand on."""
    planned = jobs(suite, results, Past(past_records(results.parent, shipping.recorded())))
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
    lines += ["", f"{duration(total)} of work, {duration(makespan(left, cores))} on {cores} cores. Estimated from:"]
    lines += dict.fromkeys(f"  {_subject(suite, job)}: {job.basis}" for job in left)
    return "\n".join(lines)


def _subject(suite: Suite, job: PlannedJob) -> str:
    if job.name[0] not in records.STAGES:
        return job.rule
    if job.name[1] in suite.cases():
        return f"{job.name[0]} {job.name[1]}"
    described = suite.experiments[job.name[1]]
    which = f" {job.name[2]}" if job.name[0] == "train" else ""
    return f"{job.name[0]} {described.model} on {described.dataset}{which}"
