"""From kernels to addresses of machine code, which is kept in the cache folder."""

import contextlib
import ctypes
import hashlib
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from vdbench.files import Folders
from vdbench.records import atomic_write
from vdbench.sparse.code import SIGNATURE, Code
from vdbench.sparse.codegen import Slices, Tile, build_slices, build_tile
from vdbench.sparse.moving import Copy, Transpose, build_copy, build_transpose

Kernel = Tile | Slices | Transpose | Copy
BUILDERS: dict[type, Callable[..., None]] = {
    Tile: build_tile,
    Slices: build_slices,
    Transpose: build_transpose,
    Copy: build_copy,
}
DIGEST_BYTES = 32

COMPILING = threading.RLock()  # held by who compiles, LLVM's own lock too; no process is forked meanwhile
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=COMPILING.acquire, after_in_parent=COMPILING.release, after_in_child=COMPILING.release)


@cache
def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True
    )


@cache
def supports(feature: str) -> bool:
    """Whether this processor has a feature, by LLVM's name."""
    return bool(llvm.get_host_cpu_features().get(feature))


@cache
def vector_lanes() -> int:
    """Floats in the widest vector this processor computes with."""
    return 16 if supports("avx512f") else 8 if supports("avx2") else 4


@cache
def first_level_bytes() -> int:
    """Of the cache nearest to the processor; where the system does not say, what most have."""
    with contextlib.suppress(OSError, ValueError):
        size = Path("/sys/devices/system/cpu/cpu0/cache/index0/size").read_text()
        return int(size.strip().removesuffix("K")) << 10
    return 32 << 10


@cache
def machine_name() -> str:
    """The processor and what it can do: code and measurements of one kind are of no use to another."""
    features = ",".join(sorted(name for name, there in llvm.get_host_cpu_features().items() if there))
    return f"{llvm.get_host_cpu_name()} {os.cpu_count()} {hashlib.sha256(features.encode()).hexdigest()[:16]}"


@cache
def _engine() -> Any:
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())


@cache
def compile_kernel(kernel: Kernel) -> int:
    """The address of a kernel's code: a function of the addresses of its source, destination and tables."""
    name = f"kernel_{hashlib.sha256(repr(kernel).encode()).hexdigest()[:16]}"
    return _address(name, lambda code, *arguments: BUILDERS[type(kernel)](code, *arguments, kernel))


@cache
def native_function(build: Callable[..., None]) -> Any:
    """A function of three addresses, its code written by `build(code, *arguments)`. It runs without Python's lock."""
    address = _address(build.__name__, build)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(address)


def _address(name: str, build: Callable[..., None]) -> int:
    """Of a function's machine code, which is kept in the cache folder."""
    module = ir.Module()
    code = Code(ir.Function(module, SIGNATURE, name))
    build(code, *code.function.args)
    code.b.ret_void()
    text = str(module)
    key = hashlib.sha256(f"{llvmlite.__version__} {machine_name()}\n{text}".encode()).hexdigest()[:32]
    path = Folders.in_force(None, None).cache / "kernels" / f"{key}.o"
    with COMPILING:
        content = _remembered(path)
        if content is None:
            content = _compile(text)
            with contextlib.suppress(OSError), atomic_write(path) as temporary:
                temporary.write_bytes(hashlib.sha256(content).digest() + content)
        engine = _engine()
        engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(content))
        engine.finalize_object()
        return engine.get_function_address(name)


def _remembered(path: Path) -> bytes | None:
    """The object file that was kept under its digest: a damaged one would be run."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def _compile(text: str) -> bytes:
    parsed = llvm.parse_assembly(text)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(_machine(), options)
    builder.getModulePassManager().run(parsed, builder)
    return _machine().emit_object(parsed)
