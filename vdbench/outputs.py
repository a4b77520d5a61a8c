"""Which tables and figures a suite ends in, and what readers see things called; a workflow imports it for nothing."""

from vdbench.config import VARIATIONAL_METHODS, Experiment, Suite

MODELS = {"lenet300100": "LeNet-300-100", "lenet5": "LeNet-5-Caffe"}
DATASETS = {"mnist": "MNIST", "digits": "digits"}
METHODS = {
    "dense": "dense",
    "vd_finetune": "Sparse VD, fine-tuned",
    "vd_warmup": "Sparse VD, warm-up",
    "magnitude": "magnitude pruning",
    "random": "random pruning",
}
BACKENDS = {
    "torch_dense": "torch, dense",
    "scipy_csr": "SciPy CSR",
    "torch_csr": "torch CSR",
    "onnxruntime": "onnxruntime, dense",
}
TABLES = {"table1": "Table 1: error and compression", "speedup": "measured speedup", "runs": "every run"}
FIGURES = {
    "error_vs_compression": "error against compression",
    "training_curves": "training curves",
    "log_alpha": "log α after training",
    "first_layer": "what the first layer kept",
    "speedup": "measured speedup",
}
TABLE_FORMATS = ("html", "csv", "md", "tex")  # the first is the one the report shows
FIGURE_FORMATS = ("png", "svg")


def title(name: str, experiment: Experiment) -> str:
    return f"{MODELS[experiment.model]} on {DATASETS[experiment.dataset]} ({name})"


def error_name(experiment: Experiment) -> str:
    """Which error an experiment measures: tables never put a validation error beside a test error."""
    return "validation error" if experiment.validation_size else "test error"


def tables(suite: Suite) -> list[str]:
    return ["table1", "runs", *(["speedup"] if suite.timed_runs() else [])]


def figures(suite: Suite) -> dict[str, tuple[str, list[str]]]:
    """File stem of every figure: its kind and the experiments it shows."""
    found: dict[str, tuple[str, list[str]]] = {
        "error_vs_compression": ("error_vs_compression", list(suite.experiments))
    }
    for name, experiment in suite.experiments.items():
        kinds = ["training_curves"]
        if set(VARIATIONAL_METHODS) & set(experiment.present_methods()):
            kinds += ["log_alpha", "first_layer"]
        if experiment.timed:
            kinds += ["speedup"]
        found |= {f"{kind}_{name}": (kind, [name]) for kind in kinds}
    return found


def table_names(suite: Suite) -> list[str]:
    """File names of every table, each always written."""
    return [f"{stem}.{extension}" for stem in tables(suite) for extension in TABLE_FORMATS]


def figure_names(suite: Suite) -> list[str]:
    """File names of every figure, each always written: without data the figure says that there are none and why."""
    return [f"{stem}.{extension}" for stem in figures(suite) for extension in FIGURE_FORMATS]
