"""Layers as products with matrices in compressed sparse rows."""

import copy
import os
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.nn import functional

from vdbench.sparse.peers.common import Run, not_installed, require, through_torch

IM2COL_IMAGES = 16  # at once: their columns are many times their size


def _swapped(model: nn.Module, make: Callable[[Any], nn.Module], *kinds: type[nn.Module]) -> nn.Module:
    """A copy of the net with `make(layer)` in place of every layer of these kinds."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, kinds):
            if not name:
                return make(layer)
            model.set_submodule(name, make(layer))
    return model


def _csr(layer: nn.Linear | nn.Conv2d) -> Any:
    return scipy.sparse.csr_matrix(layer.weight.detach().flatten(1).numpy())


class _SparseLinear(nn.Module):
    """`product` of the weights with a value (in_features, N), plus the bias; other axes in front are so many more
    examples."""

    def __init__(self, product: Callable[[Tensor], Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.product, self.bias = product, None if bias is None else bias.detach()

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() > 2:
            return self(input.flatten(0, -2)).unflatten(0, input.shape[:-1])
        out = self.product(input.t()).t()
        return out if self.bias is None else out + self.bias


def _scipy_linear(layer: nn.Linear) -> nn.Module:
    csr = _csr(layer)
    return _SparseLinear(lambda value: torch.from_numpy(csr @ value.numpy()), layer.bias)


def scipy_csr(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """Linear layers as SciPy CSR matrices, which use one thread; convolutions dense in PyTorch."""
    require(model, nn.Linear)
    return through_torch(_swapped(model, _scipy_linear, nn.Linear))


def torch_csr(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """Linear layers as PyTorch CSR tensors; convolutions dense."""
    require(model, nn.Linear)

    def make(layer: nn.Linear) -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            weight = layer.weight.detach().to_sparse_csr()
        return _SparseLinear(weight.matmul, layer.bias)

    model = _swapped(model, make, nn.Linear)

    @torch.no_grad()  # CSR products raise in inference mode
    def run(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).numpy()

    return run


def sparse_dot_mkl(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """Linear layers as CSR matrices multiplied by MKL; convolutions dense in PyTorch."""
    require(model, nn.Linear)
    multiply, set_threads = _mkl()

    def make(layer: nn.Linear) -> nn.Module:
        csr = _csr(layer)
        return _SparseLinear(lambda value: torch.from_numpy(multiply(csr, value.numpy())), layer.bias)

    set_threads(threads)
    return through_torch(_swapped(model, make, nn.Linear))


def _mkl() -> tuple[Callable[..., Any], Callable[[int], None]]:
    """sparse_dot_mkl's product and number of threads. It finds MKL only where it is told to look."""
    try:
        libraries = [file.locate() for file in files("mkl") or [] if "mkl_rt" in file.name]
        os.environ.setdefault("MKL_RT", str(Path(str(libraries[0])).resolve()))
        from sparse_dot_mkl import dot_product_mkl, mkl_set_num_threads
    except (PackageNotFoundError, IndexError):
        raise not_installed("mkl") from None
    except ImportError as error:
        raise not_installed(error.name) from None
    return dot_product_mkl, mkl_set_num_threads


class _Im2col(nn.Module):
    """A convolution as one product of a sparse matrix with the columns of all images."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.csr, self.bias = _csr(layer), layer.bias
        self.window: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)

    def forward(self, input: Tensor) -> Tensor:
        columns = functional.unfold(input, *self.window)
        n, _, places = columns.shape
        product = torch.from_numpy(self.csr @ columns.transpose(0, 1).flatten(1).numpy())
        sizes = [
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, dilation, padding, stride in zip(input.shape[2:], *self.window, strict=True)
        ]
        out = product.view(-1, n, places).transpose(0, 1).reshape(n, -1, *sizes)
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)


def im2col_scipy(model: nn.Module, example: np.ndarray, threads: int) -> Run:
    """Convolutions too as SciPy CSR matrices, multiplied with the unfolded images."""
    require(model, nn.Conv2d)

    def make(layer: nn.Linear | nn.Conv2d) -> nn.Module:
        return _scipy_linear(layer) if isinstance(layer, nn.Linear) else _Im2col(layer)

    run = through_torch(_swapped(model, make, nn.Linear, nn.Conv2d))
    return lambda images: np.concatenate(
        [run(images[first : first + IM2COL_IMAGES]) for first in range(0, len(images), IM2COL_IMAGES)]
    )
