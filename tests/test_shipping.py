"""Recorded runs: what is shipped of a suite, whether it is what its records say, and how it is loaded."""

import shutil
from pathlib import Path

import factory
import pytest
from tiny_suite import edit, one_line_error

import vdbench
from vdbench import cli, config, data, metrics, records, shipping


def test_record_ships_records_histories_and_pruned_nets_only(recorded):
    names = {path.relative_to(recorded).as_posix() for path in recorded.rglob("*") if path.is_file()}
    run = "fc/vd_warmup/seed0"
    assert names == {
        *(f"fc/dense/seed0/{name}" for name in ("train.json", "history.csv", "prune.json")),
        *(f"{run}/{name}" for name in ("train.json", "history.csv", "prune.json", "pruned.npz", "time.json")),
    }


def test_record_refuses_an_incomplete_suite_unless_told(project, capsys):
    (project / "results/tiny/fc/vd_warmup/seed0/time.json").unlink()
    assert cli.main(["record", "tiny.yaml"]) == 2
    assert "missing: fc/vd_warmup/seed0 time" in capsys.readouterr().err
    assert not Path("results/recorded/tiny").exists()
    assert cli.main(["record", "tiny.yaml", "--partial"]) == 0
    assert "left out: missing: fc/vd_warmup/seed0 time" in capsys.readouterr().out
    assert Path("results/recorded/tiny/fc/vd_warmup/seed0/prune.json").exists()


def test_record_is_all_or_nothing(recorded, monkeypatch):
    before = sorted((path, path.read_bytes()) for path in recorded.rglob("*.json"))
    copies = []

    def full_disk(source, target):
        copies.append(target)
        if len(copies) == 3:
            raise OSError("disk full")
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    assert cli.main(["record", "tiny.yaml"]) == 2
    assert sorted((path, path.read_bytes()) for path in recorded.rglob("*.json")) == before
    assert [path.name for path in recorded.parent.iterdir()] == ["tiny"]


def test_record_puts_back_what_it_could_not_replace(recorded, monkeypatch):
    before = sorted((path, path.read_bytes()) for path in recorded.rglob("*.json"))
    rename = Path.rename

    def interrupted(self, target):
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    assert cli.main(["record", "tiny.yaml"]) == 130
    assert sorted((path, path.read_bytes()) for path in recorded.rglob("*.json")) == before
    assert [path.name for path in recorded.parent.iterdir()] == ["tiny"]


def test_record_replaces_what_was_recorded_before(recorded):
    (recorded / "fc/old/seed0").mkdir(parents=True)
    assert cli.main(["record", "tiny.yaml"]) == 0
    assert not (recorded / "fc/old").exists()


def test_record_replaces_the_folder_it_is_told(project):
    assert cli.main(["record", "tiny.yaml", "--output", "elsewhere"]) == 0
    assert Path("elsewhere/fc/vd_warmup/seed0/pruned.npz").exists() and not Path("results/recorded").exists()


def test_shipped_nets_agree_with_their_records(recorded, capsys):
    assert cli.main(["verify"]) == 0
    out = capsys.readouterr().out
    assert "tiny fc/vd_warmup/seed0 agrees: error " in out
    assert "1 of 1 nets agree" in out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda record: record["metrics"].update(error=record["metrics"]["error"] + 1e-12), "error"),
        (lambda record: record["size"].update(nonzero_weights=1), "nonzero_weights"),
        (lambda record: record["size"].update(compression_ratio=280.0), "compression_ratio"),
        (lambda record: record["layers"][0].update(nonzero=5), "layers"),
    ],
)
def test_a_record_that_says_other_than_its_net_is_found_out(recorded, capsys, change, named):
    edit(recorded / "fc/vd_warmup/seed0/prune.json", change)
    capsys.readouterr()
    assert cli.main(["verify", "results/recorded/tiny"]) == 1
    out = capsys.readouterr().out
    assert f"DIFFERS: {named}: recorded" in out
    assert "0 of 1 nets agree" in out


def test_a_variational_record_without_its_net_is_found_out(recorded, capsys):
    (recorded / "fc/vd_warmup/seed0/pruned.npz").unlink()
    assert cli.main(["verify"]) == 1
    assert "pruned.npz is missing" in capsys.readouterr().out


@pytest.mark.parametrize("limit", ["LARGEST_NET", "LARGEST_SET"])
def test_a_net_too_large_to_ship_is_left_out_and_not_missed(recorded, capsys, monkeypatch, limit):
    monkeypatch.setattr(shipping, limit, 1000)
    assert cli.main(["record", "tiny.yaml"]) == 0
    assert "left out: fc/vd_warmup/0 pruned.npz: over 2.5 MB" in capsys.readouterr().out
    assert (recorded / "fc/vd_warmup/seed0/prune.json").exists()
    assert not (recorded / "fc/vd_warmup/seed0/pruned.npz").exists()
    assert "no recorded nets under" in one_line_error(["verify"], capsys)


