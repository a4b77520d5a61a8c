"""The VGG-like net: what is trained of it, on what, and that it can be sparsified."""

from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from vdbench import history, metrics, outputs, posterior, pruning, records, training
from vdbench.config import VGG_WIDTHS, SuiteError, parse_suite
from vdbench.data import Dataset
from vdbench.images import Normalisation
from vdbench.models import MODELS, VGGLike
from vdbench.training import build_model
from vdbench.variational import variational_layers


def toy(train: int = 300, evaluation: int = 100) -> Dataset:
    """Ten patterns of coloured squares in noise, as bytes."""
    generator = torch.Generator().manual_seed(5)
    patterns = torch.randint(0, 256, (10, 3, 4, 4), generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    labels = torch.randint(10, (train + evaluation,), generator=generator)
    noise = torch.randint(0, 256, (len(labels), 3, 32, 32), generator=generator)
    pixels = ((3 * patterns[labels] + noise) // 4).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    normalisation = Normalisation.of(pixels[:train])
    evaluated = normalisation(pixels[train:])
    return Dataset("cifar10", pixels[:train], labels[:train], evaluated, labels[train:], 10, normalisation)


@pytest.fixture
def small_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrowest net under the name of the narrowest: 4 to 32 filters."""
    monkeypatch.setitem(MODELS, "vgglike_k025", partial(VGGLike, width=1 / 16))


def spec(method: str, **recipe):
    made = tiny.spec(method, "vgglike_k025", batch_size=50, **recipe)
    return made.model_copy(update={"dataset": "cifar10", "augment": True})


@pytest.mark.parametrize("model", VGG_WIDTHS)
def test_width_is_what_the_name_says(model: str) -> None:
    with torch.device("meta"):
        net = MODELS[model](10)
    width = int(model[-3:]) / 100
    assert net.conv1_1.weight.shape == (64 * width, 3, 3, 3) and net.fc2.weight.shape == (10, 512 * width)
    assert outputs.MODELS[model] == f"VGG-like, k = {width:g}"


def test_parameters_are_as_many_as_the_papers() -> None:
    """In millions, read off the paper's figure: 0.94, 3.75, 14.98, 33.7."""
    with torch.device("meta"):
        counts = [sum(m.weight.numel() for m in MODELS[name](10).modules() if isinstance(m, nn.Conv2d | nn.Linear))
                  for name in VGG_WIDTHS]  # fmt: skip
    assert [round(count / 1e6, 2) for count in counts] == [0.94, 3.75, 14.98, 33.69]


def test_ordinary_dropout_is_for_the_dense_net_alone(small_vgg: None) -> None:
    for method, expected in (("dense", {0.3, 0.4, 0.5}), ("magnitude", {0.3, 0.4, 0.5}), ("vd_finetune", {0.0})):
        net = build_model(spec(method), 10, pretrained=None)
        assert {module.p for module in net.modules() if isinstance(module, nn.Dropout)} == expected
        assert len(list(variational_layers(net))) == (15 if method == "vd_finetune" else 0)


def test_small_net_learns_and_sparsifies_and_its_pruned_net_is_the_same(small_vgg: None, tmp_path: Path) -> None:
    data = toy(1600, 100)
    rates = {"learning_rate": 3e-3, "log_sigma2_learning_rate": 0.03, "initial_log_sigma2": -8.0}
    wanted = spec("vd_warmup", epochs=5, constant_epochs=5, kl_zero_epochs=2, kl_warmup_epochs=8, **rates)
    wanted = wanted.model_copy(update={"augment": None})
    trained = tiny.train(wanted, tmp_path, data)
    record = pruning.prune(wanted, suite="tiny", output=tmp_path, data=data, weights=tmp_path / "weights.pt")
    assert record.metrics["error"] == trained.metrics["error"] < 10
    averages = history.read(tmp_path / "history.csv")["error_running_averages"]
    assert trained.metrics["error_running_averages"] == pytest.approx(averages.iloc[-1], rel=1e-5)
    assert record.size and record.size.compression_ratio > 3
    at_threshold = next(point for point in record.curve if point.threshold == 3.0)
    assert at_threshold.error == record.metrics["error"]
    net, _ = pruning.load_net(tmp_path / "pruned.npz")
    assert metrics.evaluate(net, data.eval_images, data.eval_labels) == record.metrics


@pytest.mark.parametrize("method", ["dense", "vd_warmup"])
def test_resumed_run_sees_the_images_an_undisturbed_one_sees(
    method: str, small_vgg: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    data, wanted = toy(150, 50), spec(method, epochs=4)
    tiny.train(wanted, tmp_path / "undisturbed", data)
    taken, real_step = [], torch.optim.Adam.step

    def step(self: torch.optim.Adam) -> None:
        if len(taken) == 8:  # in the third epoch of three steps each
            raise KeyboardInterrupt
        taken.append(real_step(self))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch.optim.Adam, "step", step)
        tiny.train(wanted, tmp_path / "disturbed", data)
    assert (tmp_path / "disturbed" / "resume.pt").exists()
    tiny.train(wanted, tmp_path / "disturbed", data)
    ours, theirs = (records.read(tmp_path / name / "train.json") for name in ("disturbed", "undisturbed"))
    assert ours.weights_sha256 == theirs.weights_sha256


def test_variance_in_bfloat16_is_that_in_float64_within_stated_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a convolution of the net: every value within 1 %, their mean within 0.1 %."""
    monkeypatch.setattr(posterior, "_HAS_BFLOAT16", True)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 64, 16, 16, generator=generator).relu()
    log_sigma2 = torch.randn(64, 64, 3, 3, generator=generator) - 8
    exact = nn.functional.conv2d(inputs.double().square(), log_sigma2.double().exp(), padding=1)
    narrow = nn.functional.conv2d(*posterior.narrow(inputs.square(), log_sigma2.exp()), padding=1)
    assert narrow.dtype == torch.bfloat16
    ratio = narrow.double() / exact
    assert (ratio - 1).abs().max() < 0.01 and abs(float(ratio.mean()) - 1) < 0.001


def test_every_epoch_and_seed_augments_in_its_own_way(small_vgg: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = Dataset.train_batch

    def batch(self: Dataset, indices: torch.Tensor, generator: torch.Generator | None = None):
        if generator is not None:
            seen.append(generator.get_state().sum().item())
        return real(self, indices, generator)

    monkeypatch.setattr(Dataset, "train_batch", batch)
    states = []
    for seed in (0, 0, 1):
        seen.clear()
        wanted = spec("dense", epochs=2).model_copy(update={"seed": seed})
        training._start(wanted, toy(100, 20), None, None, "cpu").run(lambda state: None, progress=False)
        states.append(list(seen))
    assert states[0] == states[1] != states[2] and len(set(states[0])) == 4


def test_augmentation_is_in_the_spec_only_where_it_is_asked_for() -> None:
    def suite(**keys):
        base = {"dataset": "cifar10_jpeg", "model": "vgglike_k025", "seeds": [0], "methods": {"dense": {"epochs": 1}}}
        return parse_suite({"suite": "s", "experiments": {"x": base | keys}}, "s.yaml")

    assert "augment" not in suite(augment=False).run_spec("x", "dense", 0)
    assert suite(augment=True).run_spec("x", "dense", 0)["augment"] is True
    with pytest.raises(SuiteError, match=r"experiments\.x: augment: the mirror image of a digit is none"):
        suite(dataset="mnist", model="lenet5", augment=True)
    with pytest.raises(SuiteError, match=r"no data set 'cifar11': there are mnist.* and text:NAME"):
        suite(dataset="cifar11")


def test_published_names_of_data_sets_are_never_those_of_the_lossy_one() -> None:
    assert outputs.DATASETS["cifar10_jpeg"] != outputs.DATASETS["cifar10"]
    assert len(set(outputs.DATASETS.values())) == len(outputs.DATASETS)
