"""What a job changes of the process it runs in. Torch's state is put back afterwards."""

import contextlib
import ctypes
from collections.abc import Iterator

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's names of what can be set


def keep_freed_memory() -> None:
    """From now on the C library keeps what is freed. By itself it gives large values back to the system, or does not,
    depending on what lies beside them, and an operation that has to ask for its result's memory anew takes up to half
    as long again: PyTorch's time for a result of 17 MB differed by that much from process to process. Without effect
    where the C library is not glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_MMAP_THRESHOLD, 1 << 30)
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


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
