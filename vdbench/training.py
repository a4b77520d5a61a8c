"""One training loop for every net and method, resumable after each epoch."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vdbench import history, metrics, records
from vdbench.baselines import GradualPruner
from vdbench.checkpoint import Checkpoint, Identity
from vdbench.config import (
    BASELINE_METHODS,
    VARIATIONAL_METHODS,
    RunSpec,
    SuiteError,
    VariationalRecipe,
    spec_sha256,
)
from vdbench.conversion import to_variational_dropout
from vdbench.data import OWN_DATA, Dataset
from vdbench.job import Job
from vdbench.language import LANGUAGE_MODELS
from vdbench.models import MODELS, set_dropout
from vdbench.process import denormals_are_zero, own_randomness
from vdbench.provenance import package_versions
from vdbench.records import Record
from vdbench.schedules import derived_seed, kl_weight, learning_rate
from vdbench.steps import Step, build_optimizer, load_optimizer_state, set_learning_rates
from vdbench.tasks import Task, task
from vdbench.tensors import load_state, load_tensors, save_tensors, state_sha256
from vdbench.text import Text
from vdbench.variational import variational_layers

log = logging.getLogger("vdbench")

CHECKPOINT_SECONDS = 10.0  # a kill loses at most this much work and the epoch in progress
DIVERGENCE_CHECK_STEPS = 100
PRUNING_STEPS = 100  # steps between two updates of the baselines' masks

Report = Callable[[dict[str, Any]], object]


def _nobody(progress: dict[str, Any]) -> None:
    """Told how far a run is."""


def pick_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def build_model(spec: RunSpec, num_classes: int, pretrained: Path | None) -> nn.Module:
    """The net a run starts from: seeded initial weights or dense ones, made variational if the method is."""
    with own_randomness():
        torch.manual_seed(derived_seed(spec.seed, "initial"))
        model = MODELS[spec.model](num_classes)
    if pretrained is not None:
        load_state(model, pretrained)
    recipe = spec.recipe
    variational = isinstance(recipe, VariationalRecipe)
    if recipe.dropout is not None or variational:  # which takes the place of the dense net's dropout
        set_dropout(model, recipe.dropout or 0.0)
    if variational:
        to_variational_dropout(model, loga_threshold=spec.threshold, initial_log_sigma2=recipe.initial_log_sigma2)
        for _, layer in variational_layers(model):
            layer.mask_in_training = recipe.mask_in_training
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@dataclass
class Training:
    """A run in progress: everything a checkpoint holds and everything an epoch needs."""

    spec: RunSpec
    task: Task
    model: nn.Module
    optimizer: torch.optim.Adam
    step: Step
    pruner: GradualPruner | None
    device: str
    history: list[dict[str, float]]
    inputs: dict[str, str]  # hashes of the nets it starts from, and of the user's own images, by what they are to it
    good: dict[str, Tensor]  # the weights of the last epoch that ended in numbers

    def run_epoch(self, epoch: int, bar: "tqdm[Any]") -> dict[str, float] | None:
        """Train for one epoch and evaluate; None when the loss or the weights stop being numbers."""
        started = time.perf_counter()
        recipe = self.spec.recipe
        rate, beta = learning_rate(recipe, epoch), kl_weight(recipe, epoch)
        own_rate = getattr(recipe, "log_sigma2_learning_rate", None) or recipe.learning_rate
        rates = [base * rate / recipe.learning_rate for base in (recipe.learning_rate, own_rate)]
        set_learning_rates(self.optimizer, rates[: len(self.optimizer.param_groups)])
        steps, examples = self.task.steps, self.task.num_examples
        self.step.kl_scale.fill_(beta / examples)
        self.step.totals.zero_()
        if not self.run_steps(epoch, bar):
            return None
        class_loss_mean, kl_mean = (self.step.totals / steps).tolist()
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            return None  # said here, for a log_sigma2 that is no number would count as sparsity
        evaluated = self.task.evaluate(self.model)
        if not math.isfinite(class_loss_mean + kl_mean + evaluated["cross_entropy"]):
            return None
        counted = metrics.size(self.model)
        return {
            "epoch": epoch + 1,
            "learning_rate": rate,
            "kl_weight": beta,
            "loss": class_loss_mean + beta / examples * kl_mean,
            "class_loss": class_loss_mean,
            "kl": kl_mean,
            **{key: evaluated[key] for key in self.task.measures if key in evaluated},
            "sparsity": counted.sparsity,
            "compression_ratio": counted.compression_ratio,
            "seconds": time.perf_counter() - started,
            **{f"sparsity:{layer.name}": layer.sparsity for layer in metrics.layers(self.model)},
        }

    def run_steps(self, epoch: int, bar: "tqdm[Any]") -> bool:
        """The steps of an epoch; False when the loss stops being a number."""
        steps = self.task.steps
        self.model.train()
        for number, (inputs, targets) in enumerate(self.task.batches(epoch)):
            if self.pruner is not None and number % PRUNING_STEPS == 0:
                self.pruner.update((epoch * steps + number) / (self.spec.recipe.prune_epochs * steps))  # type: ignore[union-attr]
            self.step(inputs, targets)
            if self.pruner is not None:
                self.pruner.apply()
            if (number + 1) % DIVERGENCE_CHECK_STEPS == 0:
                if not bool(self.step.totals.isfinite().all()):
                    return False
                bar.update(DIVERGENCE_CHECK_STEPS)
        bar.update(steps % DIVERGENCE_CHECK_STEPS)
        return True

    def run(self, save: Callable[[dict[str, Any]], None], progress: bool, report: Report = _nobody) -> bool:
        """Train the epochs that are left; `save` is handed a checkpoint now and then, `report` told how far it is
        after every epoch. False when the run diverged."""
        epochs, saved_at = self.spec.recipe.epochs, time.monotonic()
        steps = self.task.steps
        around_the_bar = logging_redirect_tqdm() if progress else nullcontext()
        bar = tqdm(total=epochs * steps, initial=len(self.history) * steps, disable=not progress, unit="step")
        with around_the_bar, bar:
            for epoch in range(len(self.history), epochs):
                # every epoch has randomness of its own, so a resumed run draws what an undisturbed one would have
                torch.manual_seed(derived_seed(self.spec.seed, "noise", epoch))
                row = self.run_epoch(epoch, bar)
                if row is None:
                    return False
                self.history.append(row)
                self.good = {name: value.clone() for name, value in self.model.state_dict().items()}
                log.info(history.line(self.history, epochs))
                report(history.progress(self.history, epochs))
                if time.monotonic() - saved_at > CHECKPOINT_SECONDS and epoch + 1 < epochs:
                    save(self.state())
                    saved_at = time.monotonic()
        return True

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "masks": self.pruner.masks if self.pruner else {},
            "history": self.history,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Raises whatever comes of a state that is not of this run's kind."""
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.history[:] = state["history"]
        self.good = {name: value.clone() for name, value in self.model.state_dict().items()}
        if self.pruner is not None:
            self.pruner.masks = {name: mask.to(self.device) for name, mask in state["masks"].items()}


