"""Untrained nets in a suite file: the jobs that they are, what of them is refused, and what changes their specs."""

import copy
from typing import Any

import pytest

from vdbench.config import SuiteError, canonical, parse_case, parse_suite, spec_sha256
from vdbench.config_timing import LAYERS

SYNTHETIC = {
    "nets": {"net": {"model": "vgglike", "width": 0.5, "densities": dict.fromkeys(LAYERS["vgglike"], 0.1)}},
    "convolutions": {"conv": {"channels": 8, "size": 4, "densities": [1, 0.1], "seed": 3}},
    "linear": {"line": {"inputs": 8, "outputs": 4, "densities": [0.005], "batch_sizes": [2]}},
}


def synthetic(path: str = "", value: Any = None) -> dict[str, Any]:
    """A suite of untrained nets alone, changed at a path."""
    made = {"suite": "tiny", "synthetic": copy.deepcopy(SYNTHETIC)}
    if path:
        *folders, key = path.split("/")
        place: Any = made["synthetic"]
        for folder in folders:
            place = place[folder]
        place[key] = value
    return made


def test_untrained_nets_are_jobs_of_their_own():
    suite = parse_suite(synthetic(), "test")
    assert list(suite.jobs()) == [
        ("time", "net", "random_masks", 0),
        ("time", "conv", "density1", 3),
        ("time", "conv", "density0.1", 3),
        ("time", "line", "density0.005", 0),
    ]
    assert list(suite.runs()) == []
    for job in suite.jobs():
        spec = suite.spec_of(*job)
        assert canonical(parse_case(canonical(spec)).content()) == canonical(spec)
    assert suite.spec_of(*("time", "line", "density0.005", 0))["timing"]["batch_sizes"] == [2]


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("net", {}, "my.yaml: synthetic.net: unknown key"),
        ("convolutions/conv/chanels", 3, "my.yaml: synthetic.convolutions.conv.chanels: unknown key"),
        ("convolutions/conv/densities", [0.1, 0], r"my.yaml: synthetic.convolutions.conv.densities.1: "),
        ("convolutions/conv/densities", [0.1, 0.1], "densities: .* has duplicates"),
        ("convolutions/conv/densities", [], "my.yaml: synthetic.convolutions.conv.densities: "),
        ("convolutions/line", {"channels": 8, "size": 4, "densities": [1]}, "two cases have one name"),
        ("linear/line/batch_sizes", [], "my.yaml: synthetic.linear.line.batch_sizes: "),
        ("nets/net/model", "vgg", "my.yaml: synthetic.nets.net.model: "),
        ("nets/net/densities", {"conv1_1": 0.1}, "densities: the layers of vgglike are conv1_1, conv1_2, conv2_1"),
        ("nets/net", {"model": "lenet5", "width": 2, "densities": dict.fromkeys(LAYERS["lenet5"], 1)}, "width: lenet5"),
    ],
)
def test_untrained_nets_that_cannot_be_timed_are_refused_saying_why(path, value, expected):
    with pytest.raises(SuiteError, match=expected):
        parse_suite(synthetic(path, value), "my.yaml")


def test_a_density_changes_only_its_own_spec():
    before, after = (
        {job: spec_sha256(suite.spec_of(*job)) for job in suite.jobs()}
        for suite in (
            parse_suite(synthetic(), "test"),
            parse_suite(synthetic("convolutions/conv/densities", [1, 0.2]), "test"),
        )
    )
    assert set(before.items()) - set(after.items()) == {
        (("time", "conv", "density0.1", 3), before["time", "conv", "density0.1", 3])
    }
