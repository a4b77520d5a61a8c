"""From a PyTorch model to the engine's graph."""

import copy
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vdbench.conversion import to_plain
from vdbench.mistakes import first_line
from vdbench.sparse.checks import Untraceable, check, check_output, verify
from vdbench.sparse.graph import Graph, Input, Op, Shape
from vdbench.sparse.jit import COMPILING
from vdbench.sparse.modules import is_known
from vdbench.sparse.opaque import TorchOp
from vdbench.sparse.slot import Slot, unused
from vdbench.sparse.translate import translate

Modules = dict[str, nn.Module]


def trace(model: nn.Module, example: Tensor) -> Graph:
    """The operations of a model in eval mode. Weights are copied, those of variational layers masked at their
    threshold; a layer's operation is named after the layer.

    Args:
        example: float32 with a batch axis, of which only the shape counts: (N, ...).

    Raises:
        TypeError: the example is not a float32 tensor.
        ValueError: the example has no batch axis; the model is in training mode, not on the CPU, not float32 or holds
            NaN or infinity.
        Untraceable: torch.fx cannot follow the model, it takes or gives more than one tensor, its examples are not
            independent of each other, or the graph would not compute what the model computes. Refused: the model does
            not take the example.
    """
    check(model, example)
    batch = torch.randn(3, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(False), torch.no_grad():
        check_output(model, batch[:2])
        nodes, modules = _symbolic(model)
        graph = _Reading(nodes, modules, batch).graph(next(iter(reversed(nodes.nodes))).args[0])
        verify(graph, model, batch[:2])
    return graph


class _Tracer(fx.Tracer):
    """Follows the thread it was made in; torch.fx alone takes what any thread calls meanwhile to be the model's."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_known(m) or super().is_leaf_module(m, module_qualified_name)


def _symbolic(model: nn.Module) -> tuple[fx.Graph, Modules]:
    """The calls a model makes, and the modules they name."""
    root = nn.Sequential(model)  # the model may itself be a layer, and its optional inputs keep their defaults
    try:
        with COMPILING:  # each tracer puts itself in the place of what it found and puts that back at its end
            return _Tracer().trace(root), dict(root.named_modules(remove_duplicate=False))
    except Exception as error:
        raise Untraceable(f"torch.fx cannot follow {type(model).__name__}: {first_line(error)}") from error


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)

_QUERIES = (getattr, "size", "dim", "ndimension", "numel")


def _called(node: fx.Node, modules: Modules) -> str:
    """The name of the class or function that is called."""
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "function")


def _in_place(node: fx.Node, modules: Modules) -> bool:
    """Whether a call overwrites its first argument."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = _called(node, modules)
    return bool(node.kwargs.get("inplace")) or node.target in _IN_PLACE or (name[-1:] == "_" and name[-2:] != "__")


def _evaluate(node: fx.Node, known: dict[fx.Node, Any], modules: Modules) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)  # type: ignore[misc]
    target: Any = node.target
    match node.op:
        case "call_module":
            return modules[target](*args, **kwargs)
        case "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        case "get_attr":
            return operator.attrgetter(target)(modules[""])
        case _:
            return target(*args, **kwargs)


def _propagate(nodes: fx.Graph, modules: Modules, batch: Tensor) -> dict[fx.Node, Any]:
    """What every node gives for a batch."""
    known: dict[fx.Node, Any] = {}
    for node in nodes.nodes:
        if node.op != "output":
            known[node] = batch.clone() if node.op == "placeholder" else _evaluate(node, known, modules)
    return known


