"""Where inputs are read and results lie: any memory will do, and large results start where a cache line does."""

import numpy as np
import pytest
import torch
from torch import nn

from vdbench.sparse import CompiledNet, compile_sparse
from vdbench.sparse.layout import LINE, address, aligned
from vdbench.sparse.running import SMALL

pytestmark = pytest.mark.usefixtures("engine_cache")


def layer(outputs: int) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(20, outputs).eval()
    made.weight.data *= torch.rand_like(made.weight) < 0.2
    return made


def compiled(outputs: int, threads: int = 1) -> CompiledNet:
    """In blocks of examples wherever there is one."""
    net = compile_sparse(layer(outputs), torch.zeros(1, 20), threads=threads)
    net.plans["batch"][0].seconds = 0.0
    return CompiledNet(net.graph, net.plans, threads=threads)


@pytest.mark.parametrize("count", [1, 5, 16, 17, 64, 80])
def test_inputs_that_nobody_may_write_to_are_read(count):
    batch = np.random.default_rng(0).standard_normal((count, 20), np.float32)
    net = compiled(32)
    expected = net(batch)
    batch.setflags(write=False)
    np.testing.assert_array_equal(net(batch), expected)


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (70,), ()])
@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.int64])
def test_aligned_arrays_start_where_a_cache_line_does(shape, dtype):
    made = aligned(shape, dtype)
    assert made.shape == shape and made.dtype == dtype and made.flags.c_contiguous
    assert made.ctypes.data % LINE == 0 and address(made) == made.ctypes.data


@pytest.mark.parametrize("threads", [1, 3])
def test_large_results_start_where_a_cache_line_does(threads):
    net, batch = compiled(30, threads), torch.randn(2 * SMALL // 30, 20)
    out = net(batch)
    assert out.data_ptr() % LINE == 0 and out.is_contiguous()
    assert (out - layer(30)(batch)).abs().max() <= 1e-5 * out.abs().max()
