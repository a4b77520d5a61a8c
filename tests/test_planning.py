"""Plans: how many jobs there are, how long they take, and on what that is based."""

import re

import factory
import pytest
from tiny_suite import SUITE, write_suite

from vdbench import cli, estimates, planning, shipping
from vdbench.estimates import Past
from vdbench.planning import PlannedJob


def test_a_plan_learns_the_time_of_a_layer_from_the_same_layer():
    suite = factory.untrained_suite(backends=["torch_dense"])
    (here,) = [case for case in factory.all_records(suite) if case.run == ("conv", "density0.1", 0)]
    assert Past([here]).seconds("time", suite.spec_of("time", "conv", "density0.02", 0))[0] == here.wall_s
    other = here.spec | {"arguments": {"channels": 8, "size": 8}}
    assert "a guess" in Past([here]).seconds("time", other)[1]


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
    return PlannedJob((name,), "rule", frozenset((other,) for other in after), seconds, "", False, alone)


def test_the_plan_schedules_on_the_cores_there_are():
    chain = [simple_job("a", 3.0), simple_job("b", 4.0, "a")]
    assert planning.makespan(chain, cores=8) == 7.0
    wide = [simple_job(name, 2.0) for name in "abcd"]
    assert [planning.makespan(wide, cores) for cores in (1, 2, 4, 8)] == [8.0, 4.0, 2.0, 2.0]
    timed = [simple_job("a", 1.0), simple_job("b", 2.0), simple_job("t", 5.0, "a", alone=True)]
    assert planning.makespan(timed, cores=2) == 7.0
    assert planning.makespan([simple_job("b", 1.0, "done before")], cores=1) == 1.0
