"""What the project ships of its own runs: tables that follow from the records, and nets that are what they say."""

import re
from pathlib import Path

import pytest
import torch
from benchmarks import reached, table

from vdbench import cli, costs, current, data, metrics, netfile, pages, records, shipping, tables
from vdbench.config import BASELINE_METHODS, load_suite
from vdbench.pruning import load_net
from vdbench.sparse import SparseModule, to_cpu_sparse

ROOT = Path(__file__).parent.parent
SUITE_FILE = ROOT / "configs" / "paper.yaml"
RECORDED = ROOT / "results" / "recorded" / "paper"

pytestmark = pytest.mark.skipif(not RECORDED.is_dir(), reason="nothing recorded yet")


@pytest.fixture(scope="module")
def found():
    return current.load(RECORDED, load_suite(SUITE_FILE))[0]


SUITES = sorted(path.parent.name for path in RECORDED.parent.glob("*/tables"))


@pytest.mark.parametrize("suite", SUITES)
def test_no_recorded_run_is_stale(suite):
    found, notes = current.load(RECORDED.parent / suite, load_suite(ROOT / "configs" / f"{suite}.yaml"))
    assert found
    assert [note for note in notes if note.startswith("stale")] == []


def test_tables_follow_from_the_records(tmp_path, capsys):
    assert cli.main(["table", str(SUITE_FILE), "--recorded", str(RECORDED), "--output", str(tmp_path)]) == 0
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in (RECORDED / "tables").iterdir()}


def test_readme_shows_the_recorded_table(found):
    shown = re.search(r"<!-- results.*?-->\n+```\n(.*?)```\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown
    assert shown[1] == tables.render_text(load_suite(SUITE_FILE), {"recorded": found}, {})


def test_readme_shows_the_recorded_speeds():
    shown = re.search(r"<!-- speeds.*?-->\n+```\n(.*?)```\n", (ROOT / "README.md").read_text(), re.DOTALL)
    parts = []
    for file, names in (
        ("inference.yaml", ["vgglike"]),
        ("cifar.yaml", ["vgglike-k100"]),
        ("ptb.yaml", ["lstm200-ptb-more-divergence", "tanh200-ptb-log-alpha-1"]),
    ):
        suite = load_suite(ROOT / "configs" / file)
        timed = current.load(RECORDED.parent / suite.suite, suite)[0]
        parts += [tables.speeds(suite, {"recorded": timed}, name) for name in names]
    assert shown
    assert shown[1] == "\n\n".join(parts) + "\n"


def test_the_page_on_training_shows_the_recorded_steps():
    assert pages.shown(table.PAGE.read_text(encoding="utf-8"), "steps") == table.recorded() != ""


def test_the_page_on_the_engine_shows_what_is_reached():
    assert pages.shown(reached.PAGE.read_text(encoding="utf-8"), "reached") == reached.render() != ""


def test_the_page_on_clusters_shows_what_the_recorded_runs_took():
    page = (ROOT / costs.PAGE).read_text(encoding="utf-8")
    assert pages.shown(page, "costs") == costs.render(ROOT) != ""


def test_shipped_nets_have_the_weights_that_their_records_count(found):
    pruned = [r for r in found if r.stage == "prune" and r.method != "dense"]
    assert pruned
    for record in pruned:
        path = records.run_folder(RECORDED, *record.run) / "pruned.npz"
        model, meta = load_net(path)
        assert meta["spec_sha256"] == record.spec_sha256
        size = metrics.size(model)
        assert record.size is not None
        assert (size.nonzero_weights, path.stat().st_size) == (record.size.nonzero_weights, record.size.file_bytes)


def test_every_run_came_from_the_recorded_nets_it_is_compared_with(found):
    trained, pruned = ({r.run: r for r in found if r.stage == stage} for stage in ("train", "prune"))
    matched_by = {name: e.match for name, e in load_suite(SUITE_FILE).experiments.items()}
    followers = [r for r in trained.values() if r.method in ("vd_finetune", *BASELINE_METHODS)]
    assert followers
    for train in followers:
        prune, inputs = pruned[train.run], {"pretrained": trained[train.experiment, "dense", train.seed].weights_sha256}
        assert prune.control is not None
        assert prune.control.weights_sha256 == inputs["pretrained"]
        if train.method in BASELINE_METHODS:
            matched = pruned[train.experiment, matched_by[train.experiment], train.seed]
            inputs["matched"] = matched.weights_sha256
            assert [x.nonzero for x in prune.layers] == [x.nonzero for x in matched.layers]
        assert train.inputs in ({}, inputs)  # records once did not name them


@pytest.mark.parametrize("suite", SUITES)
def test_nets_of_explorations_are_not_shipped(suite):
    nets = (RECORDED.parent / suite).glob("*/*/*/pruned.npz")
    assert [net for net in nets if records.read(net.with_name("prune.json")).spec["validation_size"]] == []


@pytest.mark.parametrize("suite", SUITES)
def test_recorded_set_is_small(suite):
    kept = [path for path in (RECORDED.parent / suite).rglob("*") if path.is_file() and path.suffix != ".svg"]
    assert sum(path.stat().st_size for path in kept) < 5_000_000


@pytest.mark.real_data
def test_shipped_nets_agree_with_their_records_to_the_last_digit(capsys):
    if data.available("mnist") == "to download":
        pytest.skip("MNIST is neither in the cache nor in VDBENCH_MIRROR")
    assert cli.main(["verify", str(RECORDED)]) == 0, capsys.readouterr().out


def test_a_shipped_net_loads_by_name(found):
    record = next(r for r in found if r.stage == "prune" and r.method == "vd_warmup")
    name = f"{record.experiment}-{record.method}-seed{record.seed}"
    dense, sparse = shipping.load(name), shipping.load(name, sparse=True)
    arrays, _ = netfile.read_arrays(records.run_folder(RECORDED, *record.run) / "pruned.npz")
    assert metrics.size(dense).nonzero_weights == sum((a != 0).sum() for n, a in arrays.items() if n.endswith("weight"))
    assert isinstance(sparse, SparseModule)


@torch.no_grad()
def test_shipped_language_models_read_on_sparse_as_dense():
    words = torch.randint(10_000, (6, 2), generator=torch.Generator().manual_seed(0))
    for path in (RECORDED.parent / "ptb").glob("*/*/*/pruned.npz"):
        model = load_net(path)[0]
        fast, expected, state = to_cpu_sparse(model), model(words)[0], None
        tolerance = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
        torch.testing.assert_close(fast(words)[0], expected, **tolerance)
        for word, logits in zip(words, expected, strict=True):
            found, state = fast(word[None], state)
            torch.testing.assert_close(found[0], logits, **tolerance)
