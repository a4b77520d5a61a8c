"""Which tables and figures a suite ends in, and what readers see things called; a workflow imports it for nothing."""

from vdbench import published
from vdbench.config import VARIATIONAL_METHODS, VGG_WIDTHS, Experiment, Suite
from vdbench.config_timing import RANDOM_MASKS, Backend, SyntheticConvolution, SyntheticLinear, SyntheticNet

MODELS = {"lenet300100": "LeNet-300-100", "lenet5": "LeNet-5-Caffe", "vgglike": "VGG-like"}
MODELS |= {name: f"VGG-like, k = {width:g}" for name, width in VGG_WIDTHS.items()}
MODELS |= {
    "rnnlm_tanh": "tanh RNN, 2 x 650 units",
    "rnnlm_tanh_200": "tanh RNN, 2 x 200 units",
    "rnnlm_lstm": "LSTM, 2 x 650 units",
    "rnnlm_lstm_200": "LSTM, 2 x 200 units",
    "rnnlm_lstm_onehot": "LSTM, one-hot words, 256 units",
}
DATASETS = {
    "mnist": "MNIST",
    "digits": "digits",
    "cifar10": "CIFAR-10",
    "cifar10_jpeg": "CIFAR-10 as JPEG",
    "cifar100": "CIFAR-100",
    "cifar100_coarse": "CIFAR-100, 20 coarse classes",
    "ptb": "Penn Treebank",
    "topics": "Python's help texts",
}
LANGUAGE_MODELS = tuple(name for name in MODELS if name.startswith("rnnlm"))
METHODS = {
    "dense": "dense",
    "vd_finetune": "Sparse VD, fine-tuned",
    "vd_warmup": "Sparse VD, warm-up",
    "magnitude": "magnitude pruning",
    "random": "random pruning",
}
BACKENDS: dict[Backend, str] = {
    "torch_dense": "torch, dense",
    "torch_channels_last": "torch, channels last",
    "onnxruntime": "onnxruntime, dense",
    "openvino": "OpenVINO, dense",
    "mnn_dense": "MNN, dense",
    "torch_compacted": "torch, compacted",
    "onnxruntime_compacted": "onnxruntime, compacted",
    "openvino_compacted": "OpenVINO, compacted",
    "mnn_compacted": "MNN, compacted",
    "mnn_sparse": "MNN, sparse",
    "scipy_csr": "SciPy CSR",
    "torch_csr": "torch CSR",
    "sparse_dot_mkl": "MKL CSR",
    "im2col_scipy": "im2col, SciPy CSR",
    "vdbench": "vdbench",
}
TABLES = {
    "table1": "Table 1: error and compression",
    "runs": "every run",
    "kept": "what language models are left with",
    "speedup": "measured speedup",
}
FIGURES = {
    "error_vs_compression": "error against compression",
    "error_and_compression_by_width": "error and compression against width",
    "training_curves": "training curves",
    "published_curves": "training curves over published ones",
    "log_alpha": "log α after training",
    "first_layer": "what the first layer kept",
    "layers_left": "what is left of each layer",
    "time_per_image": "time per image or word",
    "speedup_by_sparsity": "speedup against sparsity",
    "roofline": "roofline",
}
TABLE_FORMATS = ("html", "csv", "md", "tex")  # the first is the one the report shows
FIGURE_FORMATS = ("png", "svg")
# Where an operand of a multiply-add comes from, by the key of a record's limits.
OPERANDS = {"fma": "registers", "load_l1": "L1", "load_l2": "L2", "load_l3": "L3", "load_memory": "memory"}


def dataset(experiment: Experiment) -> str:
    """What readers see a data set called; the user's own have their own names."""
    return DATASETS.get(experiment.dataset, experiment.dataset.partition(":")[2])


def net(experiment: Experiment) -> str:
    """Model and data set."""
    return f"{MODELS[experiment.model]} on {dataset(experiment)}"


def title(name: str, experiment: Experiment) -> str:
    return f"{net(experiment)} ({name})"


def figure_title(suite: Suite, name: str) -> str:
    """Model and data set, and on a line of its own the experiment, where others of the suite have the same."""
    shown = net(suite.experiments[name])
    alike = [e for e in suite.experiments.values() if net(e) == shown]
    return shown if len(alike) == 1 else f"{shown}\n{name}"


