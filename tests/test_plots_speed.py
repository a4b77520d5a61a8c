"""Figures of timed layers and nets that are not trained."""

from dataclasses import replace

import factory
import numpy as np
import pytest
from factory import HERE

from vdbench import outputs, plots, stats
from vdbench.plots import style
from vdbench.plots.layers import crossover


@pytest.fixture(scope="module")
def layers():
    untrained = factory.untrained_suite()
    made = factory.all_records(untrained)
    return [plots.timed(untrained, name, {HERE: made}) for name in ("conv", "line")]


def test_speedup_by_sparsity_has_a_panel_a_layer_and_marks_where_it_breaks_even(layers):
    figure = plots.TIMING_FIGURES["speedup_by_sparsity"](*layers)
    assert [axis.get_title() for axis in figure.axes] == [layer.title for layer in layers]
    for axis, batches in zip(figure.axes, (3, 4), strict=True):
        lines = axis.get_lines()
        curves = [line for line in lines if line.get_marker() == "o"]
        assert len(curves) == batches == sum(line.get_marker() == "|" for line in lines)
        np.testing.assert_allclose(curves[0].get_xdata(), [1, 0.3, 0.1, 0.02])
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "70", "90", "98"]


def test_crossover_lies_between_the_points_about_it():
    assert crossover([1, 0.1, 0.01], [0.1, 10, 100]) == pytest.approx(10**-0.5)
    assert crossover([1, 0.1], [2.0, 20.0]) is None  # always pays
    assert crossover([1, 0.1], [0.2, 0.5]) is None  # never
    assert crossover([1, 0.1], [np.nan, 0.5]) is None


def test_roofline_draws_ceilings_and_every_point_of_vdbench(layers):
    axis = plots.TIMING_FIGURES["roofline"](*layers).axes[0]
    texts = [text.get_text() for text in axis.texts]
    assert "registers: 230" in texts and "all from L3: 108 GB/s" in texts
    points = [line for line in axis.get_lines() if line.get_marker() in tuple("osD^v")]
    assert len(points) == 4 * 3 + 4 * 4
    record = layers[1].records[0]
    setting = ("vdbench", 1, 64)
    (item,) = (
        i for i in stats.speedups(record) if (i.timing.backend, i.timing.threads, i.timing.batch_size) == setting
    )
    expected = (2 * 235_200 * 64 / (8 * 235_200 + 4 * 1084 * 64), item.gflops)
    assert any((p.get_xdata()[0], p.get_ydata()[0]) == pytest.approx(expected) for p in points)


def test_ceilings_that_are_close_share_a_label(layers):
    near = {"fma": 256.0, "load_l1": 247.0, "load_l2": 120.0}
    changed = [replace(x, records=[r.model_copy(update={"limits": near}) for r in x.records]) for x in layers]
    axis = plots.TIMING_FIGURES["roofline"](*changed).axes[0]
    assert [text.get_text() for text in axis.texts] == ["L2: 120", "registers: 256\nL1: 247"]


def test_without_the_limits_of_the_machine_there_is_no_roofline(layers):
    blind = [replace(x, records=[r.model_copy(update={"limits": {}}) for r in x.records]) for x in layers]
    with pytest.raises(style.NoData, match="limits"):
        plots.TIMING_FIGURES["roofline"](*blind)


def test_figures_of_an_untrained_suite_are_all_written(tmp_path, caplog):
    untrained = factory.untrained_suite(backends=["vdbench", "torch_dense", "scipy_csr"])
    written = plots.write_plots(untrained, {HERE: factory.all_records(untrained)}, {HERE: tmp_path}, tmp_path)
    assert [path.name for path in written] == outputs.figure_names(untrained)
    assert set(outputs.figures(untrained)) == {"time_per_image_net", "speedup_by_sparsity", "roofline"}
    assert caplog.records == []