def test_nets_of_baselines_are_shipped_if_they_are_small():
    suite = factory.suite(fc=factory.experiment(seeds=[0]))
    for method, largest in (("vd_warmup", shipping.LARGEST_NET), ("magnitude", shipping.LARGEST_BASELINE)):
        made = factory.record(suite, "fc", method, 0, metrics={"error": 1.0})
        for size, shipped in ((largest, {made.run}), (largest + 1, set())):
            net = made.model_copy(update={"size": made.size.model_copy(update={"file_bytes": size})})
            assert shipping.shippable([net]) == shipped


def test_nets_are_verified_on_what_data_there_is(recorded, capsys, monkeypatch):
    shutil.copytree(recorded / "fc", recorded / "more")

    def holds_out_too_many(record):
        record["spec"]["validation_size"] = 10**6
        record["spec_sha256"] = config.spec_sha256(record["spec"])

    edit(recorded / "more/vd_warmup/seed0/prune.json", holds_out_too_many)
    assert cli.main(["verify"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert sum(" agrees: error " in line for line in out) == 1 and "1 of 2 nets agree with their records" in out
    assert any(" NOT VERIFIED: validation_size is 1000000: digits has " in line for line in out)
    assert "validation_size is 1000000" in one_line_error(["verify", str(recorded / "more")], capsys)


def test_nets_of_an_exploration_stay_behind(recorded, capsys, monkeypatch):
    monkeypatch.setattr(shipping, "_explores", lambda record: True)
    assert cli.main(["record", "tiny.yaml"]) == 0
    assert "left out: fc/vd_warmup/0 pruned.npz: judged by held-out examples" in capsys.readouterr().out
    assert not (recorded / "fc/vd_warmup/seed0/pruned.npz").exists()


def test_verify_takes_any_part_of_a_recorded_suite(recorded, capsys, monkeypatch):
    for folder in (recorded / "fc", recorded / "fc/vd_warmup"):
        assert cli.main(["verify", str(folder)]) == 0
    monkeypatch.chdir(recorded / "fc/vd_warmup/seed0")
    assert cli.main(["verify", "."]) == 0
    Path("pruned.npz").unlink()
    assert cli.main(["verify", "."]) == 1
    assert "is missing" in capsys.readouterr().out


def test_verify_without_nets_is_an_error(empty, capsys):
    assert "no recorded nets under" in one_line_error(["verify", "nowhere"], capsys)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_shipped_net_is_loaded_by_name_and_errs_as_recorded(recorded, sparse):
    digits = data.load("digits")
    record = records.read(recorded / "fc/vd_warmup/seed0/prune.json")
    model = vdbench.load("fc-vd_warmup-seed0", sparse=sparse)
    assert not model.training
    assert metrics.evaluate(model, digits.eval_images, digits.eval_labels)["error"] == record.metrics["error"]


def test_nets_that_came_with_the_package_are_found_beside_those_of_this_folder(recorded, monkeypatch, tmp_path):
    shipped = tmp_path / "package" / "recorded"
    shutil.copytree(recorded / "fc", shipped / "paper" / "net")
    monkeypatch.setattr(shipping, "_SHIPPED", (shipped,))
    for name in ("net-vd_warmup-seed0", "fc-vd_warmup-seed0"):
        assert metrics.size(vdbench.load(name)).weights == 266_200


def test_loading_a_net_that_is_not_shipped_names_similar_ones(recorded):
    with pytest.raises(KeyError, match=r"'fc-vd_warm'; did you mean fc-vd_warmup, .*\? vdbench info lists them all"):
        vdbench.load("fc-vd_warm")
    with pytest.raises(KeyError, match="'nosuch'; vdbench info lists them all"):
        vdbench.load("nosuch")


def test_nets_travel_by_what_they_lose_as_far_as_a_set_goes(monkeypatch):
    suite = factory.suite(fc=factory.experiment(seeds=[0]))
    monkeypatch.setattr(shipping, "LARGEST_SET", 100)
    for limit in ("LARGEST_NET", "LARGEST_BASELINE"):
        monkeypatch.setattr(shipping, limit, 70)
    runs = {
        "vd_finetune": (2.0, 60),
        "vd_warmup": (1.0, 50),
        "magnitude": (3.0, 50),
        "random": (0.5, 71),
        "dense": (0.1, 1),
    }
    made = [factory.record(suite, "fc", method, 0, metrics={"error": error}) for method, (error, _) in runs.items()]
    found = [
        record.model_copy(update={"size": record.size.model_copy(update={"file_bytes": size})})
        for record, (_, size) in zip(made, runs.values(), strict=True)
    ]
    assert shipping.shippable(found) == {("fc", "vd_warmup", 0), ("fc", "magnitude", 0)}
    later = [r.model_copy(update={"seed": 1}) if r.method == "vd_warmup" else r for r in found]
    assert shipping.shippable(later) == {("fc", "vd_finetune", 0)}  # another seed of what is there already comes last
    explored = [r.model_copy(update={"spec": r.spec | {"validation_size": 9}}) for r in found]
    assert shipping.shippable(explored) == set()
    diverged = [r.model_copy(update={"status": "diverged"}) if r.method == "vd_warmup" else r for r in found]
    assert shipping.shippable(diverged) == {("fc", "vd_finetune", 0)}
