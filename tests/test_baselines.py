"""Gradual pruning: the schedule, whose weights go, how many, and what the random control has in common with it."""

import pytest
import tiny
import torch
from torch import nn

from vdbench import baselines, metrics, records, training
from vdbench.baselines import GradualPruner, gradual_sparsity
from vdbench.config import GradualRecipe
from vdbench.models import LeNet5, LeNet300100

KEPT = {"fc1": 4000, "fc2": 900, "fc3": 300}


def net(kind: type[nn.Module] = LeNet300100) -> nn.Module:
    """The same at every call: among so many initial weights one is 0 by chance now and then, as if it were removed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


def pruner(model: nn.Module, how: str, kept: dict[str, int] = KEPT) -> GradualPruner:
    return GradualPruner(model, kept, torch.Generator().manual_seed(1) if how == "random" else None)


def drift(model: nn.Module) -> None:
    """Stands for the training between two updates of the masks."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0, 0), (0.25, 0.9 * (1 - 0.75**3)), (0.5, 0.9 * 0.875), (0.75, 0.9 * (1 - 0.25**3)), (1, 0.9), (7, 0.9), (-1, 0)],
)
def test_schedule_is_the_cubic_of_zhu_and_gupta(progress, expected):
    """Equation 1 of the paper with initial sparsity 0: s_f + (0 - s_f)(1 - progress)^3."""
    assert gradual_sparsity(0.9, progress) == pytest.approx(expected)


@pytest.mark.parametrize("how", ["magnitude", "random"])
def test_counts_follow_the_schedule_to_the_last_weight(how):
    model = net()
    pruning = pruner(model, how)
    for progress in (0, 0.1, 0.4, 0.9, 1.0, 1.3):
        drift(model)
        pruning.update(progress)
        for layer in metrics.layers(model):
            removed = gradual_sparsity(layer.total - KEPT[layer.name], progress)
            assert layer.total - layer.nonzero == round(removed)
    assert {layer.name: layer.nonzero for layer in metrics.layers(model)} == KEPT


