"""Tables: what is compared with what, what is left out, and that nothing is left out in silence."""

import csv
from pathlib import Path

import factory
import pandas as pd
import pytest
from factory import HERE
from table_files import numbers, row

from vdbench import current, outputs, published, records, tables
from vdbench.config import load_suite, parse_suite
from vdbench.tables import table1


def test_writes_exactly_the_declared_files(suite, tmp_path):
    written = tables.write_tables(suite, {HERE: factory.all_records(suite)}, {HERE: []}, tmp_path)
    assert sorted(path.name for path in written) == sorted(outputs.table_names(suite))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(outputs.table_names(suite))


def test_what_a_language_model_is_left_with(tmp_path):
    suite = parse_suite(
        {
            "suite": "words",
            "experiments": {
                "lstm": {
                    "dataset": "topics",
                    "model": "rnnlm_lstm_200",
                    "seeds": [0],
                    "methods": {"dense": {"epochs": 1}, "vd_warmup": {"epochs": 1}},
                }
            },
        },
        "a test",
    )
    assert "kept" in outputs.tables(suite)
    left = {"words_read": 1234, "words_predicted": 9, "dimensions": 7, "units_l0": 5, "units_l1": 6, "gates_l0": 17}
    words = {"read": records.Words(frequent_dropped=["of", "the"], rare_kept=["zebra"])}
    made = factory.record(suite, "lstm", "vd_warmup", 0, metrics={"perplexity": 99.0})
    made = made.model_copy(update={"kept": left, "words": words})
    tables.write_tables(suite, {HERE: [made]}, {HERE: []}, tmp_path)
    assert row(numbers(tmp_path, "kept"), method="vd_warmup")[list(left)].tolist() == list(left.values())
    shown = (tmp_path / "kept.md").read_text()
    assert all(text in shown for text in ("1,234", "5 – 6", "of the", "zebra", "Sparse VD, warm-up"))


def test_published_perplexity_is_no_percentage():
    experiment = load_suite(Path("configs/ptb_full.yaml")).experiments["lstm-onehot-ptb"]
    published = table1.side_by_side(experiment, [], []).Published.tolist()
    assert published == ["129.3 at 1×", "109.1 at 22.7×"]


def test_published_perplexity_is_called_so(tmp_path):
    suite = load_suite(Path("configs/ptb_full.yaml"))
    tables.write_tables(suite, {HERE: []}, {HERE: []}, tmp_path)
    assert set(numbers(tmp_path).error_kind) == {"test perplexity"}


def test_what_one_hot_words_do_to_the_theoretical_speedup_is_told(tmp_path):
    suite = load_suite(Path("configs/ptb_full.yaml"))
    tables.write_tables(suite, {HERE: []}, {HERE: []}, tmp_path)
    told = [line for line in (tmp_path / "table1.md").read_text().splitlines() if "multiplying by one-hot" in line]
    assert [line.split(":")[0] for line in told] == ["- lstm-onehot-ptb"]


def test_every_experiment_has_its_recipes_in_a_line(tmp_path):
    methods = factory.METHODS | {"vd_finetune": {"epochs": 4, "final_kl_weight": 0.1}}
    suite = factory.suite(
        fc=factory.experiment(threshold=2.0, methods=methods),
        plain=factory.experiment(methods={"dense": {"epochs": 9}}, timed=[]),
    )
    tables.write_tables(suite, {HERE: []}, {HERE: []}, tmp_path)
    text = (tmp_path / "table1.md").read_text()
    assert (
        "- fc: removed at log α ≥ 2; epochs: dense 4, fine-tuned 4 with KL weight 0.1, warm-up 4 with KL weight 1, "
        "magnitude 4, random 4.\n" in text
    )
    assert "- plain: epochs: dense 9.\n" in text


