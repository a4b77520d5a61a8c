"""What a suite file may say, and what a run's spec says about it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from vdbench import config, stages, suite_keys
from vdbench.config import Methods, SuiteError, canonical, load_suite, parse_spec, parse_suite, spec_sha256

ROOT = Path(__file__).parent.parent
RECIPE = {"epochs": 2, "kl_zero_epochs": 1}


def content() -> dict[str, Any]:
    return {
        "suite": "tiny",
        "experiments": {
            "fc": {
                "dataset": "digits",
                "model": "lenet300100",
                "seeds": [0, 1],
                "timed": ["vd_warmup"],
                "methods": {
                    "dense": {"epochs": 3},
                    "vd_finetune": dict(RECIPE),
                    "vd_warmup": dict(RECIPE),
                    "magnitude": {"epochs": 2, "prune_epochs": 1},
                },
            }
        },
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(content())
    *folders, key = path.split("/")
    place = made
    for folder in folders:
        place = place[folder]
    place[key] = value
    return made


@pytest.mark.parametrize("name", ["paper", "smoke"])
def test_the_shipped_suites_are_valid_and_named_after_their_file(name):
    suite = load_suite(ROOT / "configs" / f"{name}.yaml")
    assert suite.suite == name
    assert {method for _, method, _ in suite.runs()} == set(config.Methods.model_fields)


def test_configs_readme_lists_every_key_as_the_code_has_it():
    text = (ROOT / "configs/README.md").read_text(encoding="utf-8")
    assert text == suite_keys.describe(), "python -m vdbench.suite_keys > configs/README.md"


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("sute", "x", "sute"),
        ("experiments/fc/treshold", 3, "experiments.fc.treshold"),
        ("experiments/fc/methods/vd_warmup/kl_warmup_epoch", 3, "experiments.fc.methods.vd_warmup.kl_warmup_epoch"),
        ("experiments/fc/methods/dense/kl_zero_epochs", 3, "experiments.fc.methods.dense.kl_zero_epochs"),
        ("experiments/fc/methods/svd", {"epochs": 1}, "experiments.fc.methods.svd"),
        ("timing", {"batches": [1]}, "timing.batches"),
    ],
)
def test_an_unknown_key_is_refused_by_name(path, value, key):
    with pytest.raises(SuiteError, match="unknown key") as caught:
        parse_suite(changed(path, value), "my.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"my.yaml: {key}: ")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("suite", "recorded", "take another name"),
        ("experiments/fc/seeds", [-1], "experiments.fc.seeds"),
        ("experiments/fc/seeds_of", {"vd_warmup": []}, "experiments.fc.seeds_of.vd_warmup"),
        ("experiments/fc/timed", ["vd_warmup", "vd_warmup"], "timed: .* has duplicates"),
        ("experiments/fc/methods/magnitude", {"epochs": 3, "prune_epochs": 1}, "magnitude has 3 epochs, vd_finetune"),
    ],
)
def test_what_could_only_fail_later_is_refused_at_once(path, value, message):
    with pytest.raises(SuiteError, match=message):
        parse_suite(changed(path, value), "my.yaml")


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(yaml.safe_dump(content()) + "suite: other\n")
    with pytest.raises(SuiteError, match="the key 'suite' is given twice"):
        load_suite(path)


def test_merged_keys_may_be_overridden():
    suite = load_suite(ROOT / "configs" / "explore_lenet.yaml")
    recipes = [experiment.methods.vd_warmup for experiment in suite.experiments.values()]
    assert [recipe.epochs for recipe in recipes if recipe] == [200, 120]
    assert {experiment.validation_size for experiment in suite.experiments.values()} == {10_000}


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("suite", "no spaces", "my.yaml: suite: "),
        ("experiments/fc/model", "lenet", "my.yaml: experiments.fc.model: "),
        ("experiments/fc/dataset", "cifar", "my.yaml: experiments.fc.dataset: "),
        ("experiments/fc/seeds", [], "my.yaml: experiments.fc.seeds: "),
        ("experiments/fc/seeds", [1, 1], "duplicates"),
        ("experiments/fc/threshold", 9, "my.yaml: experiments.fc.threshold: "),
        (
            "experiments/fc/dataset",
            "folder:cats",
            "model: lenet300100 is not for folder:cats: LeNets are for digits, the rest for images in colour",
        ),
        ("experiments/fc/methods/vd_finetune/initial_log_sigma2", float("inf"), "initial_log_sigma2: "),
        ("experiments/fc/methods/dense/learning_rate", float("nan"), "learning_rate: "),
        (
            "experiments/fc/methods/vd_finetune/kl_zero_epochs",
            10**6,
            "kl_zero_epochs .1000000. leaves none of epochs .2. with",
        ),
        (
            "experiments/fc/methods/vd_finetune/kl_warmup_epochs",
            5,
            "kl_zero_epochs .1. leaves none of epochs .2. with a KL weight; the first of kl_warmup_epochs has none",
        ),
        ("experiments/fc/dataset", "ptb", "model: lenet300100 is not for ptb: language models are for texts"),
        ("experiments/fc/model", "rnnlm_lstm", "model: rnnlm_lstm is not for"),
        ("experiments/fc/model", "vgglike_k025", "model: vgglike_k025 is not for .*: LeNets are for digits"),
        ("experiments/fc/dataset", "cifar10", "model: lenet300100 is not for cifar10: LeNets are for digits"),
        ("experiments/fc/timed", ["random"], "timed: random is not among"),
        ("experiments/fc/seeds_of", {"dense": [5]}, r"seeds_of dense: \[5\] not among seeds"),
        ("experiments/fc/seeds_of", {"dense": [0]}, "vd_finetune runs seeds \\[1\\] that dense"),
        ("experiments/fc/methods/dense/epochs", 0, "my.yaml: experiments.fc.methods.dense.epochs: "),
        ("experiments/fc/methods/dense/constant_epochs", 4, r"constant_epochs \(4\) exceeds epochs \(3\)"),
        ("experiments/fc/methods/magnitude/prune_epochs", 5, r"prune_epochs \(5\) leaves none of epochs \(2\)"),
        ("experiments/fc/methods/vd_finetune", None, "magnitude needs vd_finetune"),
        ("experiments/fc/methods/dense/sequence_length", 9, "dense: sequence_length is of texts, and digits is none"),
        ("experiments/fc/methods/dense/dropout", 0.5, "dense: dropout: lenet300100 has no dropout layers"),
        ("experiments/fc/methods/dense/learning_rate", True, "learning_rate: neither true nor false"),
        ("experiments/fc/validation_size", True, "validation_size: neither true nor false"),
        ("experiments/fc/seeds", [False, 1], "seeds: neither true nor false"),
        ("experiments", {}, "my.yaml: experiments: "),
    ],
)
def test_what_cannot_be_run_is_refused_saying_why(path, value, expected):
    with pytest.raises(SuiteError, match=expected):
        parse_suite(changed(path, value), "my.yaml")


def test_files_that_are_no_suite_are_refused_naming_the_file(tmp_path):
    with pytest.raises(SuiteError, match=r"nowhere\.yaml: no such suite file"):
        load_suite(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("suite: [")
    with pytest.raises(SuiteError, match=r"broken\.yaml: cannot be read as YAML"):
        load_suite(broken)
    broken.write_text("# nothing but a comment\n")
    with pytest.raises(SuiteError, match=r"broken\.yaml: is empty"):
        load_suite(broken)
    broken.write_text("- just a list")
    with pytest.raises(SuiteError, match=r"broken\.yaml: top level"):
        load_suite(broken)


def test_a_suite_has_something_to_run_and_one_name_for_each():
    with pytest.raises(SuiteError, match="neither experiments nor synthetic"):
        parse_suite({"suite": "tiny"}, "my.yaml")
    both = content() | {"synthetic": {"linear": {"fc": {"inputs": 8, "outputs": 4, "densities": [1]}}}}
    with pytest.raises(SuiteError, match="fc: an experiment has this name"):
        parse_suite(both, "my.yaml")


@pytest.mark.parametrize(
    ("right", "wrong", "suggested"),
    [
        ("experiments/fc/seeds", "seed", "did you mean seeds?"),
        ("experiments/fc/methods/dense", "danse", "did you mean dense?"),
        ("experiments/fc/methods/dense/epochs", "epoch", "did you mean epochs?"),
        ("experiments/fc/methods/vd_finetune/kl_zero_epochs", "kl_zero_epoch", "did you mean kl_zero_epochs?"),
        ("experiments/fc/methods/dense/epochs", "passes", "configs/README.md lists every key"),
    ],
)
def test_an_unknown_key_comes_first_with_the_one_that_was_meant(right, wrong, suggested):
    *place, name = right.split("/")
    mistyped = content()
    section = mistyped
    for part in place:
        section = section[part]
    section[wrong] = section.pop(name)
    with pytest.raises(SuiteError) as caught:
        parse_suite(mistyped, "my.yaml")
    assert str(caught.value).splitlines()[0] == f"my.yaml: {'.'.join([*place, wrong])}: unknown key; {suggested}"


@pytest.mark.parametrize("stage", ["train", "time"])
def test_a_job_reads_back_exactly_the_spec_it_was_given(stage):
    suite = parse_suite(content(), "test")
    for run in suite.runs():
        spec = suite.spec_of(stage, *run)
        assert canonical(parse_spec(canonical(spec)).content()) == canonical(spec)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_jobs_are_told_of_every_run_of_every_suite(path):
    suite = load_suite(path)
    for run in suite.runs():
        spec = suite.spec_of("train", *run)
        assert canonical(parse_spec(canonical(spec)).content()) == canonical(spec)


def test_a_spec_with_an_unknown_key_is_refused():
    with pytest.raises(SuiteError, match="--spec: epoch"):
        parse_spec('{"epoch": 1}')
    with pytest.raises(SuiteError, match="--spec"):
        parse_spec("not JSON")


def test_a_recipe_belongs_to_its_method():
    suite = parse_suite(content(), "test")
    kinds = {
        method: type(parse_spec(canonical(suite.run_spec("fc", method, 0))).recipe) for _, method, _ in suite.runs()
    }
    assert kinds == {
        "dense": config.DenseRecipe,
        "vd_finetune": config.VariationalRecipe,
        "vd_warmup": config.VariationalRecipe,
        "magnitude": config.GradualRecipe,
    }


def hashes(suite: config.Suite) -> dict[tuple[str, str, int], str]:
    return {run: spec_sha256(suite.run_spec(*run)) for run in suite.runs()}


def test_specs_change_with_what_a_run_stands_on_and_with_nothing_else():
    before = hashes(parse_suite(content(), "test"))
    after = hashes(parse_suite(changed("experiments/fc/methods/dense/epochs", 4), "test"))
    same = {method for (_, method, seed), value in after.items() if value == before["fc", method, seed]}
    assert same == {"vd_warmup"}

    more = hashes(parse_suite(changed("experiments/fc/seeds", [0, 1, 2]), "test"))
    assert before.items() <= more.items()

    described = hashes(parse_suite(changed("description", "something else"), "test"))
    assert described == before


def test_comments_and_the_order_of_keys_do_not_matter(tmp_path):
    plain, other = tmp_path / "plain.yaml", tmp_path / "other.yaml"
    plain.write_text(yaml.safe_dump(content(), sort_keys=True))
    other.write_text("# a comment\n" + yaml.safe_dump(content(), sort_keys=False))
    assert hashes(load_suite(plain)) == hashes(load_suite(other))


def test_runs_come_after_those_they_start_from():
    suite = parse_suite(content(), "test")
    order = list(suite.runs())
    for name, method, seed in order:
        for needed in suite.experiments[name].prerequisites(method):
            assert order.index((name, needed, seed)) < order.index((name, method, seed))


def test_a_stage_stands_on_those_before_it(monkeypatch):
    for method in ("dense", "magnitude"):
        before = {stage: stages.stage_versions(stage, method) for stage in stages.UPSTREAM}
        monkeypatch.setitem(stages.STAGE_VERSIONS, "train", stages.STAGE_VERSIONS["train"] + 1)
        raised = {stage for stage in before if stages.stage_versions(stage, method) != before[stage]}
        assert raised == {"train", "prune", "time"}


def test_a_baseline_is_trained_on_what_pruning_left_of_the_run_it_is_matched_to(monkeypatch):
    before = {method: stages.stage_versions("train", method) for method in Methods.model_fields}
    monkeypatch.setitem(stages.STAGE_VERSIONS, "prune", stages.STAGE_VERSIONS["prune"] + 1)
    raised = {method for method in before if stages.stage_versions("train", method) != before[method]}
    assert raised == {"magnitude", "random"}


def test_of_many_mistakes_the_first_are_listed_and_the_rest_counted():
    with pytest.raises(SuiteError) as caught:
        parse_suite(content() | {f"wrong{number}": 1 for number in range(33)}, "my.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 31 and lines[-1] == "my.yaml: and 3 more mistakes"
