"""The arguments of a call: their tensors, which are inputs of a graph, and the key of all else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_vae.engine.calls import Calls
from pyro_vae.engine.guards import constant

__all__ = ["ArgumentReader", "Arguments", "explain"]


@dataclass
class Arguments:
    """The arguments of a call.

    Args:
        args: positional.
        kwargs: by name.
        tensors: the tensors in them, each once.
        key: structure, shapes and dtypes of tensors, and values of all else.
    """

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    tensors: list[Tensor]
    key: tuple[Any, ...]


def explain(calls: Calls[Any, Any]) -> str:
    """A description of the graphs, their guards and calls, in lines; or the reason why there are none.

    The keys of the graphs are tuples whose second part is ``Arguments.key``.
    """
    lines = [f"{calls.what}: {calls.reason}"] if calls.reason else []
    for key, graph in calls.graphs.items():
        parts: Any = key
        shapes = ", ".join(str(tuple(part[0])) for part in parts[1][1:] if isinstance(part, tuple) and len(part) == 6)
        lines.append(
            f"tensors of shape {shapes or 'none'}: {len(graph.traced.graph.graph.nodes):,} operations, compiled in "
            f"{graph.seconds:.1f} s; {graph.made:,} calls, of which {graph.failed:,} with a guard that failed"
        )
        for line in dict.fromkeys(graph.traced.guards):
            failures = graph.failures[line]
            lines.append(f"    guard: {line}" + (f"; it failed {failures:,} times" if failures else ""))
    return "\n".join(lines) or "nothing is compiled yet"


class ArgumentReader:
    """Reads arguments. A Python float that changes between calls, an annealed weight, say, is passed as a tensor."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], list[float]] = {}  # floats of the first call, by all else
        self._as_tensors: set[tuple[Any, ...]] = set()

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments of a call."""
        leaves: Sequence[Any]
        spec: TreeSpec | int
        plain = not kwargs and all(isinstance(a, Tensor) for a in args)
        leaves, spec = (args, len(args)) if plain else tree_flatten((args, kwargs))
        if not plain and any(type(leaf) is float for leaf in leaves):
            args, kwargs = self._with_changing_floats(leaves, spec)  # type: ignore[arg-type]
            leaves, spec = tree_flatten((args, kwargs))
        tensors: dict[int, Tensor] = {}
        key: list[Any] = [spec]
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                place = [*tensors].index(id(leaf)) if id(leaf) in tensors else -1  # the same tensor twice
                tensors[id(leaf)] = leaf
                key.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad, place))
            else:
                key.append(constant(leaf))
        return Arguments(args, kwargs, [*tensors.values()], tuple(key))

    def _with_changing_floats(self, leaves: Sequence[Any], spec: TreeSpec) -> tuple[Any, Any]:
        rest = (
            spec,
            tuple(type(leaf) if type(leaf) is float or isinstance(leaf, Tensor) else constant(leaf) for leaf in leaves),
        )
        numbers = [leaf for leaf in leaves if type(leaf) is float]
        if self._numbers.setdefault(rest, numbers) != numbers:
            self._as_tensors.add(rest)
        if rest in self._as_tensors:
            leaves = [torch.tensor(leaf) if type(leaf) is float else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, spec)
        return args, kwargs
