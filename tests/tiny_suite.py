"""A suite of one small net, its jobs done through the command line."""

import json
from pathlib import Path

import yaml

from vdbench import cli, config, records

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


def one_line_error(arguments, capsys) -> str:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vdbench: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
