"""What can be called eagerly or compiled: a function, and how its calls are traced, compared, undone."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pyro_vae.engine.runner import Call
from pyro_vae.engine.tracing import Traced

__all__ = ["Graph", "NotYetError", "Program", "close", "near"]

C = TypeVar("C")  # what a program is called with
R = TypeVar("R")  # what a call gives


class NotYetError(Exception):
    """What cannot be traced before one more call was made eagerly."""


@dataclass
class Graph:
    """One compiled graph.

    Args:
        traced: the graph.
        call: compiled.
        about: what the program keeps of it.
        seconds: that tracing and compiling took.
        made: calls of it.
        failures: of these, how many had a guard that did not hold, by the line where the value was taken.
    """

    traced: Traced
    call: Call
    about: Any
    seconds: float
    made: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """Calls with a guard that did not hold."""
        return self.failures.total()

    @property
    def written(self) -> list[Tensor]:
        """Tensors that it writes to."""
        first = self.traced.inputs
        return [self.traced.outside[place - first] for place in self.traced.written]


class Program(Generic[C, R]):
    """A function that is called eagerly as it is, or compiled. It may change tensors, and Python state of its own.

    The hooks below :meth:`difference` have defaults, which are those of a program without state.
    """

    def key(self, call: C) -> Hashable:
        """What a graph depends on beside its inputs; a call of the key None is made eagerly."""
        raise NotImplementedError

    def inputs(self, call: C) -> Sequence[Tensor]:
        """Tensors that are others from call to call; each once."""
        raise NotImplementedError

    def eager(self, call: C) -> R:
        """The call as it is."""
        raise NotImplementedError

    def trace(self, call: C, noted: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Any]:
        """The call as it is traced: numbers, other results, and what is to be kept of the graph."""
        raise NotImplementedError

    def result(self, call: C, graph: Graph, numbers: list[float], others: list[Tensor]) -> R:
        """What a compiled call gives."""
        raise NotImplementedError

    def difference(self, found: R, expected: R) -> str:
        """How a compiled call's result differs from the eager one's by more than rounding; empty if it does not."""
        raise NotImplementedError

    stateless = False  # whether calls change nothing

    def reset(self, call: C) -> None:
        """Before a call is made again: Python holds what it held then."""

    def before(self, graph: Graph) -> None:
        """Before compiled calls: tensors take up what Python holds."""

    def after(self, graph: Graph, times: int, others: list[Tensor]) -> None:
        """After so many compiled calls: Python takes up what tensors hold."""

    def at_once(self, graph: Graph) -> bool:
        """Whether several calls can be made in a row, with nothing between them."""
        return False

    def state(self) -> Iterable[Tensor]:
        """Tensors that a call may change."""
        return ()

    def save(self) -> Any:
        """The Python state that a call changes."""

    def load(self, saved: Any) -> None:
        """Put it back."""

    def sound(self) -> bool:
        """Whether what the calls so far have changed can be kept."""
        return True

    def parameters(self, graph: Graph) -> list[Tensor]:
        """What has gradients."""
        return []

    def moments(self, graph: Graph) -> list[Tensor]:
        """What the gradients go into, such as an optimiser's moments; not compared tensor by tensor."""
        return []

    def moved(self, graph: Graph) -> list[Tensor]:
        """Copies of what shows the last gradient, a tensor for each parameter."""
        return []

    def gradients(self, graph: Graph, call: C) -> list[Tensor]:
        """The eager gradients at the parameters as they are, times their share in :meth:`moved`."""
        return []


def near(found: Sequence[Tensor], expected: Sequence[Tensor], spread: Sequence[float] | None = None) -> bool:
    """Whether gradients agree but for rounding, or this spread."""
    if not expected:
        return True
    size = torch.stack([m.norm() for m in expected]).norm()
    return all(
        bool((one - other).norm() <= 1e-3 * other.norm() + 1e-4 * size + extra)  # 1e-4: of rounding errors alone
        for one, other, extra in zip(found, expected, spread or [0.0] * len(expected), strict=True)
    )


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether tensors agree but for rounding."""
    if not found.is_floating_point():
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
