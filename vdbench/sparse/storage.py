"""Graphs and plans as files: a NumPy archive without pickle, its weights stored as positions and values."""

import hashlib
import json
import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vdbench import netfile
from vdbench.mistakes import first_line
from vdbench.sparse import graph as graphs
from vdbench.sparse import opaque
from vdbench.sparse.graph import Graph, Op
from vdbench.sparse.opaque import TorchOp
from vdbench.sparse.plan import Network, Plan
from vdbench.sparse.stencil import Stencil, stencil

LARGEST_VALUE = 1 << 27  # numbers in one value, for one example
_KINDS: dict[str, type[Op]] = {
    kind.__name__: kind
    for kind in (*vars(graphs).values(), *vars(opaque).values())
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


def plans_to_json(plans: dict[str, list[Plan]]) -> dict[str, Any]:
    return {key: [plan.to_json() for plan in made] for key, made in plans.items()}


def plans_from_json(content: dict[str, Any]) -> dict[str, list[Plan]]:
    """Raises TypeError, KeyError, ValueError or AttributeError for anything but what `plans_to_json` gives."""
    plans = {key: [Plan.from_json(plan) for plan in content[key]] for key in ("single", "batch")}
    if not all(plans.values()):
        raise ValueError("no plans")
    return plans


def check_plans(plans: dict[str, list[Plan]], graph: Graph) -> None:
    """Raises ValueError for plans that are not this graph's, TypeError for what is no number among their times."""
    for key, made in plans.items():
        network = Network(graph, single=key == "single")
        names = [item.name for item in network.items]
        for plan in made:
            times = [plan.seconds, plan.more_s, *(s for item in plan.items for s in item.seconds.values())]
            if [item.name for item in plan.items] != names or plan.examples != network.examples:
                raise ValueError(f"a plan for {key} examples is that of another network")
            if not all(item.seconds for item in plan.items) or not all(0 <= s < math.inf for s in times):
                raise ValueError(f"a plan for {key} examples has no times")


def save(path: Path, graph: Graph, plans: dict[str, list[Plan]], measured_with: str) -> None:
    """Write a compiled net and its plans. Raises NotStorable."""
    arrays, ops = parts(graph)
    weights = {name: array for name, array in arrays.items() if name.endswith("/weight")}
    others = {name: array for name, array in arrays.items() if name not in weights}
    told = {"removed": graph.removed, "weights": graph.weights}
    meta = {"ops": ops, **told, "plans": plans_to_json(plans), "measured_with": measured_with}
    netfile.write_arrays(path, weights, others, meta)


def load(path: Path, measured_with: str) -> tuple[Graph, dict[str, list[Plan]] | None]:
    """The graph, and its plans; None where they were measured with something else.

    Raises:
        NetFileError: the file is not a compiled net, or a damaged one.
    """
    arrays, meta = netfile.read_arrays(path)
    if not netfile.is_compiled(meta):
        raise netfile.NetFileError(f"{path}: a pruned net: compile it first with vdbench compile {path} --output FILE")
    try:
        ops = []
        for content in meta["ops"]:
            kind = _KINDS[content.pop("kind")]
            given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
            for name in {field.name for field in fields(kind) if field.default is MISSING} - given.keys():
                given[name] = np.ascontiguousarray(arrays[f"{given['name']}/{name}"])
            ops.append(kind(**given))
        graph = Graph(tuple(ops), dict(meta["removed"]), dict(meta.get("weights", {})))  # older files have none
        _check(graph)
        if meta.get("measured_with") != measured_with:
            return graph, None
        plans = plans_from_json(meta["plans"])
        check_plans(plans, graph)
        return graph, plans
    except Exception as error:  # PyTorch's operations each have their own for arguments that do not fit
        raise netfile.NetFileError(
            f"{path}: not a compiled net ({type(error).__name__}: {first_line(error)}); compile the model again"
        ) from None


def _check(graph: Graph) -> None:
    """Let PyTorch run the graph once. Kernels are made from what it says of shapes: were that wrong, they would read
    and write outside their arrays. Raises ValueError, or what PyTorch raises."""
    names = [op.name for op in graph.ops]
    if not isinstance(graph.ops[0], graphs.Input) or len(set(names)) < len(names):
        raise ValueError("operations do not start with the only input, or share a name")
    values: dict[str, torch.Tensor] = {}
    for op in graph.ops:
        if not 0 < math.prod(op.shape) <= LARGEST_VALUE:
            raise ValueError(f"{op.name} is of shape {op.shape}")
        if op is graph.input:
            values[op.name] = graph.input(torch.zeros(1, *graph.input.example))
        else:
            values[op.name] = op(*(values[name] for name in op.inputs))
        if values[op.name].shape != (1, *op.shape) or values[op.name].dtype != torch.float32:
            raise ValueError(f"{op.name} is not of shape {op.shape}")
        if op.inputs and (made := stencil(op, graph)):
            _check_entries(made, op, [graph[name].shape[0] for name in made.inputs])


def _check_entries(made: Stencil, op: Op, channels: list[int]) -> None:
    """Raises ValueError for a stencil that reads what its inputs, with so many channels, do not have, or whose biases
    are not those of its outputs: where PyTorch repeats a single one, kernels read on."""
    e = made.entries
    inside = (e.channel < np.array(channels)[e.source]).all() and (e.row < op.shape[0]).all()
    if not inside or made.bias.shape not in (op.shape[:1], op.shape):
        raise ValueError(f"{op.name} reads more than there is")
