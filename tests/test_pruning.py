"""Pruning: the file, the record and the trade-off all describe one and the same net."""

import json

import numpy as np
import pytest
import tiny
import torch

from vdbench import metrics, netfile, pruning, records, training
from vdbench.netfile import NetFileError
from vdbench.variational import VariationalDropout, variational_layers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["lenet300100", "lenet5"])
def run(request, data, tmp_path_factory):
    """A variational run, trained and pruned beside its dense control: spec, folder, trained model, prune record."""
    folder = tmp_path_factory.mktemp(request.param)
    dense, spec = tiny.spec("dense", request.param), tiny.spec("vd_warmup", request.param, threshold=2.0)
    for each, place in ((dense, folder / "dense"), (spec, folder)):
        tiny.train(each, place, data)
    prune(dense, folder / "dense", data)
    record = prune(spec, folder, data, control=folder / "dense" / "prune.json")
    return spec, folder, trained(spec, folder), record


def prune(spec, folder, data, **inputs):
    return pruning.prune(spec, suite="tiny", output=folder, data=data, weights=folder / "weights.pt", **inputs)


def trained(spec, folder):
    model = training.build_model(spec, 10, None)
    model.load_state_dict(tiny.weights(folder))
    return model.eval()


def test_some_weights_go_and_some_stay(run):
    *_, record = run
    assert 0.05 < record.size.sparsity < 0.95  # else the other tests say little


def test_file_holds_the_net_that_eval_mode_computes(run, data):
    _, folder, model, record = run
    net, _ = pruning.load_net(folder / "pruned.npz")
    assert not any(isinstance(module, VariationalDropout) for module in net.modules())
    assert not net.training
    with torch.no_grad():
        assert torch.equal(net(data.eval_images), model(data.eval_images))
    assert metrics.evaluate(net, data.eval_images, data.eval_labels) == record.metrics
    for name, weight in metrics.weights(net).items():
        assert torch.equal(weight, metrics.weights(model)[name])


def test_file_says_which_run_it_is_of(run):
    spec, folder, _, record = run
    _, meta = netfile.read_arrays(folder / "pruned.npz")
    assert meta == {
        "model": spec.model,
        "num_classes": 10,
        "dataset": "digits",
        "method": "vd_warmup",
        "seed": 0,
        "spec_sha256": record.spec_sha256,
    }


def test_record_counts_what_the_file_holds(run):
    _, folder, _, record = run
    assert records.read(folder / "prune.json") == record
    arrays, _ = netfile.read_arrays(folder / "pruned.npz")
    nonzero = {name: np.count_nonzero(array) for name, array in arrays.items()}
    for layer in record.layers:
        assert layer.nonzero == nonzero[f"{layer.name}.weight"]
    assert record.size.nonzero_weights == sum(n for name, n in nonzero.items() if name.endswith(".weight"))
    assert record.size.compression_ratio == record.size.weights / record.size.nonzero_weights
    assert record.size.file_bytes == (folder / "pruned.npz").stat().st_size
    assert (record.stage, record.status, record.threshold) == ("prune", "ok", 2.0)


def test_mask_is_log_alpha_below_the_threshold(run):
    _, folder, model, _ = run
    arrays, _ = netfile.read_arrays(folder / "pruned.npz")
    for name, layer in variational_layers(model):
        weight, log_sigma2 = layer.weight.detach().double(), layer.log_sigma2.detach().double()
        log_alpha = log_sigma2 - torch.log(weight**2 + 1e-8)
        surely_kept, surely_gone = log_alpha < 2.0 - 1e-4, log_alpha > 2.0 + 1e-4
        kept = torch.from_numpy(arrays[f"{name}.weight"]) != 0
        assert kept[surely_kept].all()
        assert not kept[surely_gone].any()


def test_control_is_the_dense_run(run):
    _, folder, _, record = run
    dense = records.read(folder / "dense" / "prune.json")
    assert record.control.error == dense.metrics["error"]
    assert record.control.weights_sha256 == dense.weights_sha256
    assert dense.control is None


def test_dense_run_is_evaluated_and_nothing_is_removed(run):
    _, folder, *_ = run
    record = records.read(folder / "dense" / "prune.json")
    assert (record.size.sparsity, record.size.compression_ratio) == (0, 1)
    assert (record.curve, record.log_alpha_histogram) == ([], [])
    net, _ = pruning.load_net(folder / "dense" / "pruned.npz")
    for name, value in tiny.weights(folder / "dense").items():
        assert torch.equal(net.state_dict()[name], value)


