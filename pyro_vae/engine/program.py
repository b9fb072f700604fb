"""The interface of a function that runs eagerly or compiled: how its calls are traced, verified and rolled back."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pyro_vae.engine.runner import Call
from pyro_vae.engine.tracing import Traced

__all__ = ["Graph", "NotYetError", "Program", "StepProgram", "close", "near"]

C = TypeVar("C")  # the argument of a call
R = TypeVar("R")  # the result of a call


class NotYetError(Exception):
    """The call can only be traced after another eager call."""


@dataclass
class Graph:
    """One compiled graph.

    Args:
        traced: the graph.
        call: the compiled code.
        about: data of the program about the graph.
        seconds: time of tracing and compilation.
        made: number of calls.
        failures: number of calls in which a guard failed, by the line where the value was taken.
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
        """The tensors that the graph mutates."""
        first = self.traced.inputs
        return [self.traced.outside[place - first] for place in self.traced.written]


class Program(Generic[C, R]):
    """A function that runs eagerly or compiled. It may mutate tensors, and Python state of its own.

    The methods after :meth:`difference` have defaults for a program without state.
    """

    def key(self, call: C) -> Hashable:
        """The key of the graph for a call: all that the graph depends on except its inputs. None: the call runs eagerly."""
        raise NotImplementedError

    def inputs(self, call: C) -> Sequence[Tensor]:
        """The tensors that may differ between calls, without duplicates."""
        raise NotImplementedError

    def eager(self, call: C) -> R:
        """Run the call eagerly."""
        raise NotImplementedError

    def trace(self, call: C, noted: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Any]:
        """Run the call for tracing; returns its numbers, its other results, and ``Graph.about``."""
        raise NotImplementedError

    def result(self, call: C, graph: Graph, numbers: list[float], others: list[Tensor]) -> R:
        """The result of a compiled call."""
        raise NotImplementedError

    def difference(self, found: R, expected: R) -> str:
        """A description of a difference between compiled and eager result beyond rounding; empty if there is none."""
        raise NotImplementedError

    stateless = False  # whether calls have no side effects

    def reset(self, call: C) -> None:
        """Called before a call is re-run: restores the Python state of that call."""

    def before(self, graph: Graph) -> None:
        """Called before compiled calls: copies Python state to tensors."""

    def after(self, graph: Graph, times: int, others: list[Tensor]) -> None:
        """Called after compiled calls: copies the values of tensors to Python state."""

    def at_once(self, graph: Graph) -> bool:
        """Whether several calls can be made in a row, with nothing between them."""
        return False

    def state(self) -> Iterable[Tensor]:
        """The tensors that a call may mutate."""
        return ()

    def save(self) -> Any:
        """A snapshot of the Python state that a call changes."""

    def load(self, saved: Any) -> None:
        """Restore a snapshot."""

    def is_finite(self) -> bool:
        """Whether the state after the calls so far is valid (finite); otherwise it is rolled back."""
        return True

    def parameters(self, graph: Graph) -> list[Tensor]:
        """The parameters with a gradient."""
        return []

    def moments(self, graph: Graph) -> list[Tensor]:
        """Tensors that are updated by the gradients, such as an optimiser's moments; not compared elementwise."""
        return []

    def gradient_copies(self, graph: Graph) -> list[Tensor]:
        """Copies of tensors that depend on the last gradient, one for each parameter."""
        return []

    def gradients(self, graph: Graph, call: C) -> list[Tensor]:
        """The eager gradients at the current parameters, times their factor in :meth:`gradient_copies`."""
        return []


class StepProgram(Program[C, R]):
    """A program whose calls end with the update of an optimiser, which is ``graph.about.update``."""

    def before(self, graph: Graph) -> None:
        graph.about.update.before()

    def parameters(self, graph: Graph) -> list[Tensor]:
        return [slot.parameter for slot in graph.about.update.slots]

    def moments(self, graph: Graph) -> list[Tensor]:
        moments: list[Tensor] = graph.about.update.tensors()
        return moments

    def gradient_copies(self, graph: Graph) -> list[Tensor]:
        copies: list[Tensor] = graph.about.update.gradient_copies()
        return copies


def near(found: Sequence[Tensor], expected: Sequence[Tensor], spread: Sequence[float] | None = None) -> bool:
    """Whether gradients agree but for rounding, or this spread."""
    if not expected:
        return True
    pairs = [_without_equal_nonfinite(one, other) for one, other in zip(found, expected, strict=True)]
    found, expected = zip(*pairs, strict=True)
    size = torch.stack([m.norm() for m in expected]).norm()
    return all(
        bool((one - other).norm() <= 1e-3 * other.norm() + 1e-4 * size + extra)  # 1e-4: of rounding errors alone
        for one, other, extra in zip(found, expected, spread or [0.0] * len(expected), strict=True)
    )


def _without_equal_nonfinite(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The tensors with 0 where both are the same infinity, or both NaN."""
    if bool(other.isfinite().all()):
        return one, other
    same = (one == other) | (one.isnan() & other.isnan())
    leave_out = same & ~other.isfinite()
    return one.masked_fill(leave_out, 0), other.masked_fill(leave_out, 0)


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether tensors agree but for rounding."""
    if not found.is_floating_point():
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