def test_a_better_dense_net_of_the_same_model_is_told(tmp_path):
    net = factory.experiment(seeds=[0])
    longer = net | {"methods": factory.METHODS | {"dense": {"epochs": 9}}}
    suite = factory.suite(
        fc=net, longer=longer, other=longer | {"dataset": "digits"}, split=longer | {"validation_size": 9}
    )
    errors = {"longer": 1.2, "other": 1.0, "split": 0.9}
    made = [factory.record(suite, name, "dense", 0, metrics={"error": error}) for name, error in errors.items()]
    made.append(factory.record(suite, "fc", "vd_warmup", 0))  # its dense net, 1.64, is known by name alone
    tables.write_tables(suite, {HERE: made}, {HERE: []}, tmp_path)
    told = [line for line in (tmp_path / "table1.md").read_text().splitlines() if "the best dense net" in line]
    assert told == [
        f"- fc: the best dense net of this model here has 1.20 % (longer, 9 epochs, {HERE}), that of this experiment "
        "1.64 %."
    ]


def test_same_records_give_the_same_bytes(suite, tmp_path):
    made = factory.all_records(suite)
    for folder in ("a", "b"):
        tables.write_tables(suite, {HERE: made}, {HERE: []}, tmp_path / folder)
    for name in outputs.table_names(suite):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_numbers_are_those_of_the_records(suite, tmp_path):
    made = [
        factory.record(suite, "fc", "vd_warmup", seed, metrics={"error": error}, compression=100)
        for seed, error in enumerate([1.80, 1.90, 2.00])
    ]
    tables.write_tables(suite, {HERE: made}, {HERE: []}, tmp_path)
    ours = row(numbers(tmp_path), source=HERE, method="vd_warmup")
    assert ours[["seeds", "n", "diverged", "missing"]].tolist() == [3, 3, 0, 0]
    assert ours[["error_mean", "error_std"]].tolist() == pytest.approx([1.9, 0.1])
    assert 1.8 <= ours.error_low < 1.9 < ours.error_high <= 2.0
    assert ours.error_minus_paper == pytest.approx(1.9 - 1.92)
    assert ours.compression_over_paper == pytest.approx(made[0].size.compression_ratio / 68)
    assert ours.error_minus_dense_mean == pytest.approx(1.9 - 1.64)
    assert "1.90 ± 0.10" in (tmp_path / "table1.md").read_text()


def test_difference_to_dense_is_paired_by_seed(suite, tmp_path):
    """Both methods vary between seeds by 1.0, the difference not at all."""
    made = [factory.record(suite, "fc", "dense", s, metrics={"error": 1.0 + s}) for s in range(3)]
    made += [factory.record(suite, "fc", "vd_warmup", s, metrics={"error": 1.25 + s}, control=None) for s in range(3)]
    tables.write_tables(suite, {HERE: made}, {HERE: []}, tmp_path)
    ours = row(numbers(tmp_path), source=HERE, method="vd_warmup")
    assert (ours.error_minus_dense_mean, ours.error_minus_dense_std) == (0.25, 0.0)


@pytest.mark.parametrize(("paired", "told"), [(1, "(1 pair)"), (2, "(2 pairs)")])
def test_fewer_pairs_than_runs_are_counted(suite, tmp_path, paired, told):
    made = [factory.record(suite, "fc", "dense", seed) for seed in range(paired)]
    made += [factory.record(suite, "fc", "vd_warmup", seed, control=None) for seed in range(3)]
    tables.write_tables(suite, {HERE: made}, {HERE: []}, tmp_path)
    assert told in (tmp_path / "table1.md").read_text()


def test_without_a_dense_net_nothing_is_compared_with_one(suite, tmp_path):
    tables.write_tables(
        suite, {HERE: [factory.record(suite, "fc", "vd_warmup", 0, control=None)]}, {HERE: []}, tmp_path
    )
    ours = row(numbers(tmp_path), source=HERE, method="vd_warmup")
    assert ours[["error_minus_dense_mean", "pairs_with_dense", "dense_error"]].isna().all()
    assert ours.n == 1


