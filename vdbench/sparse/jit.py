"""From kernels to addresses of machine code, and the loop that runs a list of them in one native call."""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from vdbench.sparse.codegen import BUILDERS, SIGNATURE, Code, Kernel


@cache
def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True
    )


@cache
def vector_lanes() -> int:
    """Floats in the widest vector this processor computes with."""
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


@cache
def _engine() -> Any:
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())


_compiled: dict[Kernel, int] = {}


def compile_kernels(kernels: Sequence[Kernel]) -> list[int]:
    """The address of each kernel's code; what was compiled before is not compiled again."""
    new = [kernel for kernel in dict.fromkeys(kernels) if kernel not in _compiled]
    if new:
        module = ir.Module()
        names = {}
        for kernel in new:
            names[kernel] = f"kernel_{len(_compiled) + len(names)}"
            function = ir.Function(module, SIGNATURE, names[kernel])
            code = Code(function)
            BUILDERS[type(kernel)](code, *function.args, kernel)
            code.b.ret_void()
        engine = _add(module)
        _compiled.update({kernel: engine.get_function_address(name) for kernel, name in names.items()})
    return [_compiled[kernel] for kernel in kernels]


@cache
def native_function(build: Callable[..., None]) -> Callable[[int, int, int], None]:
    """A function of three addresses whose code `build(code, *arguments)` writes. Python's lock is released meanwhile."""
    module = ir.Module()
    function = ir.Function(module, SIGNATURE, build.__name__)
    code = Code(function)
    build(code, *function.args)
    code.b.ret_void()
    address = _add(module).get_function_address(build.__name__)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(address)


def _add(module: ir.Module) -> Any:
    parsed = llvm.parse_assembly(str(module))
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(_machine(), options)
    builder.getModulePassManager().run(parsed, builder)
    engine = _engine()
    engine.add_module(parsed)
    engine.finalize_object()
    return engine
