"""A function without side effects, of tensors in nested containers to tensors in nested containers, as a program."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from pyro_vae.engine.arguments import Arguments
from pyro_vae.engine.guards import PythonState
from pyro_vae.engine.modes import UntraceableError
from pyro_vae.engine.program import Graph, Program, close
from pyro_vae.engine.store import has_handlers

__all__ = ["FunctionProgram", "trace_program"]


def trace_program(python: PythonState, function: Callable[[], Any], noted: list[Tensor]) -> Any:
    """Run a function while it is traced.

    Raises:
        UntraceableError: it calls ``backward()``; or see :meth:`~pyro_vae.engine.guards.PythonState.traced`.
    """
    with python.traced():
        result = function()
        if noted:
            raise UntraceableError("it calls backward() itself")
    return result


@dataclass
class _About:
    spec: TreeSpec
    leaves: list[Any]  # index of a result of the graph, or a value that is no tensor
    flat: bool  # the function returns a list of different tensors


@dataclass
class _Place:
    index: int


class FunctionProgram(Program[Arguments, Any]):
    """A function without side effects. Its result may be nested, and is detached.

    Args:
        function: of the arguments.
        python: the Python state on which it depends.
    """

    stateless = True

    def __init__(self, function: Callable[..., Any], python: PythonState) -> None:
        self._function, self.python = function, python

    def key(self, call: Arguments) -> Hashable:
        return None if has_handlers() else (self.python.token(), call.key, torch.get_default_dtype())

    def inputs(self, call: Arguments) -> Sequence[Tensor]:
        return call.tensors

    def eager(self, call: Arguments) -> Any:
        result = tree_map_only(Tensor, Tensor.detach, self._function(*call.args, **call.kwargs))
        self.python.rebind()
        return result

    def trace(self, call: Arguments, noted: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Any]:
        result = trace_program(self.python, lambda: self._function(*call.args, **call.kwargs), noted)
        leaves, spec = tree_flatten(result)
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        places = [*tensors]
        kept = [_Place(places.index(id(leaf))) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        flat = type(result) is list and len(tensors) == len(result)
        return [], [t.detach() for t in tensors.values()], _About(spec, kept, flat)

    def result(self, call: Arguments, graph: Graph, numbers: list[float], others: list[Tensor]) -> Any:
        about: _About = graph.about
        if about.flat:
            return others
        leaves = [others[leaf.index] if isinstance(leaf, _Place) else leaf for leaf in about.leaves]
        return tree_unflatten(leaves, about.spec)

    def difference(self, found: Any, expected: Any) -> str:
        (ours, spec), (theirs, other) = tree_flatten(found), tree_flatten(expected)
        same = spec == other and all(
            close(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
            for a, b in zip(ours, theirs, strict=True)
        )
        return "" if same else "its result is not that of the eager call"