@pytest.mark.parametrize("how", ["magnitude", "random"])
@pytest.mark.parametrize("kind", [LeNet300100, LeNet5])  # the second has another memory format
def test_removed_weight_never_returns(how, kind):
    model = net(kind)
    kept = {layer.name: layer.total // 20 for layer in metrics.layers(model)}
    pruning = pruner(model, how, kept)
    before = {name: weight != 0 for name, weight in metrics.weights(model).items()}
    for progress in (0.1, 0.3, 0.6, 1.0):
        drift(model)
        pruning.update(progress)
        for name, weight in metrics.weights(model).items():
            left = weight != 0
            assert not (left & ~before[name]).any()
            assert left.sum() < before[name].sum()
            before[name] = left


@pytest.mark.parametrize("kind", [LeNet300100, LeNet5])
def test_smallest_weights_go(kind):
    model = net(kind)
    kept = {layer.name: layer.total // 20 for layer in metrics.layers(model)}
    pruning = pruner(model, "magnitude", kept)
    for progress in (0.2, 0.5, 1.0):
        drift(model)
        pruning.apply()  # as after an optimizer step
        before = {name: weight.clone() for name, weight in metrics.weights(model).items()}
        pruning.update(progress)
        for name, weight in metrics.weights(model).items():
            gone = (before[name] != 0) & (weight == 0)
            assert gone.any()
            assert before[name][gone].abs().max() <= weight[weight != 0].abs().min()


def test_kept_weights_keep_their_values():
    model, untouched = net(), net()
    pruner(model, "magnitude").update(0.7)
    for name, weight in metrics.weights(model).items():
        original = metrics.weights(untouched)[name]
        assert torch.equal(weight, torch.where(weight == 0, 0, original))


def test_random_masks_have_the_same_counts_and_no_regard_for_magnitude():
    by_size, by_chance = net(), net()
    pruner(by_size, "magnitude").update(1.0)
    pruner(by_chance, "random").update(1.0)
    for name, total in ((layer.name, layer.total) for layer in metrics.layers(net())):
        chosen, drawn = metrics.weights(by_size)[name] != 0, metrics.weights(by_chance)[name] != 0
        assert chosen.sum() == drawn.sum() == KEPT[name]
        overlap = float((chosen & drawn).sum()) / KEPT[name]
        assert overlap == pytest.approx(KEPT[name] / total, abs=0.1)  # what chance gives


def test_random_masks_are_decided_by_their_generator():
    def masks(seed):
        pruning = GradualPruner(net(), KEPT, torch.Generator().manual_seed(seed))
        pruning.update(1.0)
        return torch.cat([mask.flatten() for mask in pruning.masks.values()])

    assert torch.equal(masks(1), masks(1))
    assert not torch.equal(masks(1), masks(2))


def test_apply_zeroes_what_an_optimizer_step_moved():
    model = net()
    pruning = pruner(model, "magnitude")
    pruning.update(1.0)
    drift(model)
    assert metrics.sparsity(model) < 0.5
    pruning.apply()
    assert {layer.name: layer.nonzero for layer in metrics.layers(model)} == KEPT


def test_layer_without_weights_left_is_emptied():
    model = net()
    pruner(model, "magnitude", KEPT | {"fc2": 0}).update(1.0)
    assert metrics.weights(model)["fc2"].count_nonzero() == 0


@pytest.mark.parametrize("kept", [{}, {"fc1": 1}, KEPT | {"conv1": 5}])
def test_other_layers_than_the_nets_are_refused(kept):
    with pytest.raises(ValueError, match=r"the net has layers \['fc1', 'fc2', 'fc3'\]"):
        pruner(net(), "magnitude", kept)


# --- whole runs


@pytest.fixture
def inputs(tmp_path):
    tiny.train(tiny.spec("dense"), tmp_path / "dense")
    return {"pretrained": tmp_path / "dense" / "weights.pt", "matched": tiny.matched(tmp_path / "matched.json")}


def left(folder) -> dict[str, int]:
    model = LeNet300100()
    model.load_state_dict(tiny.weights(folder))
    return {layer.name: layer.nonzero for layer in metrics.layers(model)}


@pytest.mark.usefixtures("one_thread")
def test_runs_end_with_the_counts_of_the_run_they_are_matched_to(inputs, tmp_path):
    expected = {layer.name: layer.nonzero for layer in records.read(inputs["matched"]).layers}
    for method in ("magnitude", "random"):
        tiny.train(tiny.spec(method), tmp_path / method, **inputs)
        assert left(tmp_path / method) == expected
    magnitude, chance = tiny.weights(tmp_path / "magnitude"), tiny.weights(tmp_path / "random")
    assert not torch.equal(magnitude["fc1.weight"] != 0, chance["fc1.weight"] != 0)


@pytest.mark.usefixtures("one_thread")
def test_a_record_names_the_weights_its_run_came_from(inputs, tmp_path):
    dense, matched = records.read(tmp_path / "dense" / "train.json"), records.read(inputs["matched"])
    started = {"pretrained": dense.weights_sha256}
    assert dense.inputs == {}
    assert tiny.train(tiny.spec("vd_finetune"), tmp_path / "vd", pretrained=inputs["pretrained"]).inputs == started
    started["matched"] = matched.weights_sha256
    assert tiny.train(tiny.spec("magnitude"), tmp_path / "magnitude", **inputs).inputs == started


def test_pruning_that_leaves_no_epoch_to_fine_tune_is_refused():
    with pytest.raises(ValueError, match=r"prune_epochs \(2\) leaves none of epochs \(2\)"):
        GradualRecipe(epochs=2, prune_epochs=2)


@pytest.mark.usefixtures("one_thread")
def test_run_prunes_along_the_schedule_then_only_trains(inputs, tmp_path, monkeypatch):
    progress = []
    real = GradualPruner.update

    def update(self, now):
        progress.append(now)
        real(self, now)

    monkeypatch.setattr(baselines.GradualPruner, "update", update)
    monkeypatch.setattr(training, "PRUNING_STEPS", 3)  # of the six steps of an epoch
    tiny.train(tiny.spec("magnitude", epochs=3, prune_epochs=2), tmp_path / "run", **inputs)
    assert progress == pytest.approx([0, 0.25, 0.5, 0.75, 1.0, 1.25])


@pytest.mark.usefixtures("one_thread")
def test_seed_decides_the_random_masks(inputs, tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny.train(tiny.spec("random", seed=seed), tmp_path / folder, **inputs)
    masks = {folder: tiny.weights(tmp_path / folder)["fc1.weight"] != 0 for folder in "abc"}
    assert torch.equal(masks["a"], masks["b"])
    assert not torch.equal(masks["a"], masks["c"])