def test_pruning_again_gives_the_same_bytes(run, data):
    spec, folder, _, record = run
    before = (folder / "pruned.npz").read_bytes()
    again = prune(spec, folder, data, control=folder / "dense" / "prune.json")
    assert (folder / "pruned.npz").read_bytes() == before
    assert (again.metrics, again.weights_sha256) == (record.metrics, record.weights_sha256)


# --- trade-off and histograms


def test_trade_off_removes_less_at_higher_thresholds(run):
    *_, record = run
    curve = record.curve
    assert len(curve) >= 5
    assert [point.threshold for point in curve] == sorted({point.threshold for point in curve})
    sparsities = [point.sparsity for point in curve]
    assert sparsities == sorted(sparsities, reverse=True)
    assert sparsities[0] > sparsities[-1]


def test_trade_off_at_the_threshold_is_the_record(run):
    *_, record = run
    (point,) = [point for point in record.curve if point.threshold == record.threshold]
    assert (point.error, point.sparsity) == (record.metrics["error"], record.size.sparsity)
    assert point.compression_ratio == record.size.compression_ratio


@pytest.mark.parametrize("training_mode", [True, False])
def test_trade_off_leaves_the_net_as_it_was(run, data, training_mode):
    _, _, model, _ = run
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(training_mode)
    _, first = next(variational_layers(model))
    first.loga_threshold = 0.5  # layers may have thresholds of their own
    pruning.trade_off(model, data)
    assert [layer.loga_threshold for _, layer in variational_layers(model)][:2] == [0.5, 2.0]
    assert all(module.training == training_mode for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    first.loga_threshold = 2.0
    model.eval()


def test_histograms_count_every_weight_on_its_side_of_the_threshold(run):
    *_, record = run
    first_removed = (2 + 8) * 4  # of 64 bins over [-8, 8]
    for layer, histogram in zip(record.layers, record.log_alpha_histogram, strict=True):
        assert layer.name == histogram.name
        assert len(histogram.counts) == 64
        assert sum(histogram.counts) == layer.total
        assert sum(histogram.counts[first_removed:]) == pytest.approx(layer.total - layer.nonzero, abs=3)


# --- inputs


def test_untrained_run_is_refused(data, tmp_path):
    with pytest.raises(records.RecordError, match=r"train\.json: no such record"):
        prune(tiny.spec("dense"), tmp_path, data)


def test_missing_weights_are_refused(run, data, tmp_path):
    spec, folder, *_ = run
    (tmp_path / "train.json").write_bytes((folder / "train.json").read_bytes())
    with pytest.raises(records.RecordError, match=r"weights\.pt: no such weights"):
        prune(spec, tmp_path, data)


def test_weights_of_another_run_are_refused(run, data, tmp_path):
    spec, folder, *_ = run
    with pytest.raises(records.RecordError):
        pruning.prune(
            tiny.spec("vd_warmup", spec.model, threshold=2.0, seed=7),
            suite="tiny",
            output=tmp_path,
            data=data,
            weights=folder / "weights.pt",
        )


def edited(source, target, key, value):
    """A copy of a net's file with one part replaced; of meta when the key is one of its."""
    with np.load(source) as archive:
        content = dict(archive)
    meta = json.loads(content["meta"].tobytes())
    if key in content:
        content[key] = value
    else:
        meta[key] = value
    content["meta"] = np.frombuffer(json.dumps({k: v for k, v in meta.items() if v is not None}).encode(), np.uint8)
    np.savez(target, **content)
    return target


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "lenet7"),
        ("model", None),
        ("model", ["lenet5"]),
        ("num_classes", 7),
        ("num_classes", None),
        ("num_classes", "ten"),
        ("fc2.bias", np.zeros(3, np.float32)),
        ("fc2.bias", np.array(["x"] * 10)),
    ],
)
def test_file_that_does_not_fit_its_model_is_refused(run, key, value, tmp_path):
    _, folder, *_ = run
    path = edited(folder / "pruned.npz", tmp_path / "net.npz", key, value)
    with pytest.raises(NetFileError, match=r"net\.npz.*wrote it, rerun (that|what did)"):
        pruning.load_net(path)
