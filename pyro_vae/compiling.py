"""A function of tensors traced once, Pyro's handlers included, and compiled by Inductor to one call."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["NotCompiledWarning", "UntraceableError", "inductor", "reason_of", "trace"]


class NotCompiledWarning(UserWarning):
    """Something that cannot be compiled, and is run eagerly."""


class UntraceableError(Exception):
    """A function that cannot be traced, and why."""


def trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The tensor operations of ``function(*inputs)``, which runs once for it.

    Raises:
        UntraceableError: it draws from other random numbers than torch's, which would be the same in each call.
        RuntimeError: torch's, of a function that decides by the value of a tensor.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # heavy, and only needed here

    noise = _noise_of_others()
    graph = make_fx(function, decomposition_table={torch.ops.aten.addmm.default: _addmm})(*inputs)
    if _noise_of_others() != noise:
        raise UntraceableError("it draws from Python's or NumPy's random numbers; draw from torch's")
    return graph


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
