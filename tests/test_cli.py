"""The command line: from a spec to records, tables and shipped nets, and what it says when something is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import factory
import pytest
from tiny_suite import SUITE, edit, one_line_error, run_jobs, write_suite

from vdbench import cli, collecting, config, current, information, records, shipping

ROOT = Path(__file__).parent.parent


# What it takes to start


def test_nothing_heavy_is_imported_before_a_verb_asks_for_it():
    heavy = ["torch", "numpy", "pandas", "scipy", "matplotlib", "sklearn", "snakemake", "numba"]
    parse = "import sys, vdbench.cli; vdbench.cli.parser(vdbench.cli.VERBS)"
    code = f"{parse}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "verb",
    ["fetch", "train", "prune", "time", "collect", "table", "plot", "record", "verify", "plan", "status", "info"],
)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    assert getattr(cli, verb).__doc__.split(";")[0].split(",")[0] in " ".join(capsys.readouterr().out.split())


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"vdbench \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["plan"], ["plan", "x.yaml", "--cores", "many"]])
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: vdbench" in capsys.readouterr().err


# What goes wrong


def job(stage: str, method: str, folder: Path, *flags: str) -> list[str]:
    suite = config.parse_suite(factory_content(), "tiny")
    spec = config.canonical(suite.spec_of(stage, "fc", method, 0))
    return [stage, "--suite", "tiny", "--spec", spec, "--output", str(folder / "run"), *map(str, flags)]


def factory_content():
    return {"suite": "tiny", "experiments": {"fc": factory.experiment(dataset="digits", seeds=[0])}}


def test_a_mistyped_key_is_one_line_naming_file_and_key(empty, capsys):
    experiment = SUITE["experiments"]["fc"] | {"treshold": 3}
    write_suite(empty, SUITE | {"experiments": {"fc": experiment}})
    for verb in ("plan", "status", "table", "collect", "record"):
        assert "tiny.yaml: experiments.fc.treshold: unknown key" in one_line_error([verb, "tiny.yaml"], capsys)


def test_a_missing_suite_file_is_named(empty, capsys):
    assert "nowhere.yaml: no such suite file" in one_line_error(["plan", "nowhere.yaml"], capsys)


def test_a_spec_that_is_none_is_refused(tmp_path, capsys):
    error = one_line_error(["train", "--suite", "s", "--spec", "{", "--output", str(tmp_path)], capsys)
    assert "--spec" in error


@pytest.mark.parametrize(("method", "flag"), [("vd_finetune", "--pretrained"), ("magnitude", "--pretrained")])
def test_a_method_without_what_it_starts_from_says_which_flag(method, flag, tmp_path, capsys):
    assert flag in one_line_error(job("train", method, tmp_path), capsys)


def test_missing_inputs_of_jobs_are_named(tmp_path, capsys):
    nowhere = tmp_path / "nowhere.pt"
    assert str(nowhere) in one_line_error(job("train", "vd_finetune", tmp_path, "--pretrained", nowhere), capsys)
    assert str(tmp_path) in one_line_error(job("prune", "dense", tmp_path, "--weights", nowhere), capsys)
    assert str(nowhere) in one_line_error(job("time", "vd_warmup", tmp_path, "--pruned", nowhere), capsys)


def test_a_file_that_is_no_net_is_refused(tmp_path, capsys):
    net = tmp_path / "pruned.npz"
    net.write_bytes(b"not a net")
    error = one_line_error(job("time", "vd_warmup", tmp_path, "--pruned", net), capsys)
    assert f"{net}: not a file of vdbench's" in error and "delete" not in error


def test_a_mirror_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("VDBENCH_MIRROR", raising=False)
    flags = ["--cache", str(tmp_path / "cache"), "--mirror", str(tmp_path / "mirror")]
    assert str(tmp_path / "mirror") in one_line_error(["fetch", "mnist", *flags], capsys)


def test_tables_without_runs_say_what_to_do(empty, monkeypatch, capsys):
    monkeypatch.setattr(shipping, "_SHIPPED", ())
    assert "run snakemake first" in one_line_error(["table", "tiny.yaml"], capsys)


def test_a_damaged_record_is_named(project, capsys):
    path = project / "results/tiny/fc/dense/seed0/train.json"
    path.write_text("{")
    assert "fc/dense/seed0/train.json: not a record" in one_line_error(["collect", "tiny.yaml"], capsys)


def test_a_reader_that_has_seen_enough_is_no_error(empty):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    status = [sys.executable, "-m", "vdbench.cli", "status", "tiny.yaml"]
    with subprocess.Popen(status, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


# Jobs


def test_jobs_leave_current_records(trained):
    suite = config.parse_suite(SUITE, "tiny")
    found, notes = current.load(trained / "results/tiny", suite)
    assert notes == []
    assert {record.status for record in found} == {"ok"}


def test_a_run_that_diverges_is_a_result_and_not_a_failure(tmp_path, capsys):
    content = factory_content()
    content["experiments"]["fc"]["methods"] = {"dense": {"epochs": 1, "learning_rate": 1e30}}
    content["experiments"]["fc"]["timed"] = []
    suite = config.parse_suite(content, "tiny")
    run_jobs(tmp_path, suite)
    found, notes = current.load(tmp_path, suite)
    assert [(record.stage, record.status) for record in found] == [("train", "diverged"), ("prune", "diverged")]
    assert notes == []
    assert "train diverged" in capsys.readouterr().out


def test_fetch_reports_what_there_is(tmp_path, capsys):
    assert cli.main(["fetch", "digits", "--output", str(tmp_path / "digits.json")]) == 0
    report = json.loads((tmp_path / "digits.json").read_text())
    assert report["dataset"] == "digits"
    assert sum(report["examples"].values()) == 1797
    assert "1,442 train" in capsys.readouterr().out


# Suites


def test_collect_writes_a_row_a_record(project, capsys):
    assert cli.main(["collect", "tiny.yaml"]) == 0
    import pandas

    rows = pandas.read_csv(project / "results/tiny/collected.csv")
    found, _ = current.load(Path("results/tiny"), config.parse_suite(SUITE, "tiny"))
    assert list(zip(rows["stage"], rows["method"], rows["seed"], strict=True)) == [
        (record.stage, record.method, record.seed) for record in found
    ]
    pruned = next(record for record in found if (record.stage, record.method) == ("prune", "vd_warmup"))
    row = rows[(rows["stage"] == "prune") & (rows["method"] == "vd_warmup")].iloc[0]
    assert row["metrics.error"] == pruned.metrics["error"]
    assert row["size.compression_ratio"] == pruned.size.compression_ratio
    assert row["spec_sha256"] == pruned.spec_sha256


def test_collected_columns_are_those_of_any_record(tmp_path):
    suite = factory.suite()
    made = [factory.record(suite, "fc", "dense", 0, stage=stage) for stage in ("train", "prune")]
    collecting.write_csv(made, tmp_path / "all.csv")
    header, train, prune = (tmp_path / "all.csv").read_text().splitlines()
    assert "size.sparsity" in header
    assert train.count(",") >= header.count(",") and prune.count(",") >= header.count(",")


def test_tables_and_figures_are_written_where_asked(project, capsys):
    from vdbench import outputs

    suite = config.parse_suite(SUITE, "tiny")
    assert cli.main(["table", "tiny.yaml", "--results", "results/tiny", "--output", "made"]) == 0
    assert "this machine" in capsys.readouterr().out
    assert cli.main(["plot", "tiny.yaml", "--results", "results/tiny", "--output", "made"]) == 0
    assert {path.name for path in Path("made").iterdir()} == {*outputs.table_names(suite), *outputs.figure_names(suite)}


def test_status_of_a_suite_that_is_done_and_of_one_that_is_not_begun(project, capsys):
    assert cli.main(["status", "tiny.yaml"]) == 0
    assert "5 jobs: 5 done" in capsys.readouterr().out
    assert cli.main(["status", "tiny.yaml", "--results", "elsewhere"]) == 1
    assert "5 jobs: 5 missing" in capsys.readouterr().out


def test_status_tells_stale_and_damaged_records(project, capsys):
    changed = SUITE["experiments"]["fc"] | {"threshold": 2.0}
    write_suite(project, SUITE | {"experiments": {"fc": changed}})
    assert cli.main(["status", "tiny.yaml"]) == 1
    assert "stale: fc/dense/seed0 train: made under another spec" in capsys.readouterr().out
    (project / "results/tiny/fc/dense/seed0/train.json").write_text("{")
    assert cli.main(["status", "tiny.yaml"]) == 1
    assert "not a record" in capsys.readouterr().out


def test_status_and_tables_agree_on_a_net_pruned_from_other_weights(project, capsys):
    edit(project / "results/tiny/fc/dense/seed0/train.json", lambda record: record.update(weights_sha256="0" * 64))
    expected = "stale: fc/dense/seed0 prune: made from other weights than those trained last"
    assert cli.main(["status", "tiny.yaml"]) == 1
    assert expected in capsys.readouterr().out
    assert current.load(Path("results/tiny"), config.parse_suite(SUITE, "tiny"))[1] == [expected]


def test_info_lists_what_there_is(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    net = "lenet5-mnist-vd_warmup seed0, seed1"
    for expected in (
        "mnist",
        "digits",
        "266,200 weights",
        "430,500 weights",
        "vd_warmup",
        "torch_dense",
        "python",
        net,
    ):
        assert expected in out
    assert "4,640,000 weights for 10,000 words" in out


@pytest.mark.parametrize("backend", ["torch_compacted", "torch_channels_last", "scipy_csr"])
def test_info_tries_every_engine_on_a_net_it_has_something_to_do_in(backend):
    assert information._installed(backend).endswith(": installed")


UNTRAINED = {
    "suite": "tiny",
    "timing": SUITE["timing"],
    "synthetic": {"linear": {"line": {"inputs": 8, "outputs": 4, "densities": [0.5, 0.25]}}},
}


def test_a_suite_of_untrained_nets_goes_all_the_way(empty, monkeypatch, capsys):
    monkeypatch.setattr(shipping, "_SHIPPED", ())
    write_suite(empty, UNTRAINED)
    suite = config.parse_suite(UNTRAINED, "tiny")
    assert cli.main(["plan", "tiny.yaml", "--cores", "2"]) == 0
    assert "suite tiny: 5 jobs, 5 to do" in (out := capsys.readouterr().out) and "time line: " in out
    assert cli.main(["status", "tiny.yaml"]) == 1
    assert "2 jobs: 2 missing" in capsys.readouterr().out
    for job in suite.jobs():
        place = records.run_folder(Path("results/tiny"), *job[1:])
        flags = ["--suite", "tiny", "--spec", config.canonical(suite.spec_of(*job)), "--output", str(place)]
        assert cli.main(["time", *flags]) == 0
    assert cli.main(["collect", "tiny.yaml"]) == 0
    assert cli.main(["status", "tiny.yaml"]) == 0
    assert "2 jobs: 2 done" in capsys.readouterr().out
    assert cli.main(["record", "tiny.yaml"]) == 0
    shipped = {p.relative_to("results/recorded/tiny").as_posix() for p in Path("results/recorded").rglob("*.json")}
    assert shipped == {"line/density0.5/seed0/time.json", "line/density0.25/seed0/time.json"}
    assert cli.main(["table", "tiny.yaml", "--output", "made"]) == 0
    assert "linear layer, 8 to 4 (line)" in capsys.readouterr().out
    assert cli.main(["plot", "tiny.yaml", "--output", "made"]) == 0
    assert cli.main(["plan", "tiny.yaml"]) == 0
    assert "5 jobs, 2 to do" in capsys.readouterr().out
