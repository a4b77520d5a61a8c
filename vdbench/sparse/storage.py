"""Graphs and plans as files: a NumPy archive without pickle, its weights stored as positions and values."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from vdbench import netfile
from vdbench.sparse import graph as graphs
from vdbench.sparse.graph import Graph, Op, TorchOp
from vdbench.sparse.plan import Plan

_KINDS: dict[str, type[Op]] = {
    kind.__name__: kind
    for kind in vars(graphs).values()
    if isinstance(kind, type) and issubclass(kind, Op) and kind is not TorchOp
}


class NotStorable(ValueError):
    """A network with operations that only PyTorch's objects describe."""


def parts(graph: Graph) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """The graph's arrays, by "operation/field", and everything else as JSON. Raises NotStorable."""
    arrays, ops = {}, []
    for op in graph.ops:
        if isinstance(op, TorchOp):
            raise NotStorable(f"{op.name} runs as a PyTorch function, which no file can hold; compile it again instead")
        content: dict[str, Any] = {"kind": type(op).__name__}
        for field in fields(op):
            value = getattr(op, field.name)
            if isinstance(value, np.ndarray):
                arrays[f"{op.name}/{field.name}"] = value
            else:
                content[field.name] = value
        ops.append(content)
    return arrays, ops


def digest(graph: Graph) -> str | None:
    """Equal for graphs that compute the same; None for one that cannot be stored."""
    try:
        arrays, ops = parts(graph)
    except NotStorable:
        return None
    found = hashlib.sha256(json.dumps(ops, sort_keys=True).encode())
    for name, array in arrays.items():
        found.update(f"{name}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def save(path: Path, graph: Graph, plans: dict[str, Plan], machine: str) -> None:
    """Write a compiled net; what was measured on `machine` goes with it. Raises NotStorable."""
    arrays, ops = parts(graph)
    weights = {name: array for name, array in arrays.items() if name.endswith("/weight")}
    others = {name: array for name, array in arrays.items() if name not in weights}
    made = {key: plan.to_json() for key, plan in plans.items()}
    meta = {"ops": ops, "removed": graph.removed, "plans": made, "machine": machine}
    netfile.write_arrays(path, weights, others, meta)


def load(path: Path) -> tuple[Graph, dict[str, Plan], str]:
    """The graph, its plans and the machine they were made on.

    Raises:
        NetFileError: the file is not a compiled net, or a damaged one.
    """
    arrays, meta = netfile.read_arrays(path)
    try:
        ops = []
        for content in meta["ops"]:
            kind = _KINDS[content.pop("kind")]
            given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
            for name in {field.name for field in fields(kind)} - given.keys():
                given[name] = np.ascontiguousarray(arrays[f"{given['name']}/{name}"])
            ops.append(kind(**given))
        plans = {key: Plan.from_json(plan) for key, plan in meta["plans"].items()}
        return Graph(tuple(ops), dict(meta["removed"])), plans, str(meta["machine"])
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise netfile.NetFileError(f"{path}: not a compiled net ({error!r}); compile the model again") from None
