"""The loop that runs a program's kernels, as LLVM IR: one native call for a whole network, or one a thread."""

import contextlib
import ctypes
from functools import cache

from llvmlite import ir

from vdbench.sparse.code import I32, I64, POINTER, SIGNATURE, Code, Value

I64_BYTES = 8
PATIENCE = 10_000  # looks at what other threads have done, some microseconds, before they are let go first
RELEASED = 1 << 62  # as the number of finished steps: nobody waits any more


@cache
def giving_way() -> int:
    """The address of a function that lets other threads of this machine go first; 0 where none is known."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    return 0


def _wait(code: Code, place: Value, least: Value, give_way: Value) -> None:
    """Until the number there is at least that; after a while, other threads of the machine go first."""
    b, tries = code.b, code.variable(I64, I64(0))
    look, again, stand_back, done = (code.function.append_basic_block() for _ in range(4))
    b.branch(look)
    b.position_at_end(look)
    b.cbranch(b.icmp_signed("<", b.load_atomic(place, "acquire", I64_BYTES, typ=I64), least), again, done)
    b.position_at_end(again)
    tries.set(b.add(tries.get(), I64(1)))
    patient = b.and_(b.icmp_signed(">", tries.get(), I64(PATIENCE)), b.icmp_signed("!=", give_way, I64(0)))
    b.cbranch(patient, stand_back, look)
    b.position_at_end(stand_back)
    b.call(b.inttoptr(give_way, ir.FunctionType(I32, []).as_pointer()), [])
    b.branch(look)
    b.position_at_end(done)


def build_driver(code: Code, stages: Value, bases: Value, counts: Value) -> None:
    """Runs a program for one group of examples after the other.

    stages: for each the address of its steps, how many they are and how often they are repeated (i64 all). A step: the
    addresses of its code and tables, then which base its source and its destination start from and by how many bytes
    either moves with every repetition (i64 all). bases: addresses, then by how many bytes each moves with every group
    (i64). counts: stages, groups, bases, threads that run steps of their own of the same program, the address of a
    function that gives way to other threads (or 0), and how often any of them has finished a step, 0 at the start: none
    begins a step before all have finished the one before.
    """
    b = code.b
    stage_count, groups, base_count, threads, give_way = (code.element(counts, k, I64) for k in range(5))
    finished, expected = code.at(counts, 5 * I64_BYTES), code.variable(I64, I64(0))

    def base(index: Value, group: Value) -> Value:
        move = b.mul(group, code.element(bases, b.add(base_count, index), I64))
        return code.at(code.element(bases, index, POINTER), move)

    with code.loop(groups) as g, code.loop(stage_count) as s:
        first = b.mul(s, I64(3))
        steps, count, repeats = (code.element(stages, b.add(first, I64(k)), I64) for k in range(3))
        steps = code.pointer(steps)
        with code.loop(repeats) as n, code.loop(count) as k:
            place = b.mul(k, I64(6))
            function, tables, src, src_move, dst, dst_move = (
                code.element(steps, b.add(place, I64(part)), I64) for part in range(6)
            )
            source = code.at(base(src, g), b.mul(n, src_move))
            destination = code.at(base(dst, g), b.mul(n, dst_move))
            b.call(b.inttoptr(function, SIGNATURE.as_pointer()), [source, destination, code.pointer(tables)])
            with b.if_then(b.icmp_signed(">", threads, I64(1))):
                expected.set(b.add(expected.get(), threads))
                b.atomic_rmw("add", finished, I64(1), "acq_rel")
                _wait(code, finished, expected.get(), give_way)
