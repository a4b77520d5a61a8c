"""Nets that are timed without having been trained: what is left of them, and the record they leave."""

import numpy as np
import pytest
import torch

from vdbench import cli, config, current, metrics, records, synthetic, timing
from vdbench.config import SuiteError, canonical, parse_case, parse_suite
from vdbench.config_timing import LAYERS, CaseSpec
from vdbench.models import VGGLike

pytestmark = pytest.mark.usefixtures("one_thread")

TIMING = {"batch_sizes": [1, 3], "threads": [1], "rounds": 2, "min_sample_s": 1e-6, "backends": ["torch_dense"]}
SUITE = {
    "suite": "tiny",
    "timing": TIMING,
    "synthetic": {
        "nets": {"net": {"model": "lenet300100", "densities": {"fc1": 0.01, "fc2": 0.1, "fc3": 1}}},
        "convolutions": {"conv": {"channels": 4, "size": 6, "densities": [0.5, 0.1]}},
        "linear": {"line": {"inputs": 30, "outputs": 20, "densities": [0.25], "batch_sizes": [7]}},
    },
}


def spec(name: str, method: str) -> CaseSpec:
    return parse_case(canonical(parse_suite(SUITE, "tiny").spec_of("time", name, method, 0)))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_the_net(name):
    arguments = {"width": 0.125} if name == "vgglike" else {}
    assert tuple(metrics.weights(synthetic.NETS[name](**arguments)[0])) == LAYERS[name]


@pytest.mark.parametrize(("width", "weights"), [(0.25, 937_392), (0.5, 3_746_144), (1, 14_977_728), (1.5, 33_694_752)])
def test_vgg_like_has_the_weights_of_the_paper(width, weights):
    with torch.device("meta"):
        assert sum(weight.numel() for weight in metrics.weights(VGGLike(width=width)).values()) == weights


def test_vgg_like_takes_an_image_and_drops_out_as_the_paper_does():
    net = VGGLike(num_classes=7, width=0.125)
    assert net.eval()(torch.zeros(2, *VGGLike.input_shape)).shape == (2, 7)
    rates = [module.p for module in net.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates == [0.3, *[0.4] * 7, 0.5]
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)} == {1e-3}


@pytest.mark.parametrize(
    ("name", "method", "shape", "left"),
    [
        ("net", "random_masks", (1, 28, 28), [2352, 3000, 1000]),
        ("conv", "density0.1", (4, 6, 6), [14]),
        ("line", "density0.25", (30,), [150]),
    ],
)
def test_the_stated_share_of_every_layer_is_left(name, method, shape, left):
    model, found = synthetic.build(spec(name, method))
    assert (found, [layer.nonzero for layer in metrics.layers(model)]) == (shape, left)
    assert not model.training


def test_a_seed_gives_a_net_and_another_seed_another():
    one = spec("conv", "density0.5")
    nets = [synthetic.build(one.model_copy(update={"seed": seed}))[0].state_dict() for seed in (0, 0, 1)]
    same = [all(torch.equal(nets[0][key], other[key]) for key in other) for other in nets[1:]]
    assert same == [True, False]


def test_an_image_does_not_fade_on_its_way_through_few_weights():
    densities = dict.fromkeys(LAYERS["vgglike"], 0.02)
    case = CaseSpec(
        experiment="x", model="vgglike", arguments={"width": 0.25}, densities=densities, method="m", seed=0,
        timing=parse_suite(SUITE, "tiny").timing,
    )  # fmt: skip
    model, shape = synthetic.build(case)
    with torch.no_grad():
        one, other = (model(torch.rand(1, *shape, generator=torch.Generator().manual_seed(s))) for s in (0, 1))
    assert float((one - other).abs().max()) > 1e-2 * float(one.abs().max())


