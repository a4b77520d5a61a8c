"""Pruned language models word by word and in batches: the sparse model against torch, dense and CSR, and onnxruntime.

200-unit LSTMs, one that is shipped and some with random masks; contenders take turns, on one thread, after their
logits were found equal. Medians are printed and stored in `extra_info`. Nothing is asserted of times.
"""

import io
import statistics
import time

import numpy as np
import pytest
import torch

from vdbench import metrics, shipping
from vdbench.baselines import GradualPruner
from vdbench.models import MODELS
from vdbench.sparse import to_cpu_sparse
from vdbench.structure import structure

WORDS, ROUNDS = 10_000, 21
SHIPPED = "lstm200-ptb-vd_warmup"


def pruned(density: float | str) -> torch.nn.Module:
    if isinstance(density, str):
        return shipping.load(density)
    torch.manual_seed(0)
    net = MODELS["rnnlm_lstm_200"](WORDS).eval()
    kept = {layer.name: round(density * layer.total) for layer in metrics.layers(net)}
    GradualPruner(net, kept).update(1.0)
    return net


class TorchCsr:
    """The model with its matrices as torch's CSR tensors, and the recurrence as a loop."""

    def __init__(self, net: torch.nn.Module) -> None:
        parts = structure(net)
        self.embedding = parts.embedding
        self.layers = [
            (x.inputs.flatten(0, 1).to_sparse_csr(), x.units.flatten(0, 1).to_sparse_csr(), x.bias.reshape(-1, 1))
            for x in parts.layers
        ]
        self.output, self.bias = parts.output.to_sparse_csr(), parts.bias[:, None]

    def __call__(self, words: torch.Tensor) -> torch.Tensor:
        value = self.embedding[words.flatten()].t().contiguous()
        sequences = words.shape[1]
        for inputs, units, bias in self.layers:
            gates = inputs @ value + bias
            hidden = cell = torch.zeros(units.shape[1], sequences)
            outputs = []
            for gate in gates.split(sequences, dim=1):
                inlet, keep, new, outlet = (gate + units @ hidden).chunk(4)
                cell = keep.sigmoid() * cell + inlet.sigmoid() * new.tanh()
                hidden = outlet.sigmoid() * cell.tanh()
                outputs.append(hidden)
            value = torch.cat(outputs, dim=1)
        return (self.output @ value + self.bias).t().view(*words.shape, -1)


def onnx_run(net: torch.nn.Module, words: torch.Tensor):
    """The dense model in onnxruntime, on one thread; None where the packages are missing."""
    try:
        import onnxruntime
    except ImportError:
        return None
    file = io.BytesIO()
    torch.onnx.export(net, (words,), file, input_names=["words"], output_names=["logits"], dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda words: torch.from_numpy(session.run(["logits"], {"words": words.numpy()})[0])


@pytest.mark.filterwarnings("ignore")  # of torch's exporter and CSR tensors
@pytest.mark.benchmark(group="language model inference")
@pytest.mark.parametrize("density", [SHIPPED, 0.1, 0.04])
@pytest.mark.parametrize(("steps", "sequences"), [(1, 1), (1, 64), (35, 1), (35, 64)])
@torch.no_grad()
def test_language_inference(benchmark, density, steps, sequences, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net = pruned(density)
    words = torch.randint(WORDS, (steps, sequences))
    fast = to_cpu_sparse(net)
    runs = {
        "torch": lambda words: net(words)[0],
        "torch CSR": TorchCsr(net),
        "onnxruntime": onnx_run(net, words),
    }
    expected = net(words)[0]
    tolerance = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
    seconds: dict[str, list[float]] = {name: [] for name, run in runs.items() if run}
    for run in (lambda words: fast(words)[0], *filter(None, runs.values())):
        np.testing.assert_allclose(run(words), expected, **tolerance)

    def others_first() -> None:
        for name, taken in seconds.items():
            started = time.perf_counter()
            runs[name](words)
            taken.append(time.perf_counter() - started)

    benchmark.pedantic(lambda: fast(words), setup=others_first, rounds=ROUNDS)
    torch.set_num_threads(threads)
    medians = {"vdbench": benchmark.stats.stats.median} | {n: statistics.median(taken) for n, taken in seconds.items()}
    benchmark.extra_info.update(medians)
    shown = ", ".join(f"{name} {1e3 * median:.3g} ms" for name, median in medians.items())
    with capsys.disabled():
        print(f"\n{100 - 100 * metrics.sparsity(net):.3g} % of the weights, {steps} x {sequences} words: {shown}")
