"""Figures of deep nets and language models: widths, layers, what is left of them."""

from dataclasses import replace

import factory
import numpy as np
import pytest
from factory import HERE

from vdbench import netfile, outputs, plots, records
from vdbench.config import parse_suite


def view(suite, results, name="fc", made=None):
    folder, everything = results
    return plots.view(suite, name, {HERE: everything if made is None else made}, {HERE: folder})


def vgg_suite(**keys):
    methods = {name: factory.METHODS[name] for name in ("dense", "vd_finetune", "magnitude")}
    base = {"dataset": "cifar10_jpeg", "methods": methods, "timed": [], "seeds": [0, 1]} | keys
    models = {"quarter": "vgglike_k025", "half": "vgglike_k050"}
    return factory.suite(**{name: factory.experiment(model, **base) for name, model in models.items()})


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A suite, its records, and the files that one of its nets leaves."""
    folder, suite = tmp_path_factory.mktemp("vgg"), vgg_suite()
    made = factory.all_records(suite)
    factory.write_results(folder, suite, [r for r in made if r.run == ("quarter", "vd_finetune", 0)])
    return suite, (folder, made)


def test_widths_are_drawn_over_what_is_published_and_the_lossy_data_set_is_named(vgg):
    suite, results = vgg
    views = [view(suite, results, name) for name in suite.experiments]
    (part,) = plots.FIGURES["error_and_compression_by_width"](*views).subfigs
    error, compression = part.axes
    assert part.get_suptitle().startswith("CIFAR-10 as JPEG")
    named = [text.get_text() for text in part.legends[0].get_texts()]
    assert {"Original, published for CIFAR-10", "Sparse VD, published for CIFAR-10"} <= set(named)
    drawn = {tuple(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in compression.get_lines()}
    assert ((0.25, 5.7), (0.5, 13.8), (1.0, 48.0), (1.5, 65.0)) in drawn
    nets = [r for r in results[1] if r.run[:2] == ("half", "vd_finetune") and r.stage == "prune"]
    mean = np.mean([net.size.compression_ratio for net in nets])
    assert any(line[-1] == (0.5, pytest.approx(mean)) for line in drawn)
    assert len(error.containers) == 3 and len(compression.containers) == 2  # the dense net is not compressed


def test_thresholds_are_told_where_widths_have_different_ones():
    for other, told in ((3.0, ""), (2.0, "removed at log α ≥ 3 (k = 0.25), ≥ 2 (k = 0.5)")):
        content = vgg_suite().model_dump(exclude_none=True, exclude={"timing", "synthetic"})
        content["experiments"]["half"]["threshold"] = other
        suite = parse_suite(content, "a test")
        made = factory.all_records(suite)
        views = [plots.view(suite, name, {HERE: made}, {}) for name in suite.experiments]
        (part,) = plots.FIGURES["error_and_compression_by_width"](*views).subfigs
        assert part.axes[1].get_title() == told


def test_experiments_of_one_width_are_points_that_no_line_joins():
    content = vgg_suite().model_dump(exclude_none=True, exclude={"timing", "synthetic"})
    content["experiments"]["half"]["threshold"] = 2.0
    content["experiments"]["again"] = content["experiments"]["quarter"]
    suite = parse_suite(content, "a test")
    made = factory.all_records(suite)
    views = [plots.view(suite, name, {HERE: made}, {}) for name in suite.experiments]
    (part,) = plots.FIGURES["error_and_compression_by_width"](*views).subfigs
    assert part.axes[1].get_title() == "removed at log α ≥ 3 (k = 0.25), ≥ 2 (k = 0.5)"
    for axis in part.axes:
        assert {container[0].get_linestyle() for container in axis.containers} == {"None"}


def test_a_suite_of_one_width_has_no_figure_of_widths():
    both = vgg_suite()
    one = both.model_copy(update={"experiments": {"quarter": both.experiments["quarter"]}})
    name = "error_and_compression_by_width"
    assert name in outputs.figures(both) and name not in outputs.figures(one)


@pytest.mark.parametrize(("thresholds", "told"), [((2.0, 3.0), ["log α ≥ 2)", "log α ≥ 3)"]), ((3.0, 3.0), ["", ""])])
def test_panels_say_their_thresholds_where_they_differ(thresholds, told):
    content = vgg_suite().model_dump(exclude_none=True, exclude={"timing", "synthetic"})
    for name, threshold in zip(("quarter", "half"), thresholds, strict=True):
        content["experiments"][name]["threshold"] = threshold
    suite = parse_suite(content, "a test")
    made = factory.all_records(suite)
    figure = plots.FIGURES["error_vs_compression"](
        *(plots.view(suite, name, {HERE: made}, {}) for name in suite.experiments)
    )
    titles = [axis.get_title() for axis in figure.axes]
    assert all((text in title) and ("log α" in title) == bool(text) for title, text in zip(titles, told, strict=True))


def test_a_panel_of_dense_nets_alone_has_a_sensible_axis(tmp_path):
    suite = factory.suite(fc=factory.experiment())
    dense = [record for record in factory.all_records(suite) if record.method == "dense"]
    figure = plots.FIGURES["error_vs_compression"](plots.view(suite, "fc", {HERE: dense}, {}))
    left, right = figure.axes[0].get_xlim()
    assert left == 0.75 and right >= 10


def test_nothing_published_is_drawn_beside_validation_errors(vgg):
    suite, (folder, _) = vgg_suite(validation_size=100), vgg[1]
    shown = view(suite, (folder, factory.all_records(suite)), "quarter")
    (part,) = plots.FIGURES["error_and_compression_by_width"](shown).subfigs
    assert part.axes[0].get_ylabel() == "Validation error (%)"
    assert not any("published" in text.get_text() for text in part.legends[0].get_texts())


def test_layers_left_counts_weights_and_whole_neurons(vgg):
    suite, (folder, made) = vgg
    upper, lower = plots.FIGURES["layers_left"](view(suite, (folder, made), "quarter")).axes
    nets = [r for r in made if r.run[:2] == ("quarter", "vd_finetune") and r.stage == "prune"]
    expected = np.mean([[100 * (1 - layer.sparsity) for layer in net.layers] for net in nets], axis=0)
    np.testing.assert_allclose([bar.get_height() for bar in upper.containers[1]], expected)
    assert [text.get_text() for text in lower.get_xticklabels()] == [layer.name for layer in nets[0].layers]
    weights = netfile.read_arrays(records.run_folder(folder, *nets[0].run) / "pruned.npz")[0]
    for layer, bar in zip(nets[0].layers, lower.containers[0], strict=True):
        weight = weights[f"{layer.name}.weight"]
        assert bar.get_height() == len(weight) / max(1, sum(bool(neuron.any()) for neuron in weight))


def test_layers_left_says_of_which_nets_it_counts_neurons(vgg):
    suite, (folder, made) = vgg
    shown = view(suite, (folder, made), "quarter")
    _, lower = plots.FIGURES["layers_left"](shown).axes
    assert lower.get_title().endswith("are here: Sparse VD, fine-tuned 1 of 2, magnitude pruning 0 of 2")
    assert len(plots.FIGURES["layers_left"](replace(shown, folder=None)).axes) == 1  # without nets no neurons


def test_layers_left_of_a_language_model_are_words_units_and_gates():
    methods = {"dense": {"epochs": 1}, "vd_warmup": {"epochs": 1}}
    net = {"dataset": "topics", "model": "rnnlm_lstm_onehot", "seeds": [0], "match": "vd_warmup", "methods": methods}
    suite = parse_suite({"suite": "words", "experiments": {"lstm": net}}, "a test")
    layers = [
        records.Layer(name=name, shape=shape, total=10, nonzero=5, sparsity=0.5)
        for name, shape in factory.SHAPES["rnnlm_lstm_onehot"].items()
    ]
    kept = {"words_read": 2500, "words_predicted": 10_000, "units_l0": 128, "gates_l0": 256}
    made = factory.record(suite, "lstm", "vd_warmup", 0, stage="train").model_copy(
        update={"stage": "prune", "layers": layers, "kept": kept}
    )
    _, lower = plots.FIGURES["layers_left"](plots.view(suite, "lstm", {HERE: [made]}, {})).axes
    assert [text.get_text() for text in lower.get_xticklabels()] == [name.replace("_", " ") for name in kept]
    assert [bar.get_height() for bar in lower.containers[0]] == [25, 100, 50, 25]


def test_every_layer_of_a_deep_net_is_shown(vgg):
    shown = view(*vgg, "quarter")
    layers = [layer.name for layer in shown.of("prune")[0].layers]
    panels = [axis for axis in plots.FIGURES["log_alpha"](shown).axes if axis.get_visible()]
    assert [axis.get_title() for axis in panels] == layers
    handles = plots.FIGURES["training_curves"](shown).subfigs[1].legends[0].legend_handles
    assert [handle.get_label() for handle in handles] == layers
    assert len({handle.get_color() for handle in handles}) == len(layers)
