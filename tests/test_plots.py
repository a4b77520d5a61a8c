"""Figures: what they show is what the records say, every declared file is written, and always with the same bytes."""

import re
import subprocess
import sys
from pathlib import Path

import factory
import numpy as np
import pytest
from factory import HERE
from PIL import Image

from vdbench import netfile, outputs, plots, published, records, stats
from vdbench.config import parse_suite
from vdbench.plots import style


@pytest.fixture(scope="module")
def suite():
    methods = {name: factory.METHODS[name] for name in ("dense", "vd_warmup", "random")}
    short = {"seeds": [0, 1], "methods": methods, "match": "vd_warmup"}
    return factory.suite(fc=factory.experiment(**short), conv=factory.experiment("lenet5", **short))


@pytest.fixture(scope="module")
def results(suite, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    made = factory.all_records(suite)
    factory.write_results(folder, suite, made)
    return folder, made


def view(suite, results, name="fc", made=None):
    folder, everything = results
    return plots.view(suite, name, {HERE: everything if made is None else made}, {HERE: folder})


@pytest.mark.parametrize("kind", ["error_vs_compression", "first_layer"])
def test_the_same_records_give_the_same_bytes(suite, results, tmp_path, kind):
    for place in ("a", "b"):
        with style.context():
            style.save(plots.FIGURES[kind](view(suite, results, "conv")), tmp_path / place, kind)
    for name in (f"{kind}.png", f"{kind}.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_pictures_keep_the_colours_of_methods(tmp_path):
    figure = style.Figure()
    axis = figure.subplots()
    for k, colour in enumerate(style.COLOURS.values()):
        axis.plot([k], [k], "o", color=colour, ms=6)
    axis.imshow(np.random.default_rng(0).random((9, 9)), cmap="viridis")
    with style.context():
        picture = Image.open(style.save(figure, tmp_path, "markers")[0]).convert("RGB")
    there = np.unique(np.asarray(picture).reshape(-1, 3), axis=0).astype(int)
    for colour in style.COLOURS.values():
        wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        assert np.abs(there - wanted).max(1).min() <= 8


def test_figures_with_data_are_drawn_where_others_have_none(suite, results, tmp_path, caplog):
    folder, made = results
    timed = [record for record in made if record.stage == "time" and record.experiment == "fc"]
    written = plots.write_plots(suite, {HERE: timed}, {HERE: folder}, tmp_path)
    assert [path.name for path in written] == outputs.figure_names(suite)
    empty = {line.split(":")[0] for line in caplog.messages}
    assert empty == set(outputs.figures(suite)) - {"time_per_image_fc"}


def test_without_records_every_figure_says_so(suite, tmp_path, caplog):
    plots.write_plots(suite, {HERE: []}, {HERE: tmp_path}, tmp_path / "figures")
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(outputs.figure_names(suite))
    assert len(caplog.records) == len(outputs.figures(suite))
    assert "time_per_image_fc: no data: no net of fc is timed yet" in caplog.text


def test_figures_without_data_may_be_left_out_and_old_ones_go(suite, tmp_path):
    (tmp_path / "time_per_image_fc.svg").write_text("old")
    assert plots.write_plots(suite, {HERE: []}, {HERE: tmp_path}, tmp_path, partial=True) == []
    assert list(tmp_path.iterdir()) == []


def test_an_empty_figure_states_its_reason():
    assert "no data: nobody ran it" in [text.get_text() for text in style.empty("log_alpha_fc", "nobody ran it").texts]


def test_every_net_curve_and_published_point_is_drawn(suite, results):
    figure = plots.FIGURES["error_vs_compression"](view(suite, results))
    lines = figure.axes[0].get_lines()
    points = {(float(x), float(y)) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    nets = [record for record in results[1] if record.stage == "prune" and record.experiment == "fc"]
    assert {(net.size.compression_ratio, net.metrics["error"]) for net in nets} <= points
    assert {(p.compression_ratio, p.error) for net in nets for p in net.curve} <= points
    assert {(68.0, 1.92), (56.0, 1.99), (32.9, 1.6)} <= points


def test_where_the_dense_net_is_another_experiments_its_error_is_drawn_all_the_same(suite, results):
    others = [record for record in results[1] if record.method != "dense"]
    figure = plots.FIGURES["error_vs_compression"](view(suite, results, made=others))
    hollow = [line for line in figure.axes[0].get_lines() if line.get_markerfacecolor() == "white"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in hollow] == [([1], [1.64])]
    assert "dense, of another experiment" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_dense_nets_of_the_same_model_are_in_every_panel_and_have_none_of_their_own():
    sparse = factory.experiment(seeds=[0], methods={"dense": {"epochs": 4}, "vd_warmup": {"epochs": 4}}, timed=[])
    dense = sparse | {"methods": {"dense": {"epochs": 9}}, "match": "vd_warmup"}
    suite = factory.suite(short=sparse | {"match": "vd_warmup"}, long=dense, other=dense | {"dataset": "digits"})
    errors = {"short": 1.7, "long": 1.2, "other": 5.0}
    made = [
        factory.record(suite, name, "dense", 0, metrics={"error": error}, control=None)
        for name, error in errors.items()
    ]
    made.append(factory.record(suite, "short", "vd_warmup", 0, control=records.Control(error=1.7, weights_sha256="0")))
    figure = plots.FIGURES["error_vs_compression"](*[plots.view(suite, n, {HERE: made}, {}) for n in errors])
    first, last = (axis for axis in figure.axes if axis.get_visible())
    assert (first.get_title(), last.get_title()) == (
        f"LeNet-300-100 on MNIST\nshort ({HERE})",
        f"LeNet-300-100 on digits ({HERE})",
    )
    hollow = [line for line in first.get_lines() if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in hollow] == [[1.2]]


def test_titles_name_the_experiment_where_others_have_the_same_net():
    suite = factory.suite(a=factory.experiment(), b=factory.experiment(), c=factory.experiment("lenet5"))
    titles = [plots.view(suite, name, {HERE: []}, {}).title for name in "abc"]
    assert titles == ["LeNet-300-100 on MNIST\na", "LeNet-300-100 on MNIST\nb", "LeNet-5-Caffe on MNIST"]


def test_nets_above_the_axis_are_named_at_its_edge(suite, results):
    figure = plots.FIGURES["error_vs_compression"](view(suite, results))
    axis = figure.axes[0]
    errors = [r.metrics["error"] for r in results[1] if r.run[:2] == ("fc", "random") and r.stage == "prune"]
    assert min(errors) > axis.get_ylim()[1]
    ends = dict.fromkeys(f"{error:.1f}" for error in (min(errors), max(errors)))
    expected = f"random pruning, 2 of 2 seeds: {' to '.join(ends)} % ↑"
    assert expected in [text.get_text() for text in axis.texts]


def test_what_lies_above_the_axis_has_a_line_a_method_and_equal_ends_are_one_number(suite, results):
    errors = {"random": 40.0, "vd_warmup": 30.0}
    made = [
        r.model_copy(update={"metrics": r.metrics | {"error": errors.get(r.method, r.metrics["error"])}})
        for r in results[1]
    ]
    figure = plots.FIGURES["error_vs_compression"](view(suite, results, made=made))
    axis = figure.axes[0]
    named = [text for text in axis.texts if "seeds" in text.get_text()]
    assert [text.get_text() for text in named] == [
        "Sparse VD, warm-up, 2 of 2 seeds: 30.0 % ↑",
        "random pruning, 2 of 2 seeds: 40.0 % ↑",
    ]
    figure.draw_without_rendering()
    upper, lower = (text.get_window_extent() for text in named)
    assert lower.y1 <= upper.y0 + 1  # pixels


def test_thresholds_of_a_curve_are_marked(suite, results):
    lines = plots.FIGURES["error_vs_compression"](view(suite, results)).axes[0].get_lines()
    assert {line.get_marker() for line in lines if len(line.get_xdata()) > 1} == {"."}


@pytest.mark.parametrize(
    ("limits", "ticks"), [((0.6, 70), [1, 2, 5, 10, 20, 50]), ((1.6, 9), [2, 4, 6, 8]), ((0.7, 1.1), None)]
)
def test_a_logarithmic_axis_has_ticks_to_read_it_by(limits, ticks):
    axis = style.Figure().subplots()
    style.plain_log_axis(axis, "y")
    axis.set_ylim(limits)
    shown = [tick for tick in axis.get_yticks() if limits[0] <= tick <= limits[1]]
    assert len(shown) >= 4
    assert ticks is None or shown == pytest.approx(ticks)


@pytest.mark.parametrize("changes", [{"dataset": "digits"}, {"validation_size": 10_000}])
def test_published_points_are_not_drawn_where_they_do_not_compare(changes):
    suite = factory.suite(fc=factory.experiment(**changes))
    made = factory.all_records(suite)
    figure = plots.FIGURES["error_vs_compression"](plots.view(suite, "fc", {HERE: made}, {}))
    assert 68.0 not in [x for line in figure.axes[0].get_lines() for x in line.get_xdata()]
    assert ("Validation" if "validation_size" in changes else "Test") in figure.axes[0].get_ylabel()


def test_diverged_runs_are_not_drawn(suite, results):
    bad = [r.model_copy(update={"status": "diverged"}) for r in results[1]]
    for kind in plots.FIGURES:
        with pytest.raises(style.NoData):
            plots.FIGURES[kind](view(suite, results, made=bad))
    with pytest.raises(style.NoData):
        plots.TIMING_FIGURES["time_per_image"](plots.timed(suite, "fc", {HERE: bad}))


def test_training_curves_draw_each_seed_and_the_mean(suite, results):
    figure = plots.FIGURES["training_curves"](view(suite, results))
    error, kl, *sparsity = figure.axes
    assert [len(axis.get_lines()) for axis in (error, kl)] == [3 * 3, 3]  # two seeds and their mean, for each method
    one, other, mean = (line.get_ydata() for line in kl.get_lines())
    np.testing.assert_allclose(mean, (np.asarray(one) + np.asarray(other)) / 2)
    assert [axis.get_title() for axis in sparsity] == ["Sparse VD, warm-up", "random pruning"]
    assert all(len(axis.get_lines()) == 3 * 3 for axis in sparsity)  # for each of three layers


def test_log_alpha_shares_sum_to_one_and_mark_the_threshold(suite, results):
    figure = plots.FIGURES["log_alpha"](view(suite, results, "conv"))
    assert [axis.get_title() for axis in figure.axes] == ["conv1", "conv2", "fc1", "fc2"]
    for axis in figure.axes:
        assert axis.patches[0].get_data().values.sum() == pytest.approx(100)
        assert list(axis.get_lines()[0].get_xdata()) == [3.0, 3.0]


def test_input_map_counts_the_weights_of_each_pixel(suite, results):
    figure = plots.FIGURES["first_layer"](view(suite, results))
    record = next(r for r in results[1] if r.run == ("fc", "vd_warmup", 0) and r.stage == "prune")
    expected = np.count_nonzero(factory.pruned_arrays(record)["fc1.weight"], axis=0).reshape(28, 28)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array().filled(0), expected)
    assert f"{np.count_nonzero(expected)} of 784 inputs used" in figure.axes[0].get_title()


def test_one_pixel_with_many_weights_leaves_the_others_their_colours(suite, results, tmp_path):
    factory.write_results(tmp_path, suite, results[1])
    record = next(r for r in results[1] if r.run == ("fc", "vd_warmup", 0) and r.stage == "prune")
    arrays = factory.pruned_arrays(record)
    arrays["fc1.weight"][:, 400] = 1.0
    weights = {name: arrays.pop(name) for name in list(arrays) if name.endswith(".weight")}
    netfile.write_arrays(records.run_folder(tmp_path, *record.run) / "pruned.npz", weights, arrays, {})
    first, last = plots.FIGURES["first_layer"](view(suite, (tmp_path, results[1]))).axes[:2]
    assert first.images[0].get_array().max() == 300
    assert first.images[0].norm.vmax == last.images[0].norm.vmax < 150
    assert last.images[0].colorbar.extend == "max"


def test_kernels_are_tiled_and_removed_weights_masked(suite, results):
    figure = plots.FIGURES["first_layer"](view(suite, results, "conv"))
    record = next(r for r in results[1] if r.run == ("conv", "vd_warmup", 0) and r.stage == "prune")
    kernels = factory.pruned_arrays(record)["conv1.weight"][:, 0]
    shown = figure.axes[1].images[0].get_array()
    assert [axis.get_title().splitlines()[0] for axis in figure.axes[:3]] == [
        "dense",
        "Sparse VD, warm-up",
        "random pruning",
    ]
    np.testing.assert_array_equal(shown[6:11, 12:17].filled(0), kernels[7])  # second row, third column
    assert np.ma.count_masked(shown) == np.count_nonzero(kernels == 0) + np.count_nonzero(np.isnan(shown.data))


def test_time_per_image_has_a_panel_a_setting_and_engines_by_time(suite, results):
    net = plots.timed(suite, "fc", {HERE: results[1]})
    figure = plots.TIMING_FIGURES["time_per_image"](net)
    assert [axis.get_title() for axis in figure.axes] == [
        f"Sparse VD, warm-up, {threads}, batch {batch}"
        for threads in ("1 thread", "2 threads")
        for batch in (1, 64, 256)
    ]
    names = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert (names[0], names[-1]) == ("vdbench", "torch CSR") and sorted(names) == sorted(outputs.BACKENDS.values())
    places = [float(line.get_xdata()[0]) for line in figure.axes[1].get_lines()]
    here = [i for i in stats.speedups(net.records[0]) if (i.timing.threads, i.timing.batch_size) == (1, 64)]
    assert places == sorted(1e6 * item.seconds / 64 for item in here)
    labels = [text.get_text() for text in figure.axes[1].texts]
    assert len(labels) == len(outputs.BACKENDS) and all(re.fullmatch(r"[\d.]+ µs, [\d.]+×", label) for label in labels)


def test_the_last_source_with_pruned_nets_is_drawn(suite, results):
    _, made = results
    only_train = [record for record in made if record.stage == "train"]
    folders = {"recorded": Path("r"), HERE: Path("h")}
    assert plots.view(suite, "fc", {"recorded": made, HERE: only_train}, folders).source == "recorded"
    assert plots.view(suite, "fc", {"recorded": made, HERE: made}, folders).folder == Path("h")


def test_output_names_need_neither_pandas_nor_matplotlib():
    code = "import sys, vdbench.outputs; print({'pandas', 'matplotlib', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_our_curves_are_drawn_over_published_ones(tmp_path):
    methods = {"dense": {"epochs": 2}, "vd_warmup": {"epochs": 3}}
    net = {"dataset": "ptb", "model": "rnnlm_lstm_onehot", "seeds": [0], "match": "vd_warmup", "methods": methods}
    suite = parse_suite({"suite": "words", "experiments": {"lstm": net}}, "a test")
    assert "published_curves_lstm" in outputs.figures(suite)
    made = []
    for method, perplexities in (("dense", [300, 200]), ("vd_warmup", [500, 300, 150])):
        run = records.run_folder(tmp_path, "lstm", method, 0)
        run.mkdir(parents=True)
        rows = [f"{k},{perplexity},{10 * k}" for k, perplexity in enumerate(perplexities, 1)]
        (run / "history.csv").write_text("\n".join(["epoch,perplexity,compression_ratio", *rows]))
        made.append(
            factory.record(suite, "lstm", method, 0, stage="train").model_copy(update={"history": "history.csv"})
        )
    figure = plots.FIGURES["published_curves"](plots.view(suite, "lstm", {HERE: made}, {HERE: tmp_path}))
    perplexity, compression = figure.axes
    drawn = {tuple(line.get_ydata()) for line in perplexity.lines}
    theirs = published.curves(suite.experiments["lstm"])
    assert {method: len(rows) for method, rows in theirs.items()} == {"Original": 150, "Sparse VD": 150}
    assert {tuple(row.test_perplexity for row in rows) for rows in theirs.values()} < drawn
    assert {(300, 200), (500, 300, 150)} < drawn
    assert (10, 20, 30) in {tuple(line.get_ydata()) for line in compression.lines}
    assert len(compression.lines) == 3  # theirs, our seed and the mean of our seeds: dense nets have none