def _start(spec: RunSpec, data: Dataset | Text, pretrained: Path | None, matched: Path | None, device: str) -> Training:
    if isinstance(data, Text) != (spec.model in LANGUAGE_MODELS):
        raise SuiteError(f"model {spec.model} is not for data set {spec.dataset}: language models are for texts")
    work = task(data, spec)
    if work.steps < 1:
        raise SuiteError(f"batch_size {spec.recipe.batch_size} exceeds the {work.num_examples:,} training examples")
    needs_pretrained = spec.method == "vd_finetune" or spec.method in BASELINE_METHODS
    if needs_pretrained and pretrained is None:
        raise SuiteError(f"{spec.method} starts from dense weights: pass --pretrained weights.pt")
    model = build_model(spec, data.num_classes, pretrained if needs_pretrained else None).to(device)
    wanted, found = getattr(model, "input_shape", None), tuple(data.example.shape[1:])
    if wanted is not None and wanted != found:
        raise SuiteError(
            f"{spec.model} takes images {wanted} (channels, height, width); those of {spec.dataset} are {found}"
        )
    inputs = {"pretrained": state_sha256(load_tensors(pretrained))} if needs_pretrained and pretrained else {}
    if spec.dataset.startswith(OWN_DATA):
        inputs["data"] = data.sha256()  # a name alone does not say what is in there
    pruner = None
    if spec.method in BASELINE_METHODS:
        if matched is None:
            raise SuiteError(f"{spec.method} copies another run's sparsity: pass --matched prune.json")
        copied = records.read(matched)
        inputs["matched"] = copied.weights_sha256 or ""
        kept = {layer.name: layer.nonzero for layer in copied.layers}
        scores = torch.Generator().manual_seed(derived_seed(spec.seed, "scores")) if spec.method == "random" else None
        try:
            pruner = GradualPruner(model, kept, scores)
        except ValueError as error:
            raise records.RecordError(f"{matched}: {error}") from None
    optimizer = build_optimizer(model, spec.recipe)
    step = Step(model, optimizer, spec.recipe, work.loss, spec.method in VARIATIONAL_METHODS)
    good = {name: value.clone() for name, value in model.state_dict().items()}
    return Training(spec, work, model, optimizer, step, pruner, device, [], inputs, good)


