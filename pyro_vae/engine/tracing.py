"""A function of tensors traced once, Pyro's handlers included: its tensor operations as a graph.

``make_fx`` follows tensor objects. A tensor that is passed as an input is known again wherever the function meets it, in
a module, in Pyro's store, in a closure, so that nothing has to be put in its place. Every other tensor that the graph
reads from outside becomes an input as well, and stays live: what it holds when the graph is called is what counts.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.engine.modes import LossAsTensor, UntraceableError, ValueGuards

__all__ = ["Function", "NotCompiledWarning", "Traced", "reason_of", "trace"]

# Of the list of tensors on which backward() was called: its numbers, scalar tensors, and other results.
Function = Callable[[list[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]


class NotCompiledWarning(UserWarning):
    """Something that cannot be compiled, and is run eagerly."""


@dataclass
class Traced:
    """A graph of the inputs and then of the outside tensors.

    Its first result is a vector of float64: 1 if all guards hold, or minus the place of the first that does not, and then
    the numbers. Where one does not hold the graph changes no tensor that it is given.

    Args:
        graph: the graph.
        inputs: their number.
        outside: tensors that the function reads and that are no inputs.
        written: places, among inputs and outside tensors, of those that it writes to.
        guards: where in the user's code a value was taken that must stay the same.
        numbers: how many there are in the vector.
        others: how many other results there are.
    """

    graph: torch.fx.GraphModule
    inputs: int
    outside: list[Tensor]
    written: list[int]
    guards: list[str]
    numbers: int
    others: int


def trace(function: Function, inputs: Sequence[Tensor]) -> Traced:
    """The tensor operations of ``function``, which runs once for it and meets the inputs as the objects that they are.

    Tensors that it writes to, and torch's random numbers, are left as found. Numbers that the function makes into tensors
    itself, ``torch.tensor(0.5)``, are constants of the graph.

    Raises:
        UntraceableError: it draws from other random numbers than torch's, which would be the same in each call; or its
            values are read in a way that cannot be guarded.
        Exception: whatever the function raises.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # heavy, and only needed here

    guards, lengths = ValueGuards(), (0, 0)

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        nonlocal lengths
        noted: list[Tensor] = []
        with LossAsTensor(noted), guards:
            numbers, others = function(noted)
            lengths = len(numbers) + 1, len(others)
            held = _held(guards.guards)
            return torch.stack([n.detach().double() for n in (held, *numbers)]), *others

    noise = _noise_of_others()
    try:
        with torch.random.fork_rng(devices=[]):
            graph = make_fx(run, decomposition_table={torch.ops.aten.addmm.default: _addmm})(*inputs)
    finally:
        guards.restore()
    if _noise_of_others() != noise:
        raise UntraceableError("it draws from Python's or NumPy's random numbers; draw from torch's")
    outside = _lift(graph)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    written = _written(graph)
    if guards.guards:
        _undo_where_a_guard_fails(graph, written)
    return Traced(graph, len(inputs), outside, [placeholders.index(node) for node in written], guards.lines, *lengths)


def _held(guards: Sequence[Tensor]) -> Tensor:
    if not guards:
        return torch.ones(())
    held = torch.stack([*guards])
    return torch.where(held.all(), 1, -held.int().argmin())


def _lift(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Makes placeholders of the outside tensors, which ``make_fx`` has kept as attributes; returns them."""
    outside: dict[int, tuple[Tensor, torch.fx.Node]] = {}
    fresh = torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(graph, node.target)
        if not torch.is_tensor(tensor) or (node.users and all(user.target in fresh for user in node.users)):
            continue  # a number that was made into a tensor in there
        if id(tensor) not in outside:
            placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
            place = graph.graph.inserting_after(placeholders[-1]) if placeholders else graph.graph.inserting_before(node)
            with place:
                outside[id(tensor)] = tensor, graph.graph.placeholder(f"outside_{len(outside)}")
        node.replace_all_uses_with(outside[id(tensor)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return [tensor for tensor, _ in outside.values()]


def _written(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The placeholders that are written to, themselves or by a view of them."""
    roots: dict[torch.fx.Node, torch.fx.Node] = {}  # of views: the placeholder
    written: dict[torch.fx.Node, None] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            roots[node] = node
        for given, writes in _aliased(node):
            if given in roots:
                roots[node] = roots[given]
                if writes:
                    written[roots[given]] = None
    return [*written]


def _aliased(node: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, bool]]:
    """Arguments of an operation that its result may be a view of, and whether they are written to."""
    for place, argument in enumerate(getattr(getattr(node.target, "_schema", None), "arguments", ())):
        if argument.alias_info is not None:
            given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            for each in given if isinstance(given, list | tuple) else (given,):
                if isinstance(each, torch.fx.Node):
                    yield each, argument.alias_info.is_write


def _undo_where_a_guard_fails(graph: torch.fx.GraphModule, written: Sequence[torch.fx.Node]) -> None:
    aten, nodes = torch.ops.aten, [*graph.graph.nodes]
    first = next(node for node in nodes if node.op != "placeholder")
    with graph.graph.inserting_before(first):
        before = [graph.graph.call_function(aten.clone.default, (node,)) for node in written]
    with graph.graph.inserting_before(nodes[-1]):
        held = graph.graph.call_function(aten.select.int, (nodes[-1].args[0][0], 0, 0))
        held = graph.graph.call_function(aten.gt.Scalar, (held, 0))
        for node, old in zip(written, before, strict=True):
            new = graph.graph.call_function(aten.where.self, (held, node, old))
            graph.graph.call_function(aten.copy_.default, (node, new))
    graph.recompile()


def reason_of(error: Exception) -> str:
    """What to tell of an error while tracing or compiling."""
    if isinstance(error, UntraceableError):
        return str(error)
    lines = str(error).strip().splitlines() or ["no reason given"]
    if "_local_scalar_dense" in lines[0] or "data-dependent" in lines[0].lower():
        return "it is data-dependent: it takes the value of a tensor to Python (by if, float() or item())"
    return f"{type(error).__name__}: {lines[0]}"


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Product and bias apart: the bias joins the next elementwise loop, where one call would first copy it to every row."""
    return beta * bias + alpha * (a @ b) if (beta, alpha) != (1, 1) else a @ b + bias


def _noise_of_others() -> Any:
    return random.getstate(), str(np.random.get_state())  # noqa: NPY002, it is the old generator that has a global state
