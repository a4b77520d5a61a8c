"""The loop around the kernels, and what keeps threads in step that share it."""

from dataclasses import dataclass

from llvmlite import ir

from vdbench.sparse.code import I32, I64, POINTER, SIGNATURE, Code, Value

SPINS = 1 << 14  # looks at the counter before another thread is let to work on this core


@dataclass(frozen=True)
class Barrier:
    """Nobody goes on before all of so many threads have come."""

    threads: int


def build_barrier(code: Code, source: Value, destination: Value, tables: Value, kernel: Barrier) -> None:
    """Tables: the addresses of how many have come so far (i64, never reset) and of a function that lets other threads
    work."""
    b = code.b
    counter, others_work = code.parameters(tables, 2)
    counter = code.pointer(counter)
    others_work = b.inttoptr(others_work, ir.FunctionType(I32, []).as_pointer())
    threads, spins = I64(kernel.threads), code.variable(I64, I64(0))
    come = b.atomic_rmw("add", counter, I64(1), "acq_rel")
    awaited = b.mul(b.add(b.udiv(come, threads), I64(1)), threads)
    look, wait, done = (code.function.append_basic_block() for _ in range(3))
    b.branch(look)
    b.position_at_end(look)
    now = b.load_atomic(counter, "acquire", 8, typ=I64)
    b.cbranch(b.icmp_signed(">=", now, awaited), done, wait)
    b.position_at_end(wait)
    spins.set(b.add(spins.get(), I64(1)))
    with b.if_then(b.icmp_signed(">", spins.get(), I64(SPINS))):
        b.call(others_work, [])
    b.branch(look)
    b.position_at_end(done)


def build_driver(code: Code, stages: Value, bases: Value, counts: Value) -> None:
    """Runs a program for one group of examples after the other.

    stages: for each the address of its steps, how many they are and how often they are repeated (i64 all). A step: the
    addresses of its code and tables, then which base its source and its destination start from and by how many bytes
    either moves with every repetition (i64 all). bases: addresses, then by how many bytes each moves with every group
    (i64). counts: stages, groups, bases.
    """
    b = code.b
    stage_count, groups, base_count = (code.element(counts, k, I64) for k in range(3))

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
                code.element(steps, b.add(place, I64(k)), I64) for k in range(6)
            )
            source = code.at(base(src, g), b.mul(n, src_move))
            destination = code.at(base(dst, g), b.mul(n, dst_move))
            b.call(b.inttoptr(function, SIGNATURE.as_pointer()), [source, destination, code.pointer(tables)])
