"""What a suite file may say: typed, unknown keys forbidden, no torch, so that a workflow can import it for nothing."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import AfterValidator, Field, ValidationError, WithJsonSchema, model_validator

from vdbench.config_recipes import (
    BASELINE_METHODS,
    VARIATIONAL_METHODS,
    DenseRecipe,
    GradualRecipe,
    Method,
    Methods,
    VariationalRecipe,
)
from vdbench.config_timing import Case, CaseSpec, Name, Seed, Strict, Synthetic, Timing
from vdbench.mistakes import explain, read_bounded, reason
from vdbench.unique_keys import UniqueKeys

DatasetName = Literal["mnist", "digits", "cifar10", "cifar10_jpeg", "cifar100", "cifar100_coarse", "ptb", "topics"]
_ImageModel = Literal["lenet300100", "lenet5", "vgglike_k025", "vgglike_k050", "vgglike_k100", "vgglike_k150"]
_LanguageModel = Literal["rnnlm_tanh", "rnnlm_tanh_200", "rnnlm_lstm", "rnnlm_lstm_200", "rnnlm_lstm_onehot"]
ModelName = Literal[_ImageModel, _LanguageModel]
VGG_WIDTHS: dict[str, float] = {"vgglike_k025": 0.25, "vgglike_k050": 0.5, "vgglike_k100": 1.0, "vgglike_k150": 1.5}

Spec = TypeVar("Spec", bound=Strict)

TEXT_DATASETS: tuple[DatasetName, ...] = ("ptb", "topics")
GREY_DATASETS: tuple[DatasetName, ...] = ("mnist", "digits")
WITHOUT_DROPOUT: tuple[ModelName, ...] = ("lenet300100", "lenet5", "rnnlm_lstm_onehot")

LARGEST_SUITE = 16 << 20  # bytes of its file


def _known_dataset(name: str) -> str:
    if name not in get_args(DatasetName) and not re.fullmatch(r"(folder|text):\w[\w.-]*", name):
        raise ValueError(
            f"no data set {name!r}: there are {', '.join(get_args(DatasetName))}, folder:NAME and text:NAME"
        )
    return name


# One that is known, or pictures (`folder:NAME`) or texts (`text:NAME`) of the user's own.
AnyDataset = Annotated[
    str, AfterValidator(_known_dataset), WithJsonSchema({"enum": [*get_args(DatasetName), "folder:NAME", "text:NAME"]})
]


class Experiment(Strict):
    """One net on one data set."""

    dataset: AnyDataset = Field(
        description="trained and evaluated on; of your own, in the mirror folder: `folder:NAME`, a folder or archive "
        "of pictures, and `text:NAME`, a folder of texts"
    )
    model: ModelName = Field(description="the net")
    seeds: list[Seed] = Field(min_length=1, description="one run of every method for each")
    threshold: float = Field(3.0, ge=-8, le=8, description="weights with log alpha at or above it are removed")
    validation_size: int = Field(
        0, ge=0, description="training examples, or words of a validation text, evaluated on, not the test set"
    )
    augment: bool = Field(False, description="shift training images by up to 4 pixels and mirror half of them")
    match: Literal["vd_finetune", "vd_warmup"] = Field("vd_finetune", description="whose sparsity the baselines copy")
    seeds_of: dict[Method, Annotated[list[Seed], Field(min_length=1)]] = Field(
        {}, description="methods that run fewer seeds than `seeds`"
    )
    timed: list[Method] = Field([], description="methods whose first seed is timed in sparse inference")
    methods: Methods = Field(description="what is run, and how")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, values in (("seeds", self.seeds), ("timed", self.timed), *self.seeds_of.items()):
            if len(set(values)) != len(values):
                raise ValueError(f"{key}: {values} has duplicates")
        present = self.present_methods()
        for key, names in (("timed", self.timed), ("seeds_of", list(self.seeds_of))):
            for name in names:
                if name not in present:
                    raise ValueError(f"{key}: {name} is not among this experiment's methods {present}")
        for method, seeds in self.seeds_of.items():
            missing = [seed for seed in seeds if seed not in self.seeds]
            if missing:
                raise ValueError(f"seeds_of {method}: {missing} not among seeds {self.seeds}")
        is_text = self.dataset in TEXT_DATASETS or self.dataset.startswith("text:")
        if is_text != (self.model in get_args(_LanguageModel)):
            raise ValueError(f"model: {self.model} is not for {self.dataset}: language models are for texts")
        if not is_text and (self.dataset in GREY_DATASETS) != self.model.startswith("lenet"):
            raise ValueError(
                f"model: {self.model} is not for {self.dataset}: LeNets are for digits, the rest for images in colour"
            )
        if self.model == "rnnlm_lstm_onehot" and self.timed:
            raise ValueError(f"timed: dense engines would multiply the one-hot words of {self.model}; it is not timed")
        if self.augment and is_text:
            raise ValueError(f"augment: {self.dataset} is a text and has no images")
        if self.augment and self.dataset in GREY_DATASETS:
            raise ValueError(f"augment: the mirror image of a digit is none; {self.dataset} is trained on as it is")
        for method in present:
            recipe = getattr(self.methods, method)
            if recipe.sequence_length and not is_text:
                raise ValueError(f"{method}: sequence_length is of texts, and {self.dataset} is none")
            if recipe.dropout and self.model in WITHOUT_DROPOUT:
                raise ValueError(f"{method}: dropout: {self.model} has no dropout layers")
        matched = getattr(self.methods, self.match)
        for method in BASELINE_METHODS:
            recipe = getattr(self.methods, method)
            if recipe and matched and recipe.epochs != matched.epochs:
                raise ValueError(
                    f"{method} has {recipe.epochs} epochs, {self.match}, which it is compared with, {matched.epochs}"
                )
        for method in present:
            for needed in self.prerequisites(method):
                if needed not in present:
                    raise ValueError(f"{method} needs {needed}, which this experiment does not run")
                missing = [seed for seed in self.method_seeds(method) if seed not in self.method_seeds(needed)]
                if missing:
                    raise ValueError(f"{method} runs seeds {missing} that {needed}, which it needs, does not")
        return self

    def present_methods(self) -> list[Method]:
        return [name for name in Methods.model_fields if getattr(self.methods, name) is not None]  # type: ignore[misc]

    def method_seeds(self, method: Method) -> list[int]:
        return self.seeds_of.get(method, self.seeds)

    def prerequisites(self, method: str) -> tuple[Method, ...]:
        """The methods whose results `method` starts from."""
        if method in BASELINE_METHODS:
            return ("dense", self.match)
        return ("dense",) if method == "vd_finetune" else ()


class Suite(Strict):
    """A suite file."""

    suite: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="names the results folder")
    description: str = Field("", description="a line for readers")
    mirror: str | None = Field(None, description="folder read before any download; VDBENCH_MIRROR overrides it")
    timing: Timing = Field(Timing(), description="how sparse inference is timed")
    experiments: dict[Name, Experiment] = Field(
        default={}, min_length=1, description="what is trained, each under a name of its own"
    )
    synthetic: Synthetic = Field(default=Synthetic(), description="nets that are timed without having been trained")

    def runs(self) -> Iterator[tuple[str, Method, int]]:
        """Every (experiment, method, seed), in the order in which they can be run."""
        for name, experiment in self.experiments.items():
            for method in sorted(experiment.present_methods(), key=lambda m: len(experiment.prerequisites(m))):
                for seed in experiment.method_seeds(method):
                    yield name, method, seed

    def timed_runs(self) -> list[tuple[str, Method, int]]:
        return [
            (name, method, experiment.method_seeds(method)[0])
            for name, experiment in self.experiments.items()
            for method in experiment.timed
        ]

    def cases(self) -> dict[str, Case]:
        """The nets that are timed without having been trained, by name."""
        return self.synthetic.cases()

    @model_validator(mode="after")
    def _can_be_run(self) -> Self:
        if self.suite == "recorded":
            raise ValueError("suite: results/recorded is where recorded runs are; take another name")
        if not self.experiments and not self.cases():
            raise ValueError("nothing to run: there are neither experiments nor synthetic nets")
        both = sorted(self.experiments.keys() & self.cases().keys())
        if both:
            raise ValueError(f"synthetic: {', '.join(both)}: an experiment has this name")
        return self

    def jobs(self) -> Iterator[tuple[str, str, str, int]]:
        """Every (stage, experiment, method, seed) that leaves a record, in the order in which they can be run.

        A net that is not trained is an experiment too, and what it is made of stands for its method.
        """
        for run in self.runs():
            yield "train", *run
            yield "prune", *run
        for run in self.timed_runs():
            yield "time", *run
        for name, case in self.cases().items():
            for method in case.nets():
                yield "time", name, method, case.seed

    def run_spec(self, experiment: str, method: str, seed: int) -> dict[str, Any]:
        """All that decides the outcome of one run, the runs it starts from included: what is hashed and recorded."""
        e = self.experiments[experiment]
        return {
            "experiment": experiment,
            "dataset": e.dataset,
            "model": e.model,
            "method": method,
            "seed": seed,
            "threshold": e.threshold,
            "validation_size": e.validation_size,
            **({"augment": True} if e.augment else {}),
            "recipe": getattr(e.methods, method).model_dump(exclude_none=True),
            "after": [self.run_spec(experiment, needed, seed) for needed in e.prerequisites(method)],
        }

    def spec_of(self, stage: str, experiment: str, method: str, seed: int) -> dict[str, Any]:
        """The spec of a stage: the run's, and for timing also how it is timed."""
        case = self.cases().get(experiment)
        if case:
            timing = self.timing.model_copy(update={"batch_sizes": case.batch_sizes or self.timing.batch_sizes})
            net = case.nets()[method]
            return CaseSpec(experiment=experiment, method=method, seed=seed, timing=timing, **net).content()
        spec = self.run_spec(experiment, method, seed)
        return spec | {"timing": self.timing.model_dump()} if stage == "time" else spec


