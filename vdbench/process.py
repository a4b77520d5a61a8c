"""What a job changes of torch's process-wide state, and puts back."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Within the block torch's generators may be seeded; after it they are as the caller left them."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextlib.contextmanager
def denormals_are_zero() -> Iterator[None]:
    """Numbers too small for float32's full precision count as 0: weights on their way to zero would otherwise slow
    every operation they take part in. Off afterwards, which is torch's default."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """Within the block the number of threads may be set; after it it is the caller's again."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """Within the block torch multiplies float32 matrices as `torch.set_float32_matmul_precision` says; None: as it
    did."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within the block convolutions on a GPU are float32, which by default they are not quite: TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
