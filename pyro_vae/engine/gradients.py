"""A scalar function and its gradient as one compiled call, which autograd takes for the function."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_vae.engine.arguments import Arguments
from pyro_vae.engine.function import trace_program
from pyro_vae.engine.guards import PythonState
from pyro_vae.engine.program import Graph, Program
from pyro_vae.engine.store import has_handlers

__all__ = ["Gradient", "ValueAndGradient", "attach"]


@dataclass
class Gradient:
    """The value of a function, and its gradient.

    Args:
        value: a scalar.
        tensors: those with respect to which the gradient is.
        gradients: one for each of them.
    """

    value: Tensor
    tensors: Sequence[Tensor]
    gradients: Sequence[Tensor]


@dataclass
class _About:
    tensors: Sequence[Tensor] | None  # None: the inputs
    dtype: torch.dtype


class ValueAndGradient(Program[Arguments, Gradient]):
    """The value of a function at its arguments, and its gradient.

    Args:
        function: of the arguments, to a scalar tensor, or to a float for which no gradient is wanted.
        python: the Python state on which it depends.
        parameters: returns the tensors with respect to which the gradient is, where they require one; None: the tensors
            among the arguments.
        buffers: returns the tensors that the function may mutate.
        recorded: a context in which it runs, which adds to the parameters.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        python: PythonState,
        *,
        parameters: Callable[[], Iterable[Tensor]] | None = None,
        buffers: Callable[[], Iterable[Tensor]] = tuple,
        recorded: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._function, self._parameters, self._buffers, self._recorded = function, parameters, buffers, recorded
        self.python = python
        self.stateless = parameters is None
        self._gradients: Sequence[Tensor] = ()  # of the last call
        self._token, self._all = -1, list[Tensor]()

    def key(self, call: Arguments) -> Hashable:
        if has_handlers():
            return None
        if (token := self.python.token()) != self._token:
            self._token, self._all = token, [*self._parameters()] if self._parameters is not None else []
        return token, call.key, torch.get_default_dtype(), tuple(p.requires_grad for p in self._all)

    def inputs(self, call: Arguments) -> Sequence[Tensor]:
        return call.tensors

    def eager(self, call: Arguments) -> Gradient:
        result = self._evaluate(call)
        self.python.rebind()
        self._gradients = result.gradients
        return result

    def _evaluate(self, call: Arguments) -> Gradient:
        with torch.enable_grad():
            with self._recorded():
                value = self._function(*call.args, **call.kwargs)
            if not isinstance(value, Tensor):
                value = torch.tensor(float(value), dtype=torch.float64)
            tensors = call.tensors if self._parameters is None else [p for p in self._parameters() if p.requires_grad]
            return Gradient(value.detach(), tensors, _gradients(value, tensors))

    def trace(self, call: Arguments, noted: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Any]:
        result: Gradient = trace_program(self.python, lambda: self._evaluate(call), noted)
        about = _About(None if self._parameters is None else result.tensors, result.value.dtype)
        return [result.value], result.gradients, about

    def result(self, call: Arguments, graph: Graph, numbers: list[float], others: list[Tensor]) -> Gradient:
        about = graph.about
        self._gradients = others
        return Gradient(
            torch.tensor(numbers[0], dtype=about.dtype), call.tensors if about.tensors is None else about.tensors, others
        )

    def difference(self, found: Gradient, expected: Gradient) -> str:
        same = torch.allclose(found.value.double(), expected.value.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
        return "" if same else f"it is {found.value.item()}, where the eager call gives {expected.value.item()}"

    def state(self) -> Iterable[Tensor]:
        if self._parameters is not None:
            yield from self._parameters()
        yield from self._buffers()

    def parameters(self, graph: Graph) -> list[Tensor]:
        return [*(graph.about.tensors or ())]

    def gradient_copies(self, graph: Graph) -> list[Tensor]:
        return [*self._gradients]

    def gradients(self, graph: Graph, call: Arguments) -> list[Tensor]:
        result = self._evaluate(call)
        self.python.rebind()
        return [*result.gradients]


def _gradients(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    if not tensors or not value.requires_grad:
        return [torch.zeros_like(t) for t in tensors]
    found = torch.autograd.grad(value, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def attach(result: Gradient) -> Tensor:
    """The value as a tensor whose ``backward()`` gives the gradients; only once differentiable."""
    value: Tensor = _Attached.apply(result.value, result.gradients, *result.tensors)
    return value


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None, *torch._foreach_mul(ctx.gradients, gradient)
