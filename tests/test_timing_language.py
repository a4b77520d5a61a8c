"""Language models timed side by side: one word of every text, or many."""

import sys

import factory
import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from vdbench import plots, pruning, records, stats, tables, timing
from vdbench.config import Suite, SuiteError, Timing, parse_suite
from vdbench.models import MODELS
from vdbench.sparse.backends import LANGUAGE_BACKENDS, BackendMissing

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = 30


def sparse_model(name: str) -> torch.nn.Module:
    """A language model of which a tenth of the weights is left."""
    torch.manual_seed(0)
    model = MODELS[name](WORDS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand_like(parameter) < 0.1)
    return model


@pytest.mark.parametrize("name", ["rnnlm_lstm_200", "rnnlm_tanh_200"])
@pytest.mark.parametrize("backend", [name for name in LANGUAGE_BACKENDS if name != "torch_dense"])
def test_every_way_reads_on_to_the_same_logits(name, backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    model, generator = sparse_model(name), np.random.default_rng(0)
    run = LANGUAGE_BACKENDS[backend](model, generator.integers(WORDS, size=(1, 1)), 1)
    dense = LANGUAGE_BACKENDS["torch_dense"](model, generator.integers(WORDS, size=(1, 1)), 1)
    tolerance = 1e-5 if backend == "vdbench" else timing.TOLERANCE
    for shape in ((1, 1), (1, 64), (35, 1), (35, 64)):
        words = generator.integers(WORDS, size=shape)
        first, second = dense(words), dense(words)
        assert first.shape == (*shape, WORDS) and not np.array_equal(first, second)  # which reads on
        for expected in (first, second):
            np.testing.assert_allclose(run(words), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def suite(model: str = "rnnlm_lstm_200") -> Suite:
    net = {
        "dataset": "topics",
        "model": model,
        "seeds": [0],
        "timed": ["vd_warmup"],
        "methods": {"dense": {"epochs": 1}, "vd_warmup": {"epochs": 1}},
    }
    return parse_suite({"suite": "words", "experiments": {"lstm": net}}, "a test")


def test_one_hot_words_are_not_timed():
    with pytest.raises(SuiteError, match="timed: dense engines would multiply the one-hot words"):
        suite("rnnlm_lstm_onehot")
    with pytest.raises(BackendMissing, match="one-hot"):
        LANGUAGE_BACKENDS["torch_csr"](MODELS["rnnlm_lstm_onehot"](WORDS), np.zeros((1, 1), np.int64), 1)


def test_a_language_model_is_timed_word_by_word_and_in_texts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    pruning.save_net(
        tmp_path / "pruned.npz", sparse_model("rnnlm_lstm_200"), {"model": "rnnlm_lstm_200", "num_classes": WORDS}
    )
    backends = ["torch_dense", "onnxruntime", "mnn_sparse", "torch_csr", "vdbench"]
    how = Timing.model_validate(
        {"batch_sizes": [1, 3], "threads": [1], "rounds": 2, "min_sample_s": 1e-6, "backends": backends}
    )
    spec = tiny.spec("dense", "rnnlm_lstm_200").model_copy(update={"timing": how})
    made = timing.time_inference(spec, suite="tiny", output=tmp_path, pruned=tmp_path / "pruned.npz")
    assert records.read(tmp_path / "time.json") == made
    assert [(t.batch_size, t.steps, t.backend) for t in made.timing] == [
        (batch, steps, name)
        for batch in (1, 3)
        for steps in (1, 35)
        for name in ("torch_dense", "torch_csr", "vdbench")
    ]
    assert made.missing_backends["mnn_sparse"] == "it does not run language models here"
    assert "pip install" in made.missing_backends["onnxruntime"]
    assert made.work is None


def test_times_are_of_a_word_and_compared_at_equal_words(tmp_path):
    taken = {("torch_dense", 1): 8.0, ("vdbench", 1): 2.0, ("torch_dense", 35): 35.0, ("vdbench", 35): 70.0}
    how = {"device": "cpu", "threads": 1, "batch_size": 2}
    timed = [how | {"backend": name, "steps": steps, "samples_s": [s, s]} for (name, steps), s in taken.items()]
    made = factory.record(suite(), "lstm", "vd_warmup", 0, "time", timing=timed)
    found = stats.speedups(made)
    assert [item.seconds_an_example for item in found] == [4.0, 1.0, 0.5, 1.0]
    assert [item.over_best.value for item in found if item.over_best] == [1.0, 4.0, 1.0, 0.5]

    tables.write_tables(suite(), {"recorded": [made]}, {}, tmp_path)
    frame = pd.read_csv(tmp_path / "speedup.csv").query("backend == 'vdbench'")
    assert frame[["steps", "us_per_example", "speedup"]].to_numpy().tolist() == [[1, 1e6, 4.0], [35, 1e6, 0.5]]
    shown = (tmp_path / "speedup.md").read_text()
    assert "| 2 × 35" in shown
    assert "Time a word, µs" in shown

    figure = plots.TIMING_FIGURES["time_per_image"](plots.timed(suite(), "lstm", {"recorded": [made]}))
    assert [axis.get_title().rpartition(", ")[2] for axis in figure.axes] == ["batch 2", "batch 2 × 35"]
    assert {axis.get_xlabel() for axis in figure.axes} == {"Time a word (µs)"}
