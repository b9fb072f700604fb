"""A function of tensors traced once, Pyro's handlers included, and compiled by Inductor to one call.

``make_fx`` follows tensor objects. A tensor that is passed as an input is known again wherever the function meets it, in
a module, in Pyro's store, in a closure, so that nothing has to be put in its place. Every other tensor that the graph
reads from outside becomes an input as well, and stays live: what it holds when the graph is called is what counts.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Compiled", "NotCompiledWarning", "UntraceableError", "compiled", "inductor", "reason_of", "trace"]


class NotCompiledWarning(UserWarning):
    """Something that cannot be compiled, and is run eagerly."""


class UntraceableError(Exception):
    """A function that cannot be traced, and why."""


@dataclass
class Compiled:
    """A compiled function of tensors.

    Args:
        call: of the inputs and then of the outside tensors.
        outside: tensors that the function reads and that are no inputs.
    """

    call: Callable[..., Any]
    outside: Sequence[Tensor]

    def __call__(self, *inputs: Tensor) -> Any:
        return self.call(*inputs, *self.outside)


def compiled(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Compiled:
    """``function`` as one call, for inputs of these shapes and types; traced on these inputs, which it may change.

    Raises:
        UntraceableError: as by :func:`trace`.
        RuntimeError: torch's, of a function that decides by the value of a tensor, or of a compiler that fails.
    """
    graph, outside = trace(function, inputs)
    return Compiled(inductor(graph, [t.detach() for t in (*inputs, *outside)]), outside)


def trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """The tensor operations of ``function(*inputs)``, which runs once for it, and the outside tensors that it reads.

    The graph is a function of the inputs and then of the outside tensors. Numbers that the function makes into tensors
    itself, ``torch.tensor(0.5)``, are constants of it.

    Raises:
        UntraceableError: it draws from other random numbers than torch's, which would be the same in each call; or it
            writes to an outside tensor, which nobody could undo.
        RuntimeError: torch's, of a function that decides by the value of a tensor.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # heavy, and only needed here

    noise = _noise_of_others()
    graph = make_fx(function, decomposition_table={torch.ops.aten.addmm.default: _addmm})(*inputs)
    if _noise_of_others() != noise:
        raise UntraceableError("it draws from Python's or NumPy's random numbers; draw from torch's")
    return graph, _lift(graph)


def _lift(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Makes placeholders of the outside tensors, which ``make_fx`` has kept as attributes; returns them."""
    outside: dict[int, tuple[Tensor, torch.fx.Node]] = {}
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(graph, node.target)
        fresh = torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default
        if not torch.is_tensor(tensor) or (node.users and all(user.target in fresh for user in node.users)):
            continue  # a number that was made into a tensor in there
        if any(user.op == "call_function" and _writes(user, node) for user in node.users):
            raise UntraceableError("it writes to a tensor that is neither a parameter nor a buffer; register it as a buffer")
        if id(tensor) not in outside:
            last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
            with graph.graph.inserting_after(last):
                outside[id(tensor)] = tensor, graph.graph.placeholder(f"outside_{len(outside)}")
        node.replace_all_uses_with(outside[id(tensor)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return [tensor for tensor, _ in outside.values()]


def _writes(user: torch.fx.Node, node: torch.fx.Node) -> bool:
    arguments = getattr(getattr(user.target, "_schema", None), "arguments", ())
    return any(
        given is node and argument.alias_info is not None and argument.alias_info.is_write
        for argument, given in zip(arguments, user.args, strict=False)
    )


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The graph compiled, its noise drawn from torch's own generator."""
    import torch._inductor

    for node in graph.graph.nodes:
        node.meta.pop("val", None)  # of the tracer's mode, which the C++ wrapper would mix with its own
    options: dict[str, Any] = {"fallback_random": True, "cpp_wrapper": True, "pattern_matcher": False}  # see _addmm
    with torch.no_grad():
        call: Callable[..., Any] = torch._inductor.compile(graph, list(inputs), options=options)
    return call


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