def train(
    spec: RunSpec,
    *,
    suite: str,
    output: Path,
    data: Dataset | Text,
    pretrained: Path | None = None,
    matched: Path | None = None,
    progress: bool = False,
    report: Report = _nobody,
    waited: bool = False,
) -> Record:
    """Train one run and write `train.json`, `weights.pt` and `history.csv` into `output`.

    A run that was killed goes on from `resume.pt`, and ends with the same weights, bit for bit on a CPU, as one that
    was not. The file stays until the run is pruned: a workflow that takes back what a finished job wrote, because
    another job of its group failed, finds it all there again. A checkpoint of another spec, stage version or input is
    ignored.

    Args:
        pretrained: dense weights, for vd_finetune and the baselines.
        matched: prune record of the run whose layerwise sparsity the baselines reach.
        progress: show a progress bar.
        report: told how far the run is after every epoch, in the fields of `running.Progress`.
        waited: another job was in the folder until now; if it was this one and finished, its result is taken.

    Raises:
        SuiteError: an input the method needs is not given. RecordError: an input cannot be read, or a checkpoint of
            this run is damaged or was made with other threads, device or torch. OSError: a result cannot be written.
    """
    job = Job("train", spec, suite)
    device = pick_device()
    run = _start(spec, data.to(device), pretrained, matched, device)
    if waited and (done := _made_meanwhile(output, job, run)):
        log.info("the job waited for has done it all")
        return done
    checkpoint = Checkpoint(output / "resume.pt", Identity.of(spec, job.code.digest, run.inputs, device))
    state = checkpoint.load()
    if state is not None:
        try:
            run.restore(state)
        except Exception as error:  # as many kinds as there are parts of it
            raise checkpoint.refusal(f"does not fit the run ({type(error).__name__})") from None
        log.info("resumed after epoch %d", len(run.history))
        report(history.progress(run.history, spec.recipe.epochs))

    with own_randomness(), denormals_are_zero():
        finished = run.run(lambda state: checkpoint.save(state, job.seconds), progress, report)
    if finished:
        checkpoint.save(run.state(), job.seconds)
    save_tensors(output / "weights.pt", run.good)
    history.write(output / "history.csv", run.history)
    last = run.history[-1] if run.history else {}
    diverged = "" if finished else f"loss or weights stopped being numbers in epoch {len(run.history) + 1}"
    record = job.record(
        device=device,
        seconds_before=checkpoint.seconds_before,
        status="ok" if finished else "diverged",
        message="; ".join(filter(None, (diverged, checkpoint.note))),
        metrics={key: last[key] for key in ("epoch", *run.task.measures, "loss", "class_loss", "kl") if key in last},
        threshold=spec.threshold,
        history="history.csv",
        inputs=run.inputs,
        weights_sha256=state_sha256(run.good),
    )
    records.write(record, output / "train.json")
    if not finished:
        checkpoint.path.unlink(missing_ok=True)
    return record


def _made_meanwhile(output: Path, job: Job, run: Training) -> Record | None:
    """The result of another process, if it is what this one would make and all of it is there."""
    try:
        record, weights = records.read(output / "train.json"), load_tensors(output / "weights.pt")
        is_whole = state_sha256(weights) == record.weights_sha256 and (output / "history.csv").exists()
    except (records.RecordError, AttributeError):
        return None
    made = record.provenance
    is_ours = (record.spec_sha256, record.code_digest, record.inputs) == (
        spec_sha256(run.spec.content()),
        job.code.digest,
        run.inputs,
    ) and (made.threads, made.versions.get("torch")) == (torch.get_num_threads(), package_versions()["torch"])
    return record if is_whole and is_ours else None