def timed_title(suite: Suite, name: str) -> str:
    """What a timed net or layer is, trained or not."""
    case = suite.cases().get(name)
    match case:
        case SyntheticNet(model="vgglike"):
            return f"{MODELS[case.model]}, width {case.width:g}"
        case SyntheticNet():
            return MODELS[case.model]
        case SyntheticConvolution():
            return f"3x3 convolution, {case.channels} channels, {case.size}x{case.size}"
        case SyntheticLinear():
            return f"linear layer, {case.inputs} to {case.outputs}"
    return title(name, suite.experiments[name])


def method(name: str) -> str:
    """What readers see a method called, or whatever stands for the method of a net that is not trained."""
    density = name.removeprefix("density")
    if density != name:
        return f"{100 * float(density):.4g} % of the weights"
    return "random masks" if name == RANDOM_MASKS else METHODS[name]


def measure(experiment: Experiment) -> str:
    """What nets are judged by, the smaller the better: `perplexity` for language models, else `error` in percent."""
    return "perplexity" if experiment.model in LANGUAGE_MODELS else "error"


def example(model: str) -> str:
    """What of a batch is timed: by whose time nets are compared."""
    return "a word" if model in LANGUAGE_MODELS else "an image"


def comparable(experiment: Experiment) -> tuple[str, str, int]:
    """What nets have to share for their errors to compare: equal for experiments whose nets do."""
    return experiment.dataset, experiment.model, experiment.validation_size


def threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def error_unit(experiment: Experiment) -> str:
    return " %" if measure(experiment) == "error" else ""


def error_name(experiment: Experiment) -> str:
    """Which error an experiment measures: tables never put a validation error beside a test error."""
    return f"{'validation' if experiment.validation_size else 'test'} {measure(experiment)}"


def tables(suite: Suite) -> list[str]:
    found = ["table1", "runs"] if suite.experiments else []
    found += ["kept"] if any(e.model in LANGUAGE_MODELS for e in suite.experiments.values()) else []
    return found + (["speedup"] if timed(suite) else [])


def timed(suite: Suite) -> list[str]:
    """Names of all that is timed, trained or not."""
    return [*(name for name, experiment in suite.experiments.items() if experiment.timed), *suite.cases()]


def figures(suite: Suite) -> dict[str, tuple[str, list[str]]]:
    """File stem of every figure: its kind and the experiments it shows."""
    found: dict[str, tuple[str, list[str]]] = {}
    if suite.experiments:
        found["error_vs_compression"] = ("error_vs_compression", list(suite.experiments))
    widths = [name for name, experiment in suite.experiments.items() if experiment.model in VGG_WIDTHS]
    if len({suite.experiments[name].model for name in widths}) > 1:
        found["error_and_compression_by_width"] = ("error_and_compression_by_width", widths)
    for name, experiment in suite.experiments.items():
        kinds = ["training_curves", *(["published_curves"] if published.curves(experiment) else [])]
        if set(VARIATIONAL_METHODS) & set(experiment.present_methods()):
            kinds += ["log_alpha"] if experiment.model in LANGUAGE_MODELS else ["log_alpha", "first_layer"]
            kinds += ["layers_left"] if name in widths or experiment.model in LANGUAGE_MODELS else []
        if experiment.timed:
            kinds += ["time_per_image"]
        found |= {f"{kind}_{name}": (kind, [name]) for kind in kinds}
    found |= {f"time_per_image_{name}": ("time_per_image", [name]) for name in suite.synthetic.nets}
    layers = [*suite.synthetic.convolutions, *suite.synthetic.linear]
    if layers:
        found |= {kind: (kind, layers) for kind in ("speedup_by_sparsity", "roofline")}
    return found


def table_names(suite: Suite) -> list[str]:
    """File names of every table, each always written."""
    return [f"{stem}.{extension}" for stem in tables(suite) for extension in TABLE_FORMATS]


def figure_names(suite: Suite) -> list[str]:
    """File names of every figure, each always written: without data the figure says that there are none and why."""
    return [f"{stem}.{extension}" for stem in figures(suite) for extension in FIGURE_FORMATS]
