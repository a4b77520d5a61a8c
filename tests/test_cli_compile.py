"""`vdbench compile`: what runs how, and a file that computes the same."""

import re

import numpy as np
import pytest
import torch

from vdbench import CompiledNet, cli, pruning
from vdbench.models import MODELS, LeNet300100
from vdbench.netfile import NetFileError


@pytest.fixture
def net(tmp_path, monkeypatch):
    monkeypatch.setenv("VDBENCH_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = LeNet300100().eval()
    for layer in (model.fc1, model.fc2):
        layer.weight.data *= torch.rand_like(layer.weight) < 0.02
    path = tmp_path / "pruned.npz"
    pruning.save_net(path, model, {"model": "lenet300100", "num_classes": 10})
    return path, model


def test_compile(net, tmp_path, capsys):
    path, model = net
    kept = tmp_path / "compiled.npz"
    assert cli.main(["compile", str(path), "--output", str(kept), "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Linear+ReLU fc1" in shown and "one example" in shown and "compiled.npz" in shown
    assert re.search(r"compiled in \d+\.\d s\n", shown)
    images = np.random.default_rng(0).standard_normal((5, 1, 28, 28), np.float32)
    expected = model(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(CompiledNet.load(kept)(images), expected, rtol=0, atol=1e-5)
    assert cli.main(["compile", str(kept), "--threads", "1"]) == 0
    again = capsys.readouterr().out
    assert f"{kept}: compiled already" in again and "Linear+ReLU fc1" in again
    with pytest.raises(NetFileError, match=r"compiled\.npz: compiled already, which vdbench\.CompiledNet\.load reads"):
        pruning.load_net(kept)
    with pytest.raises(NetFileError, match=r"pruned\.npz: a pruned net: compile it first with vdbench compile"):
        CompiledNet.load(path)


def test_unknown_nets_are_named(capsys):
    assert cli.main(["compile", "no-such-net"]) == 2
    assert "'no-such-net'" in capsys.readouterr().err


def test_a_language_model_is_not_compiled_but_counted(tmp_path, capsys):
    path = tmp_path / "pruned.npz"
    model = MODELS["rnnlm_tanh_200"](20)
    model.output.weight.data.zero_()
    pruning.save_net(path, model, {"model": "rnnlm_tanh_200", "num_classes": 20})
    assert cli.main(["compile", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "vdbench.to_cpu_sparse runs it sparse" in shown and "units_l1 0\n" in shown
    assert cli.main(["compile", str(path), "--output", str(tmp_path / "x.npz")]) == 2
    assert "not kept in a file" in capsys.readouterr().err
    assert cli.main(["compile", str(path), "--threads", "1"]) == 2
    assert "leave out --threads" in capsys.readouterr().err