def test_work_leaves_out_padding_and_zeros():
    layer = torch.nn.Conv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        layer.weight.zero_()[0, 0, 0, 0] = 1  # meets the image everywhere but in the first row and column
    net = torch.nn.Sequential(layer)
    assert metrics.work(net, torch.zeros(1, 1, 4, 5)) == records.Work(multiply_adds=3 * 4, values=40, weights=1)
    assert metrics.multiply_adds(net, torch.zeros(1, 1, 4, 5)).left == 20


def test_work_of_linear_layers_is_their_weights():
    net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
    assert metrics.work(net, torch.zeros(1, 6)) == records.Work(multiply_adds=32, values=16, weights=32)


def test_record_says_what_was_timed_and_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "calibrate", lambda: {"fma": 123.0})
    suite = parse_suite(SUITE, "tiny")
    folder = records.run_folder(tmp_path, "conv", "density0.1", 0)
    record = timing.time_inference(spec("conv", "density0.1"), suite="tiny", output=folder)
    assert current.find(tmp_path, suite, "time", "conv", "density0.1", 0) == (record, None)
    assert record.run == ("conv", "density0.1", 0) and (record.dataset, record.model) == ("random", "conv3x3")
    assert record.size is not None and record.size.nonzero_weights == 14
    assert record.limits == {"fma": 123.0}
    assert [(t.batch_size, t.threads) for t in record.timing] == [(1, 1), (3, 1)]
    assert record.spec["densities"] == {"layer": 0.1}


def test_batch_sizes_of_a_case_replace_those_of_the_suite(tmp_path):
    record = timing.time_inference(spec("line", "density0.25"), suite="tiny", output=tmp_path)
    assert [t.batch_size for t in record.timing] == [7]


def test_every_backend_agrees_on_an_untrained_net(tmp_path):
    one = spec("conv", "density0.1")
    backends = [name for name in timing.BACKENDS if name != "vdbench"]
    every = one.model_copy(update={"timing": one.timing.model_copy(update={"backends": backends, "batch_sizes": [2]})})
    record = timing.time_inference(every, suite="tiny", output=tmp_path)
    assert {t.backend for t in record.timing} | set(record.missing_backends) == set(backends)


def test_a_case_is_timed_from_the_command_line(tmp_path, capsys):
    text = canonical(parse_suite(SUITE, "tiny").spec_of("time", "conv", "density0.5", 0))
    assert cli.main(["time", "--suite", "tiny", "--spec", text, "--output", str(tmp_path)]) == 0
    assert records.read(tmp_path / "time.json").method == "density0.5"


def test_a_trained_net_needs_its_file(tmp_path, capsys):
    content = SUITE | {"experiments": {"fc": {"dataset": "digits", "model": "lenet300100", "seeds": [0],
                       "timed": ["dense"], "methods": {"dense": {"epochs": 1}}}}}  # fmt: skip
    text = canonical(parse_suite(content, "tiny").spec_of("time", "fc", "dense", 0))
    assert cli.main(["time", "--suite", "tiny", "--spec", text, "--output", str(tmp_path)]) == 2
    assert "--pruned" in capsys.readouterr().err
    with pytest.raises(SuiteError, match="--pruned"):
        timing.time_inference(config.parse_spec(text), suite="tiny", output=tmp_path)


def test_the_inference_suite_is_as_sparse_as_it_says():
    suite = config.load_suite(config.Path(__file__).parent.parent / "configs/inference.yaml")
    model, shape = synthetic.build(parse_case(canonical(suite.spec_of("time", "vgglike", "random_masks", 0))))
    convolutions = [layer for layer in metrics.layers(model) if len(layer.shape) == 4]
    left = sum(layer.nonzero for layer in convolutions) / sum(layer.total for layer in convolutions)
    work = metrics.multiply_adds(model, torch.zeros(1, *shape))
    assert round(100 * (1 - left), 2) == 99.38
    assert (round(work.dense / 1e6, 1), round(work.left / 1e6, 1)) == (313.5, 10.5)
    assert np.isfinite(work.theoretical_speedup)