def _is_value(of_two: Any, of_three: Any) -> bool:
    """Whether batches of two and three gave two and three results, one an example."""
    if not isinstance(of_two, Tensor) or of_two.dtype != torch.float32:
        return False
    return of_two.shape[:1] == (2,) and of_three.shape == (3, *of_two.shape[1:])


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether numbers of one lie where numbers of the other do."""
    whole = a.untyped_storage()
    if whole.data_ptr() != b.untyped_storage().data_ptr():
        return False
    places = torch.zeros(whole.nbytes() // a.element_size(), dtype=torch.bool)
    places.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(places.as_strided(b.shape, b.stride(), b.storage_offset()).any())


@dataclass(frozen=True)
class _Piece:
    """Calls that stay PyTorch's, as one function of batches: the last gives the value, those before it what it needs
    that is no value of the network, as the size of a batch."""

    inputs: tuple[fx.Node, ...]
    calls: tuple[fx.Node, ...]
    constants: dict[fx.Node, Any]
    modules: Modules
    overwrites: bool

    @torch.no_grad()
    def __call__(self, *values: Tensor) -> Tensor:
        own = (value.clone() for value in values) if self.overwrites else values
        known = self.constants | dict(zip(self.inputs, own, strict=True))
        for call in self.calls:
            known[call] = _evaluate(call, known, self.modules)
        return known[self.calls[-1]]


class _Reading:
    """A graph in the making: every fx node is a value of the network, a constant, or what only its users see."""

    def __init__(self, nodes: fx.Graph, modules: Modules, batch: Tensor) -> None:
        self.modules = modules
        self.copies: Modules = {}
        self.values: dict[fx.Node, Op] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.sizes: set[fx.Node] = set()  # what depends on the input through its shape alone
        self.ops: list[Op] = []
        self.unread = set(nodes.nodes)
        try:
            self.of_two, self.of_three = (_propagate(nodes, modules, batch[:count]) for count in (2, 3))
        except Exception as error:
            raise Untraceable(f"the traced operations fail for 2 and 3 examples: {first_line(error)}") from error
        for node in nodes.nodes:
            self.unread.discard(node)
            if node.op != "output":
                self.read(node)

    def read(self, node: fx.Node) -> None:
        two, three = self.of_two[node], self.of_three[node]
        if node.op == "placeholder":
            self.values[node] = Input(name="input", shape=tuple(two.shape[1:]))
            self.ops.append(self.values[node])
        elif self.is_constant(node):
            self.constants[node] = two.detach().clone() if isinstance(two, Tensor) else two
        elif _is_value(two, three):
            self.values[node] = self.operation(node, tuple(two.shape[1:]))
            if _in_place(node, self.modules):
                self.overwrite(node)

    def overwrite(self, node: fx.Node) -> None:
        """Let all that a call has written over be what it made. Raises Untraceable where that lies there in another
        shape, and is read later."""
        before, made = self.values.get(node.all_input_nodes[0]), self.values[node]
        if made is before:  # as dropout, which writes nothing
            return
        for other, op in self.values.items():
            if op is made or not _overlap(self.of_two[other], self.of_two[node]):
                continue
            if op is before:
                self.values[other] = made
            elif any(user in self.unread and user.target not in _QUERIES for user in other.users):
                called = _called(node, self.modules)
                raise Untraceable(f"{called} overwrites {other.name}, of which it has a view: give it a clone")

    def is_constant(self, node: fx.Node) -> bool:
        """Whether it is the same for all batches: known from constants, or from shapes other than the batch's size."""
        two, three, sources = self.of_two[node], self.of_three[node], node.all_input_nodes
        if not isinstance(two, Tensor) and (node.target in _QUERIES or self.sizes.issuperset(sources)):
            self.sizes.add(node)
            if isinstance(two, int | float | torch.Size | torch.dtype | torch.device):
                return two == three
        return all(source in self.constants for source in sources)

    def operation(self, node: fx.Node, shape: Shape) -> Op:
        slot = Slot(self.new_name(node), shape, self.ops)
        known: dict[fx.Node, Any] = self.constants | self.values
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known.get(n, n))  # type: ignore[misc]
        target = self.modules[str(node.target)] if node.op == "call_module" else node.target
        return translate(slot, target, args, kwargs) or self.given_back(node) or self.torch_operation(node, slot)

    def given_back(self, node: fx.Node) -> Op | None:
        """The value that a call returns as it was, as stochastic depth in eval mode does, if nothing writes to it."""
        runs = self.of_two, self.of_three
        for source in node.all_input_nodes:
            if source in self.values and all(run[node] is run[source] and not run[node]._version for run in runs):
                return self.values[source]
        return None

    def torch_operation(self, node: fx.Node, slot: Slot) -> Op:
        calls: dict[fx.Node, None] = {}
        inputs: dict[fx.Node, None] = {}

        def visit(node: fx.Node) -> None:
            for source in node.all_input_nodes:
                if source in self.values:
                    inputs[source] = None
                elif source not in self.constants and source not in calls:
                    visit(source)
            calls[node] = None

        visit(node)
        needed = {source for call in calls for source in call.all_input_nodes}
        modules = {str(call.target): self.own(str(call.target)) for call in calls if call.op == "call_module"}
        inner = [layer for module in modules.values() for layer in module.modules()]
        layers = frozenset(type(layer) for layer in inner if any(p.dim() > 1 for p in layer.parameters(recurse=False)))
        piece = _Piece(
            tuple(inputs),
            tuple(calls),
            {source: value for source, value in self.constants.items() if source in needed},
            modules,
            any(_in_place(call, self.modules) for call in calls),
        )
        values, called = (self.values[source] for source in inputs), _called(node, modules)
        return slot.put(TorchOp, *values, function=piece, layers=layers, called=called)

    def own(self, target: str) -> nn.Module:
        if target not in self.copies:
            self.copies[target] = to_plain(copy.deepcopy(self.modules[target])).requires_grad_(False)
        return self.copies[target]

    def new_name(self, node: fx.Node) -> str:
        return unused(str(node.target).removeprefix("0.") if node.op == "call_module" else node.name, self.ops)

    def graph(self, output: Any) -> Graph:
        """The operations that the output depends on."""
        if output not in self.values:
            raise Untraceable("the model's output does not depend on its input")
        live = {self.values[output].name}
        kept: list[Op] = []
        for op in reversed(self.ops):
            if op.name in live or not op.inputs:
                live.update(op.inputs)
                kept.append(op)
        return Graph(tuple(reversed(kept)))
