"""What table 1 says of every experiment in a line or two: its recipes, and what it does not compare with."""

from collections.abc import Iterator, Sequence

from vdbench import outputs, published
from vdbench.config import VARIATIONAL_METHODS, Experiment, Suite
from vdbench.tables.results import MethodResult


def remarks_on(name: str, suite: Suite, results: Sequence[MethodResult]) -> Iterator[str]:
    experiment = suite.experiments[name]
    yield f"{name}: {_recipes(experiment)}."
    if experiment.validation_size:
        yield (
            f"{name}: {outputs.error_name(experiment)} on {_held_out(experiment)}, not comparable with published "
            "results on test sets, so none is shown beside it."
        )
    elif not published.rows("published", experiment):
        yield (f"{name}: nothing is published for {outputs.net(experiment)}, so nothing here compares with the paper.")
    if experiment.model == "rnnlm_lstm_onehot":
        yield f"{name}: theoretical speedup counts multiplying by one-hot words, which a look-up saves."
    for source in dict.fromkeys(result.source for result in results):
        yield from _better_dense(name, suite, [result for result in results if result.source == source])


def _recipes(experiment: Experiment) -> str:
    """Such as: removed at log α ≥ 3; epochs: dense 40, fine-tuned 75 with KL weight 0.1, magnitude 75."""
    lengths = []
    for method in experiment.present_methods():
        recipe = getattr(experiment.methods, method)
        short = outputs.METHODS[method].removeprefix("Sparse VD, ").removesuffix(" pruning")
        weight = f" with KL weight {recipe.final_kl_weight or 1:g}" if method in VARIATIONAL_METHODS else ""
        lengths.append(f"{short} {recipe.epochs}{weight}")
    removed = any(method in VARIATIONAL_METHODS for method in experiment.present_methods())
    threshold = f"removed at log α ≥ {experiment.threshold:g}; " if removed else ""
    return f"{threshold}epochs: {', '.join(lengths)}"


def _held_out(experiment: Experiment) -> str:
    if outputs.measure(experiment) == "perplexity":
        return f"{experiment.validation_size:,} words of a validation text"
    return f"{experiment.validation_size:,} held-out training images"


def _better_dense(name: str, suite: Suite, results: Sequence[MethodResult]) -> Iterator[str]:
    """Of one source: which experiment has a better dense net of the same model than this one's are compared with."""
    experiment, means = suite.experiments[name], {}
    for result in results:  # the dense one of every experiment is its first
        dense = result.error if result.method == "dense" else result.control
        if dense and outputs.comparable(result.experiment) == outputs.comparable(experiment):
            means.setdefault(result.name, (dense.mean, result))
    best, found = min(means.values(), key=lambda pair: pair[0], default=(0.0, None))
    if name in means and found and best < means[name][0]:
        unit, epochs = outputs.error_unit(experiment), found.experiment.methods.dense.epochs
        yield (
            f"{name}: the best dense net of this model here has {best:.2f}{unit} ({found.name}, {epochs} epochs, "
            f"{found.source}), that of this experiment {means[name][0]:.2f}{unit}."
        )
