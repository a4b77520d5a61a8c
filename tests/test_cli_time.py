"""`vdbench time NET`: a net timed by hand, its speeds printed, and a record where one is asked for."""

import platform
import subprocess
import sys

import pytest
import tiny
from tiny_suite import one_line_error

from vdbench import cli, pruning, records
from vdbench.config_timing import Timing

FEW = ["--threads", "1", "--backends", "torch_dense", "torch_csr", "--batch-sizes"]
MADE_FROM = {"model": "lenet300100", "num_classes": 10, "dataset": "mnist", "method": "vd_warmup", "seed": 3}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def net(tmp_path):
    """The file of a sparse LeNet-300-100."""
    path = tmp_path / "pruned.npz"
    pruning.save_net(path, tiny.sparse_net("lenet300100"), MADE_FROM)
    return str(path)


def test_a_net_is_timed_and_its_speeds_are_printed(net, tmp_path, capsys):
    assert cli.main(["time", net, *FEW, "1"]) == 0
    shown = capsys.readouterr().out
    assert f"{net}, 1 thread, " in shown
    assert "Best dense, µs" in shown and "(torch, dense)" in shown and "(torch CSR)" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["pruned.npz"]


def test_a_record_is_written_where_asked(net, tmp_path):
    assert cli.main(["time", net, *FEW, "1", "3", "--output", str(tmp_path / "timed")]) == 0
    record = records.read(tmp_path / "timed" / "time.json")
    assert (record.experiment, record.dataset, record.method, record.seed) == (net, "mnist", "vd_warmup", 3)
    assert [(t.batch_size, t.backend) for t in record.timing] == [
        (size, name) for size in (1, 3) for name in ("torch_dense", "torch_csr")
    ]
    assert all(len(t.samples_s) == Timing().rounds for t in record.timing)


ASK_AGAIN = """
import resource, sys, torch
from vdbench import cli
cli.main(sys.argv[1:])
faults = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's memory")
def test_memory_freed_while_nets_are_timed_is_not_asked_for_again(net):
    command = [sys.executable, "-c", ASK_AGAIN, "time", net, *FEW, "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, again = map(int, done.stdout.splitlines()[-1].split())
    assert first > 0 and again < first / 10


def test_every_number_of_threads_has_a_table(net, capsys, monkeypatch):
    monkeypatch.setattr("vdbench.timing.available_cores", lambda: 2)
    assert cli.main(["time", net, "--batch-sizes", "1", "--backends", "torch_dense"]) == 0
    shown = capsys.readouterr().out
    assert shown.index(f"{net}, 1 thread, ") < shown.index(f"{net}, 2 threads, ")


def test_a_net_that_no_engine_runs_is_said_to_be_so(net, capsys, caplog):
    assert cli.main(["time", net, "--threads", "1", "--backends", "torch_channels_last"]) == 0
    assert "torch_channels_last left out: the net has no Conv2d" in caplog.text
    assert "no engine that was asked for runs this net here" in capsys.readouterr().out


def test_a_file_that_says_little_is_timed_and_one_that_says_nonsense_is_refused(net, tmp_path, capsys):
    sparse = tiny.sparse_net("lenet300100")
    pruning.save_net(tmp_path / "little.npz", sparse, {"model": "lenet300100", "num_classes": 10})
    little = ["--batch-sizes", "1", "--threads", "1", "--backends", "torch_dense"]
    assert cli.main(["time", str(tmp_path / "little.npz"), *little]) == 0
    pruning.save_net(tmp_path / "wrong.npz", sparse, MADE_FROM | {"seed": "many"})
    capsys.readouterr()
    assert "wrong.npz: seed: " in one_line_error(["time", str(tmp_path / "wrong.npz"), *little], capsys)


def test_a_net_that_is_not_shipped_is_named(capsys):
    assert "'no-such-net'" in one_line_error(["time", "no-such-net"], capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["NET", "--spec", "{}"], "argument --spec: not allowed with argument net"),
        ([], "one of the arguments net --spec is required"),
        (["NET", "--backends", "tensorrt"], "invalid choice: 'tensorrt'"),
    ],
)
def test_a_net_and_a_spec_exclude_each_other(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["time", *arguments])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_flags_of_one_way_are_refused_in_the_other(net, tmp_path, capsys):
    assert "--suite: goes with --spec alone" in one_line_error(["time", net, "--suite", "s"], capsys)
    assert "--pruned: goes with --spec alone" in one_line_error(["time", net, "--pruned", net], capsys)
    spec = ["time", "--pruned", net, "--spec", tiny.spec("dense").model_dump_json(exclude_none=True)]
    assert "--spec: needs --suite and --output" in one_line_error(spec, capsys)
    job = [*spec, "--suite", "s", "--output", str(tmp_path / "run")]
    assert "--threads: goes with a net alone" in one_line_error([*job, "--threads", "1"], capsys)