def test_stale_and_missing_records_are_left_out_with_a_line(suite, tmp_path):
    made = [factory.record(suite, "fc", "dense", seed) for seed in (0, 1)]
    old = {"versions": {"data": 1, "train": 0, "prune": 1}, "metrics": {"error": 77.0}}
    factory.write_results(tmp_path / "r", suite, [made[0], factory.record(suite, "fc", "dense", 1, **old)])
    found, notes = current.load(tmp_path / "r", suite)
    tables.write_tables(suite, {HERE: found}, {HERE: notes}, tmp_path)
    text = (tmp_path / "table1.md").read_text()
    assert row(numbers(tmp_path), source=HERE, method="dense")[["n", "missing"]].tolist() == [1, 2]
    assert "77" not in (tmp_path / "runs.csv").read_text() + text
    assert f"- {HERE}: stale: fc/dense/seed1 prune: made by versions" in text
    assert f"- {HERE}: missing: fc/dense/seed2\n" in text


def test_a_diverged_run_is_counted_and_said_and_in_no_mean(suite, tmp_path):
    bad = {"status": "diverged", "message": "loss is NaN in epoch 7", "metrics": {"error": 50.0}}
    made = [factory.record(suite, "fc", "vd_warmup", seed, metrics={"error": 1.9}) for seed in (0, 1)]
    made += [factory.record(suite, "fc", "vd_warmup", 2, stage, **bad) for stage in ("train", "prune")]
    tables.write_tables(suite, {HERE: made}, {HERE: []}, tmp_path)
    ours = row(numbers(tmp_path), source=HERE, method="vd_warmup")
    assert ours[["seeds", "n", "diverged", "missing", "error_mean"]].tolist() == [3, 2, 1, 0, 1.9]
    text = (tmp_path / "table1.md").read_text()
    assert "2 of 3: 1 diverged" in text
    assert "fc/vd_warmup/seed2: diverged (loss is NaN in epoch 7); not in any mean" in text
    assert row(numbers(tmp_path, "runs"), source=HERE, seed=2).status == "diverged"
    assert "2/3" in tables.render_text(suite, {HERE: made}, {HERE: []})


def test_another_data_set_is_never_compared_with_the_paper(tmp_path):
    suite = factory.suite(fc=factory.experiment(dataset="digits"))
    made = factory.all_records(suite)
    tables.write_tables(suite, {HERE: made}, {HERE: []}, tmp_path)
    frame, text = numbers(tmp_path), (tmp_path / "table1.md").read_text()
    assert set(frame.source) == {HERE}
    assert frame[["error_minus_paper", "compression_over_paper"]].isna().all(axis=None)
    assert "1.92" not in text and "against paper" not in text
    assert "nothing is published for LeNet-300-100 on digits" in text
    assert "published" not in tables.render_text(suite, {HERE: made}, {HERE: []})


def test_a_validation_error_is_named_so_and_stands_beside_nothing_published(tmp_path):
    suite = factory.suite(fc=factory.experiment(validation_size=10_000))
    made = factory.all_records(suite)
    tables.write_tables(suite, {HERE: made}, {HERE: []}, tmp_path)
    frame, text = numbers(tmp_path), (tmp_path / "table1.md").read_text()
    assert set(frame.error_kind) == {"validation error"} and set(frame.source) == {HERE}
    assert "Validation error, %" in text and "Test error" not in text and "1.92" not in text
    assert "validation error" in tables.render_text(suite, {HERE: made}, {HERE: []})


