"""The command line: from a spec to records, tables and shipped nets, and what it says when something is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import factory
import pytest
import yaml

import vdbench
from vdbench import cli, collecting, config, current, data, estimates, metrics, planning, records, shipping
from vdbench.estimates import Past
from vdbench.planning import Job

ROOT = Path(__file__).parent.parent
SUITE = {
    "suite": "tiny",
    "timing": {"batch_sizes": [1], "threads": [1], "rounds": 2, "min_sample_s": 1e-4, "backends": ["torch_dense"]},
    "experiments": {
        "fc": {
            "dataset": "digits",
            "model": "lenet300100",
            "seeds": [0],
            "timed": ["vd_warmup"],
            "methods": {"dense": {"epochs": 2}, "vd_warmup": {"epochs": 2, "kl_zero_epochs": 1}},
        }
    },
}


def write_suite(folder: Path, content=SUITE) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def run_jobs(folder: Path, suite: config.Suite) -> None:
    """What the workflow would do, job by job."""
    for stage, *run in suite.jobs():
        place = records.run_folder(folder, *run)
        inputs = {"prune": ["--weights", f"{place}/weights.pt"], "time": ["--pruned", f"{place}/pruned.npz"]}
        if stage == "prune" and run[1] != "dense":
            inputs["prune"] += ["--control", f"{folder}/fc/dense/seed{run[2]}/prune.json"]
        spec = config.canonical(suite.spec_of(stage, *run))
        flags = ["--suite", suite.suite, "--spec", spec, "--output", str(place), *inputs.get(stage, [])]
        assert cli.main([stage, *flags]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tiny suite, all its jobs done; read only."""
    folder = tmp_path_factory.mktemp("trained")
    run_jobs(folder / "results/tiny", config.parse_suite(SUITE, "tiny"))
    return folder


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    """A folder of one's own with the tiny suite done, as the current one."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    write_suite(tmp_path)
    return tmp_path


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_suite(tmp_path)
    return tmp_path


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


def one_line_error(arguments, capsys) -> str:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vdbench: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


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
    assert f"{net}: not a pruned net" in one_line_error(job("time", "vd_warmup", tmp_path, "--pruned", net), capsys)


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
    for expected in ("mnist", "digits", "266,200 weights", "430,500 weights", "vd_warmup", "torch_dense", "python"):
        assert expected in out


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


def test_a_plan_learns_the_time_of_a_layer_from_the_same_layer():
    suite = factory.untrained_suite(backends=["torch_dense"])
    (here,) = [case for case in factory.all_records(suite) if case.run == ("conv", "density0.1", 0)]
    assert Past([here]).seconds("time", suite.spec_of("time", "conv", "density0.02", 0))[0] == here.wall_s
    other = here.spec | {"arguments": {"channels": 8, "size": 8}}
    assert "a guess" in Past([here]).seconds("time", other)[1]


# Plans


def test_a_plan_counts_jobs_and_names_its_basis(empty, monkeypatch, capsys):
    monkeypatch.setattr(shipping, "_SHIPPED", ())
    assert cli.main(["plan", "tiny.yaml", "--cores", "2"]) == 0
    out = capsys.readouterr().out
    assert "suite tiny: 9 jobs, 9 to do" in out
    assert "on 2 cores" in out
    assert "train lenet300100 on digits vd_warmup" in out and "a guess" in out


def test_a_plan_learns_from_runs_on_this_cpu(project, monkeypatch, capsys):
    monkeypatch.setattr(shipping, "_SHIPPED", ())
    more = SUITE["experiments"]["fc"] | {"seeds": [0, 1]}
    write_suite(project, SUITE | {"experiments": {"fc": more}})
    assert cli.main(["plan", "tiny.yaml"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^pretrain +2 +1 ", out, re.MULTILINE)
    assert "train lenet300100 on digits dense:" in out and "s an epoch, one run on this CPU" in out


def test_a_run_that_was_recorded_is_past_once(recorded, capsys):
    write_suite(recorded.parents[2], SUITE | {"experiments": {"fc": SUITE["experiments"]["fc"] | {"seeds": [0, 1]}}})
    assert cli.main(["plan", "tiny.yaml"]) == 0
    assert "s an epoch, one run on this CPU" in capsys.readouterr().out


@pytest.mark.parametrize("cores", ["0", "-3", "two"])
def test_a_plan_for_no_cores_is_refused(empty, capsys, cores):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", "tiny.yaml", f"--cores={cores}"])
    assert "argument --cores" in capsys.readouterr().err


def test_estimates_are_the_median_of_like_runs_this_cpu_first():
    suite = factory.suite()
    spec = suite.spec_of("train", "fc", "dense", 7)
    elsewhere = [factory.record(suite, "fc", "dense", 0, stage="train", wall_s=400.0)]
    here = factory.provenance().model_copy(update={"cpu": estimates.cpu_model()})
    ours = [
        factory.record(suite, "fc", "dense", seed, stage="train", wall_s=wall_s, provenance=here)
        for seed, wall_s in enumerate([4.0, 8.0, 80.0])
    ]
    other_method = [factory.record(suite, "fc", "vd_warmup", 0, stage="train", wall_s=1.0, provenance=here)]
    assert Past([*elsewhere, *ours, *other_method]).seconds("train", spec) == (
        8.0,
        "2 s an epoch, median of 3 runs on this CPU",
    )
    seconds, basis = Past([*elsewhere, *other_method]).seconds("train", spec)
    assert seconds == 400.0 and "another CPU (Some CPU 9000)" in basis
    assert "a guess" in Past(other_method).seconds("train", spec)[1]


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (None, (400.0, "another CPU (Some CPU 9000)")),
        ("Some GPU 100", (4.0, "this GPU")),
        ("Another GPU", (4.0, "another GPU (Some GPU 100)")),
    ],
)
def test_estimates_are_of_runs_on_a_gpu_where_there_is_one_and_only_there(gpu, expected, monkeypatch):
    suite = factory.suite()
    spec = suite.spec_of("train", "fc", "dense", 7)
    on_gpu = factory.provenance().model_copy(update={"device": "Some GPU 100", "cpu": estimates.cpu_model()})
    finished = [
        factory.record(suite, "fc", "dense", 0, stage="train", wall_s=400.0),
        factory.record(suite, "fc", "dense", 1, stage="train", wall_s=4.0, provenance=on_gpu),
    ]
    monkeypatch.setattr(estimates, "gpu_model", lambda: gpu)
    seconds, basis = Past(finished).seconds("train", spec)
    assert (seconds, expected[1] in basis) == (expected[0], True), basis
    if gpu is None:
        assert "a guess" in Past(finished[1:]).seconds("train", spec)[1]


def simple_job(name, seconds, *after, alone=False):
    return Job((name,), "rule", frozenset((other,) for other in after), seconds, "", False, alone)


def test_the_plan_schedules_on_the_cores_there_are():
    chain = [simple_job("a", 3.0), simple_job("b", 4.0, "a")]
    assert planning.makespan(chain, cores=8) == 7.0
    wide = [simple_job(name, 2.0) for name in "abcd"]
    assert [planning.makespan(wide, cores) for cores in (1, 2, 4, 8)] == [8.0, 4.0, 2.0, 2.0]
    timed = [simple_job("a", 1.0), simple_job("b", 2.0), simple_job("t", 5.0, "a", alone=True)]
    assert planning.makespan(timed, cores=2) == 7.0
    assert planning.makespan([simple_job("b", 1.0, "done before")], cores=1) == 1.0


# Shipping


@pytest.fixture
def recorded(project):
    assert cli.main(["record", "tiny.yaml"]) == 0
    return project / "results/recorded/tiny"


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


def test_shipped_nets_agree_with_their_records(recorded, capsys):
    assert cli.main(["verify"]) == 0
    out = capsys.readouterr().out
    assert "tiny fc/vd_warmup/seed0 agrees: error " in out
    assert "1 of 1 nets agree" in out


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


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


def test_loading_a_net_that_is_not_shipped_lists_those_that_are(recorded):
    with pytest.raises(KeyError, match="fc-vd_warmup-seed0"):
        vdbench.load("lenet5")
