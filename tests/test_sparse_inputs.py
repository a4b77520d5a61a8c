"""What a compiled net is called with: batches of any size and layout, read in any shape, and those that are refused."""

import numpy as np
import pytest
import torch
from sparse_net import assert_same, network
from torch import nn

from vdbench.sparse import compile_sparse
from vdbench.sparse.opaque import Opaque

pytestmark = pytest.mark.usefixtures("engine_cache")


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 31, 64, 65, 100, 300])
def test_any_batch_size(compiled, count):
    batch = torch.randn(count, 2, 10, 10)
    assert_same(compiled(batch), network()(batch).detach())


def test_arrays_and_tensors(compiled):
    batch = torch.randn(5, 2, 10, 10)
    array, tensor = compiled(batch.numpy()), compiled(batch)
    assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(array, tensor.numpy())
    assert compiled(batch[:0]).shape == (0, 3)
    strided = torch.randn(5, 10, 10, 2).permute(0, 3, 1, 2)
    assert_same(compiled(strided), network()(strided).detach())
    assert not compiled(batch.requires_grad_()).requires_grad


class Digits(nn.Module):
    """Reads images without channels as maps, as code for MNIST does."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.layer = nn.Conv2d(1, 4, 3), nn.Linear(4 * 6 * 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.convolution(x.unsqueeze(1)).relu().flatten(1))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(56, 3)), (8, 7)),
        (nn.Sequential(nn.Flatten(2), nn.Flatten(), nn.Linear(56, 3)), (2, 2, 2, 7)),
        (nn.Sequential(nn.Unflatten(1, (1, 8, 7)), nn.Conv2d(1, 4, 3)), (56,)),
        (Digits(), (8, 7)),
    ],
)
def test_inputs_that_are_read_in_another_shape(net, shape):
    batch = torch.randn(37, *shape)
    compiled = compile_sparse(net.eval(), batch[:1])
    assert not [op for op in compiled.graph.ops if isinstance(op, Opaque)]
    for count in (1, 16, 37):
        assert_same(compiled(batch[:count]), net(batch[:count]).detach())
    told = "(N, " + ", ".join(map(str, shape)) + ") to"
    assert told in compiled.summary() and told in repr(compiled)
    other = compiled.graph.input.shape
    with pytest.raises(ValueError, match="compiled for batches"):
        compiled(torch.zeros(2, *other))


@pytest.mark.parametrize(
    "function",
    [lambda x: (x.flatten(1).sum(1), x.flatten(1))[1], lambda x: x.flatten(1) + x.exp().flatten(1), torch.flatten],
)
def test_inputs_that_are_read_in_several_shapes_or_only_reshaped(function):
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x) if function is not torch.flatten else x.flatten(1)

    batch = torch.randn(20, 8, 7)
    assert_same(compile_sparse(Net().eval(), batch[:1])(batch), Net()(batch))


def test_results_are_the_callers_own(compiled):
    first = compiled(torch.ones(1, 2, 10, 10))
    kept = first.clone()
    compiled(torch.zeros(1, 2, 10, 10))
    assert torch.equal(first, kept)


def test_batches_that_are_stored_negated(compiled):
    batch = torch.randn(3, 2, 10, 10, dtype=torch.cfloat).conj().imag
    assert batch.is_neg()
    assert_same(compiled(batch), network()(batch.resolve_neg()).detach())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(1, 2, 10, 10, dtype=torch.float64), "float32"),
        (np.zeros((1, 2, 10, 10)), "float32"),
        ([[0.0]], "array or a tensor"),
        (torch.zeros(2, 10, 10), r"\(N, 2, 10, 10\), not \(2, 10, 10\)"),
        (torch.zeros(1, 3, 10, 10), r"not \(1, 3, 10, 10\)"),
        (torch.zeros(()), r"not \(\)"),
    ],
)
def test_wrong_batches(compiled, batch, message):
    with pytest.raises((TypeError, ValueError), match=message):
        compiled(batch)