def test_published_rows_are_those_of_the_reference_file(suite, tmp_path):
    tables.write_tables(suite, {HERE: []}, {HERE: []}, tmp_path)
    frame = numbers(tmp_path)
    with published.reference_file("table1.csv").open(encoding="utf-8", newline="") as file:
        reference = [line for line in csv.DictReader(file) if line["network"] == "lenet300100"]
    assert len(reference) == len(frame)
    for line, (_, shown) in zip(reference, frame.iterrows(), strict=True):
        assert (shown.source, shown.method, shown.reference) == (line["kind"], line["method"], line["source"])
        assert shown.error_mean == float(line["error_pct"])
        assert shown.compression_mean == float(line["compression"])


@pytest.mark.parametrize(("model", "error", "compression"), [("lenet300100", "1.92", "68"), ("lenet5", "0.75", "280")])
def test_the_paper_is_quoted_as_printed(model, error, compression):
    suite = factory.suite(net=factory.experiment(model))
    paper = published.sparse_vd(suite.experiments["net"])
    assert paper and (paper.error_pct, paper.compression) == (error, compression)
    net = suite.experiments["net"]
    others = published.rows("third_party", net) + published.rows("related", net)
    assert others and all(other.source and other.confidence in ("read", "derived") for other in others)


def test_published_sparsities_agree_with_published_compression():
    """The ratio follows from the layers' sparsities as far as their rounding in print lets it."""
    for line in published.table1():
        sizes = factory.SHAPES.get(line.network, {}).values()
        parts = line.sparsity_per_layer_pct.split(" - ")
        if line.kind != "published" or len(parts) != len(sizes):
            continue
        low, high = (
            sum(
                (1 - (float(part) + shift * 0.5 * 10.0 ** -len(part.partition(".")[2])) / 100) * pd.Series(shape).prod()
                for part, shape in zip(parts, sizes, strict=True)
            )
            for shift in (1, -1)
        )
        total = sum(pd.Series(shape).prod() for shape in sizes)
        assert total / high - 0.5 <= float(line.compression) <= total / low + 0.5, line


def test_sources_are_columns_side_by_side(suite):
    frame = table1.document(suite, {"recorded": factory.all_records(suite), HERE: []}, {}).sections[0].frame
    assert list(frame.columns) == ["Method", "Published", "Recorded", "This machine"]
    warm_up = frame[frame["Method"] == "Sparse VD, warm-up"].iloc[0]
    assert warm_up["Published"] == "1.92 % at 68×" and "(n = 3)" in warm_up["Recorded"]
    assert warm_up["This machine"] == "–"


def test_runs_on_data_that_changed_in_between_are_told(suite, tmp_path):
    made = [
        factory.record(suite, "fc", "dense", seed, "train", inputs={"data": data}) for seed, data in enumerate("ab")
    ]
    tables.write_tables(suite, {HERE: made}, {HERE: []}, tmp_path)
    text = (tmp_path / "table1.md").read_text()
    assert "fc: mnist changed between its runs: their numbers are of 2 sets of data" in text


def test_records_of_two_states_of_the_code_are_a_footnote(suite, tmp_path):
    one = factory.record(suite, "fc", "dense", 0)
    other = factory.record(suite, "fc", "dense", 1, code_digest="fedcba9876543210")
    for made, expected in (([one, other], True), ([one, one], False)):
        tables.write_tables(suite, {HERE: made}, {HERE: []}, tmp_path)
        assert ("come from 2 states of the code: 0123456789ab (1), fedcba987654 (1)" in
                (tmp_path / "table1.md").read_text()) is expected  # fmt: skip
        assert "states of the code" not in tables.render_text(suite, {HERE: made}, {HERE: []})


def test_every_run_is_one_row_with_where_it_ran(suite, tmp_path):
    tables.write_tables(suite, {"recorded": factory.all_records(suite)}, {}, tmp_path)
    frame = numbers(tmp_path, "runs")
    assert list(zip(frame.experiment, frame.method, frame.seed, strict=True)) == list(suite.runs())
    assert set(frame.cpu) == {"Some CPU 9000"} and "torch=2.9.0" in frame.software[0]
    assert frame.wall_s.tolist() == [100.0 + seed for seed in frame.seed]
