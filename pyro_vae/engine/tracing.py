"""Tracing of a function of tensors, Pyro's handlers included, to a graph of tensor operations.

``make_fx`` identifies tensors as objects. An input is recognised wherever the function uses it, in a module, in Pyro's
param store or in a closure, so that nothing needs to be replaced by it. Every other tensor that the graph reads from outside
becomes an input as well, whose value is read at each call.
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

# A function from the list of tensors on which backward() was called to its numbers (scalar tensors) and its other results.
Function = Callable[[list[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]


class NotCompiledWarning(UserWarning):
    """A function cannot be compiled, and falls back to eager execution."""


@dataclass
class Traced:
    """A graph, whose arguments are the inputs followed by the outside tensors.

    Its first result is a vector of float64: 1 if all guards hold, else minus the index of the first that fails, followed by
    the numbers. If a guard fails, the graph changes none of its arguments.

    Args:
        graph: the graph.
        inputs: number of inputs.
        outside: tensors that the function reads and that are not inputs.
        written: indices, among inputs and outside tensors, of those that it mutates.
        guards: for each guard, the line of the user's code that reads the guarded value.
        numbers: length of the vector.
        others: number of other results.
    """

    graph: torch.fx.GraphModule
    inputs: int
    outside: list[Tensor]
    written: list[int]
    guards: list[str]
    numbers: int
    others: int


def trace(function: Function, inputs: Sequence[Tensor]) -> Traced:
    """Trace the tensor operations of ``function``, which runs once and uses the input tensors themselves.

    Tensors that it mutates, and torch's random state, are restored. Tensors that the function makes of Python numbers,
    ``torch.tensor(0.5)``, are constants of the graph.

    Raises:
        UntraceableError: the function draws from a generator other than torch's, whose values would be constants of the
            graph; or it reads values of tensors in a way that cannot be guarded.
        Exception: raised by the function.
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
    """Lifts the outside tensors, which ``make_fx`` stores as attributes, to placeholders; returns them."""
    outside: dict[int, tuple[Tensor, torch.fx.Node]] = {}
    fresh = torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(graph, node.target)
        if not torch.is_tensor(tensor) or (node.users and all(user.target in fresh for user in node.users)):
            continue  # a tensor made of a Python number: a constant
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
    """The placeholders that the graph mutates, directly or through a view."""
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
    """The arguments of which the result of an operation may be a view, and whether the operation mutates them."""
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
    """The reason in a warning for an error of tracing or compilation."""
    if isinstance(error, UntraceableError):
        return str(error)
    lines = str(error).strip().splitlines() or ["no reason given"]
    if "_local_scalar_dense" in lines[0] or "data-dependent" in lines[0].lower():
        return "it is data-dependent: it takes the value of a tensor to Python (by if, float() or item())"
    return f"{type(error).__name__}: {lines[0]}"


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Separate product and bias: the bias is fused into the next elementwise loop, while addmm would first broadcast it."""
    return beta * bias + alpha * (a @ b) if (beta, alpha) != (1, 1) else a @ b + bias


def _noise_of_others() -> Any:
    return random.getstate(), str(np.random.get_state())  # noqa: NPY002, it is the old generator that has a global state