class RunSpec(Strict):
    """One run, as `Suite.run_spec` writes it and a job reads it."""

    experiment: str
    dataset: AnyDataset
    model: ModelName
    method: Method
    seed: int
    threshold: float
    validation_size: int
    augment: Literal[True] | None = None
    recipe: VariationalRecipe | GradualRecipe | DenseRecipe
    after: list["RunSpec"]
    timing: Timing | None = None

    @model_validator(mode="before")
    @classmethod
    def _recipe_of_method(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
            return content
        kinds = dict.fromkeys(VARIATIONAL_METHODS, VariationalRecipe) | dict.fromkeys(BASELINE_METHODS, GradualRecipe)
        kind = kinds.get(content.get("method"), DenseRecipe)  # type: ignore[arg-type]
        return content | {"recipe": kind.model_validate(content["recipe"])}

    def content(self) -> dict[str, Any]:
        """The spec as `Suite.spec_of` gives it: what is hashed and recorded."""
        return self.model_dump(exclude_none=True)


class SuiteError(ValueError):
    """A suite file or spec that cannot be run; the message says which key and why."""


def canonical(spec: dict[str, Any]) -> str:
    """JSON with sorted keys: equal specs have equal text."""
    return json.dumps(spec, sort_keys=True, separators=(",", ":"))


def spec_sha256(spec: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(spec).encode()).hexdigest()


def parse_suite(content: Any, where: str) -> Suite:
    """A validated suite. Raises SuiteError with one line for every wrong key."""
    try:
        return Suite.model_validate(content)
    except ValidationError as error:
        raise SuiteError(explain(error, where, Suite)) from None


def load_suite(path: Path) -> Suite:
    """Read and validate a suite file. Raises SuiteError."""
    try:
        loaded = yaml.load(read_bounded(path, LARGEST_SUITE).decode("utf-8"), UniqueKeys)
    except FileNotFoundError:
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml"))) or "none in ./configs"
        raise SuiteError(f"{path}: no such suite file (there are: {known})") from None
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read ({error.strerror}); name a suite file") from None
    except Exception as error:  # tags and nesting bring out whatever the constructors of YAML's types raise
        raise SuiteError(f"{path}: cannot be read as YAML: {reason(error)}; correct it there") from None
    if loaded is None:
        raise SuiteError(f"{path}: is empty; configs/README.md says what a suite file holds")
    return parse_suite(loaded, str(path))


def parse_spec(text: str) -> RunSpec:
    """The run a job was asked for. Raises SuiteError."""
    return _parse(text, RunSpec, "--spec")


def parse_case(text: str) -> CaseSpec:
    """The untrained net that a job was asked to time. Raises SuiteError."""
    return _parse(text, CaseSpec, "--spec, without --pruned")


def _parse(text: str, kind: type[Spec], where: str) -> Spec:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise SuiteError(explain(error, where, kind)) from None
