"""Records: what is refused, what is stale, and that a file is whole or not there."""

import json
import math
import shutil

import factory
import pytest

from vdbench import current, records, stages
from vdbench.records import RecordError


@pytest.fixture
def suite():
    return factory.suite(fc=factory.experiment(seeds=[0, 1]))


@pytest.fixture
def results(suite, tmp_path):
    factory.write_results(tmp_path, suite, factory.all_records(suite))
    return tmp_path


def path_of(results, stage="prune", method="vd_warmup", seed=0):
    return records.run_folder(results, "fc", method, seed) / f"{stage}.json"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_record_is_read_as_it_was_written(suite, tmp_path):
    for stage in records.STAGES:
        record = factory.record(suite, "fc", "vd_warmup", 0, stage=stage)
        records.write(record, tmp_path / "one.json")
        assert records.read(tmp_path / "one.json") == record


def test_one_rule_says_what_a_net_is_judged_by(suite):
    words = {"perplexity": 100.0, "cross_entropy": 4.6}
    record = factory.record(suite, "fc", "dense", 0)
    assert record.value == record.metrics["error"]
    assert record.model_copy(update={"metrics": words}).value == 100.0
    controls = [records.Control(weights_sha256="0" * 64, **known) for known in ({"error": 2.0}, {"perplexity": 100.0})]
    assert [control.value for control in controls] == [2.0, 100.0]
    assert math.isnan(records.Control(weights_sha256="0" * 64).value)


def test_records_of_untrained_nets_are_read_and_loaded(tmp_path):
    untrained = factory.untrained_suite(backends=["torch_dense"])
    made = factory.all_records(untrained)
    factory.write_results(tmp_path, untrained, made)
    assert current.load(tmp_path, untrained) == (made, [])
    (tmp_path / "conv/density0.1/seed0/time.json").unlink()
    assert current.load(tmp_path, untrained)[1] == ["missing: conv/density0.1"]
    other = factory.untrained_suite(backends=["torch_dense"], rounds=7)
    assert len(current.load(tmp_path, other)[1]) == len(made)


def test_all_current_records_of_a_suite_are_loaded(suite, results):
    found, notes = current.load(results, suite)
    assert sorted((r.stage, *r.run) for r in found) == sorted(suite.jobs())
    assert notes == []


def test_a_missing_record_is_named(suite, results):
    path_of(results).unlink()
    found, notes = current.load(results, suite)
    assert notes == ["missing: fc/vd_warmup/seed0 prune"]
    assert len(found) == len(list(suite.jobs())) - 1


def test_what_there_is_nothing_of_takes_one_line(suite, results):
    for stage in ("train", "prune"):
        path_of(results, stage=stage, seed=1).unlink()
    assert current.load(results, suite)[1] == ["missing: fc/vd_warmup/seed1"]
    shutil.rmtree(results / "fc" / "vd_warmup")
    shutil.rmtree(results / "fc" / "dense" / "seed1")
    assert current.load(results, suite)[1] == ["missing: fc/dense/seed1", "missing: fc/vd_warmup"]
    shutil.rmtree(results)
    assert current.load(results, suite) == ([], ["missing: fc"])


def test_a_record_of_another_spec_is_stale(results):
    other = factory.suite(fc=factory.experiment(seeds=[0, 1], threshold=2.5))
    found, notes = current.load(results, other)
    assert found == []
    assert len(notes) == len(list(other.jobs()))
    assert all(note.startswith("stale: ") and note.endswith("made under another spec") for note in notes)


@pytest.mark.parametrize(("raised", "stale"), [("train", {"train", "prune", "time"}), ("time", {"time"})])
def test_a_record_of_an_older_version_of_the_code_is_stale(suite, results, monkeypatch, raised, stale):
    monkeypatch.setitem(stages.STAGE_VERSIONS, raised, stages.STAGE_VERSIONS[raised] + 1)
    found, notes = current.load(results, suite)
    assert {r.stage for r in found} == set(records.STAGES) - stale
    assert all("made by versions" in note for note in notes)


def test_a_baseline_trained_to_match_older_pruning_is_stale(suite, results, monkeypatch):
    path = path_of(results, stage="train", method="magnitude")
    monkeypatch.setitem(stages.STAGE_VERSIONS, "prune", 2)
    notes = current.load(results, suite)[1]
    assert [note.split(": ")[1] for note in notes if "train" in note.split(": ")[1]] == [
        f"fc/{method}/seed{seed} train" for method in ("magnitude", "random") for seed in (0, 1)
    ]
    edit(path, versions={"data": 1, "train": 1})  # as such records once were, when the first version pruned
    assert any(note.startswith("stale: fc/magnitude/seed0 train") for note in current.load(results, suite)[1])
    monkeypatch.setitem(stages.STAGE_VERSIONS, "prune", 1)
    assert current.load(results, suite)[1] == []


def test_a_record_in_another_runs_place_is_not_believed(suite, results):
    path_of(results, seed=1).write_bytes(path_of(results, seed=0).read_bytes())
    found, notes = current.load(results, suite)
    assert notes == ["stale: fc/vd_warmup/seed1 prune: the record of fc/vd_warmup/seed0 prune"]
    assert [r.run for r in found].count(("fc", "vd_warmup", 0)) == len({r.stage for r in found if r.seed == 0})


def test_records_of_an_experiment_that_was_renamed_are_not_believed(suite, results):
    renamed = factory.suite(net=factory.experiment(seeds=[0, 1]))
    (results / "fc").rename(results / "net")
    found, notes = current.load(results, renamed)
    assert found == []
    assert "stale: net/dense/seed0 train: the record of fc/dense/seed0 train" in notes


def test_a_pruned_net_of_weights_since_trained_anew_is_stale(suite, results):
    edit(path_of(results, stage="train"), weights_sha256="0" * 64)
    assert current.load(results, suite)[1] == [
        "stale: fc/vd_warmup/seed0 prune: made from other weights than those trained last"
    ]


def test_another_digest_of_the_code_is_not_stale(suite, results):
    edit(path_of(results), code_digest="fedcba9876543210")
    assert current.load(results, suite)[1] == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a record"),
        ("{}", "not a record"),
        ('{"result_version": 2}', "result_version"),
        ("[1, 2", "not a record"),
    ],
)
def test_a_file_that_is_no_record_is_refused_by_name(suite, results, text, reason):
    path_of(results).write_text(text)
    with pytest.raises(RecordError, match=reason) as caught:
        current.load(results, suite)
    assert str(path_of(results)) in str(caught.value)
    assert "delete it and rerun its job" in str(caught.value)


def test_a_record_with_an_unknown_field_is_refused(results):
    edit(path_of(results), acuracy=0.9)
    with pytest.raises(RecordError, match="acuracy"):
        records.read(path_of(results))


def test_a_record_whose_spec_was_edited_is_refused(results):
    path = path_of(results)
    spec = json.loads(path.read_text())["spec"]
    edit(path, spec=spec | {"threshold": 2.0})
    with pytest.raises(RecordError, match="the file was edited"):
        records.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_never_recorded(suite, tmp_path, value):
    with pytest.raises(ValueError, match="finite"):
        factory.record(suite, "fc", "dense", 0, metrics={"error": value})
    with pytest.raises(ValueError, match="JSON compliant"):
        records.write_json(tmp_path / "bad.json", {"error": value})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), records.atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("disk on fire")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_makes_its_folder_and_replaces_at_once(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with records.atomic_write(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]
