"""Tables of speed: against what, of which nets and layers, and what was not timed."""

import factory
import pytest
from factory import HERE
from table_files import numbers, row

from vdbench import outputs, tables


def test_speedup_names_backends_that_were_not_timed(suite, tmp_path):
    made = factory.record(suite, "fc", "vd_warmup", 0, "time")
    kept = [timing for timing in made.timing if timing.backend in ("torch_dense", "scipy_csr", "torch_csr")]
    made = made.model_copy(update={"timing": kept, "missing_backends": {"onnxruntime": "not installed"}})
    tables.write_tables(suite, {HERE: [made]}, {HERE: []}, tmp_path)
    frame = numbers(tmp_path, "speedup")
    assert set(frame.backend) == {"torch_dense", "scipy_csr", "torch_csr"}
    one = row(frame, backend="scipy_csr", batch_size=64, threads=1)
    assert one.us_per_example == pytest.approx(1e6 * one.median_s / 64)
    assert one.speedup_low <= one.speedup <= one.speedup_high and one.speedup == pytest.approx(3, rel=0.1)
    assert (one.best_dense, one.over_torch) == ("torch_dense", one.speedup)
    assert "onnxruntime, dense not timed: not installed" in (tmp_path / "speedup.md").read_text()


def test_speedup_names_the_nets_of_a_grid_that_an_engine_left_out(tmp_path):
    suite = factory.untrained_suite(batch_sizes=[1])
    no_linear, no_dead = "the net has no Linear", "the net has no dead units"
    made = []
    for density in (1, 0.3, 0.1, 0.02):
        why = {"scipy_csr": no_linear, "torch_csr": no_linear} | ({"mnn_compacted": no_dead} if density > 0.2 else {})
        record = factory.untrained_record(suite, "conv", f"density{density:g}")
        made.append(record.model_copy(update={"missing_backends": why}))
    tables.write_tables(suite, {HERE: made}, {HERE: []}, tmp_path)
    text = (tmp_path / "speedup.md").read_text()
    assert text.count("not timed") == 2
    assert f"conv: SciPy CSR; torch CSR not timed: {no_linear}" in text
    assert f"conv, 100 % of the weights; 30 % of the weights: MNN, compacted not timed: {no_dead}" in text


def test_speedup_is_against_the_best_dense_engine_and_says_which(suite, tmp_path):
    tables.write_tables(suite, {HERE: [factory.record(suite, "fc", "vd_warmup", 0, "time")]}, {HERE: []}, tmp_path)
    one = row(numbers(tmp_path, "speedup"), backend="vdbench", batch_size=64, threads=1)
    assert one.best_dense == "onnxruntime"
    assert one.speedup == pytest.approx(30 / 1.8, rel=0.1) and one.over_torch == pytest.approx(30, rel=0.1)
    header = (tmp_path / "speedup.md").read_text().partition("|:-")[0]
    assert "Over best dense" in header and "Over dense torch" in header
    assert "Of limit" not in header  # the record does not know the machine


def test_untrained_nets_and_layers_have_their_tables(tmp_path):
    suite = factory.untrained_suite(backends=["vdbench", "torch_dense", "onnxruntime", "scipy_csr"])
    made = factory.all_records(suite)
    tables.write_tables(suite, {HERE: made}, {HERE: []}, tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.csv")) == ["speedup"]
    frame = numbers(tmp_path, "speedup")
    assert len(frame) == sum(len(record.timing) for record in made)
    one = row(frame, experiment="line", method="density0.1", backend="vdbench", batch_size=64, threads=2)
    assert one.density == pytest.approx(0.1) and one.of_limit == pytest.approx(one.gflops / 460)
    text = (tmp_path / "speedup.md").read_text()
    for title in ("LeNet-300-100, random masks", "3x3 convolution, 64 channels, 16x16", "linear layer, 784 to 300"):
        assert f"## {title}" in text
    assert "(SciPy CSR)" in text and "(onnxruntime, dense)" in text and "Of limit" in text
    assert "Some CPU 9000 reaches at most" in text and "230 from registers, 190 from L1" in text
    printed = tables.render_text(suite, {HERE: made}, {HERE: []})
    assert max(map(len, printed.splitlines())) <= 110
    assert "linear layer, 784 to 300 (line)" in printed


def test_untrained_nets_without_timings_say_so(tmp_path):
    suite = factory.untrained_suite()
    assert "(no timings yet)" in tables.render_text(suite, {HERE: []}, {HERE: []})
    tables.write_tables(suite, {HERE: []}, {HERE: []}, tmp_path)
    assert "- conv: no timings" in (tmp_path / "speedup.md").read_text()


def test_an_untimed_suite_has_no_speedup_table():
    suite = factory.suite(fc=factory.experiment(timed=[]))
    names = outputs.table_names(suite) + outputs.figure_names(suite)
    assert not [name for name in names if "speedup" in name or "time_per_image" in name]


def test_terminal_shows_the_speeds_of_every_source(suite):
    made = factory.all_records(suite)
    lines = tables.render_text(suite, {"recorded": made, HERE: made}, {}).splitlines()
    title = outputs.timed_title(suite, "fc")
    places = [lines.index(f"{title}, {source}, 1 thread, Some CPU 9000") for source in ("recorded", HERE)]
    assert all("vdbench, µs" in lines[place + 1] for place in places)
