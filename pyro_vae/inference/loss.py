"""A module that returns a loss, compiled with its gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae._checks import one_of, whole_number
from pyro_vae.engine.arguments import ArgumentReader, Arguments, explain
from pyro_vae.engine.calls import Calls
from pyro_vae.engine.gradients import Gradient, ValueAndGradient, attach
from pyro_vae.engine.guards import PythonState
from pyro_vae.engine.store import Store, has_handlers

__all__ = ["CompiledLoss", "compiled"]


class CompiledLoss(nn.Module):
    """A module that returns a loss, whose value and gradient are computed by one compiled call. Made by :func:`compiled`.

    Attributes:
        loss: the module.
        reason: why it runs eagerly; empty if it is compiled.
    """

    def __init__(self, loss: nn.Module, *, check: str = "auto", most_graphs: int = 8) -> None:
        super().__init__()
        one_of("check", check, ("auto", "always"))
        if not isinstance(loss, nn.Module):
            raise ValueError(f"compiled: expected a module, found {type(loss).__name__}. Use Trace_ELBO()(model, guide).")
        self.loss = loss
        self._start(check, whole_number("most_graphs", most_graphs))

    def _start(self, check: str, most_graphs: int) -> None:
        self._options = check, most_graphs
        self._read, self._begun, self._store = ArgumentReader(), False, Store()
        self._met: dict[int, Tensor] = {}
        program = ValueAndGradient(
            self.loss,
            PythonState(self.loss),
            parameters=self._parameters_of_loss,
            buffers=self.loss.buffers,
            recorded=self._meeting_parameters,
        )
        self._python = program.python
        self._calls: Calls[Arguments, Gradient] = Calls(
            program, what="the loss runs eagerly", every=_CHECK_EVERY if check == "auto" else 0, most=most_graphs
        )

    def __getstate__(self) -> dict[str, Any]:  # compiled code stays in its process
        return {name: value for name, value in self.__dict__.items() if name not in _OF_THIS_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start(*self._options)

    @contextmanager
    def _meeting_parameters(self) -> Iterator[None]:
        """Meets the parameters in Pyro's store that the loss uses."""
        with poutine.trace(param_only=True) as capture:
            yield
        for site in capture.trace.nodes.values():
            parameter = site["value"].unconstrained()
            self._met[id(parameter)] = parameter

    def _parameters_of_loss(self) -> list[Tensor]:
        own = {id(p): p for p in self.loss.parameters()}
        return [*{**self._met, **own}.values()]

    @property
    def reason(self) -> str:
        """Why the loss runs eagerly; empty if it is compiled."""
        return self._calls.reason

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, see the module."""
        if self.reason or not self._begun or not torch.is_grad_enabled() or has_handlers():
            with self._meeting_parameters():
                loss: Tensor = self.loss(*args, **kwargs)
            if not self._begun:
                self._begun = True
                self._python.watch_mapping(self._store, "the parameter")
            return loss
        return attach(self._calls(self._read(args, kwargs)))

    def explain(self) -> str:
        """A description of the graphs, their guards and calls, in lines; or the reason why there are none."""
        return explain(self._calls)


_CHECK_EVERY = 1000
_OF_THIS_PROCESS = ("_read", "_begun", "_store", "_met", "_python", "_calls")


def compiled(loss: nn.Module, *, check: str = "auto", most_graphs: int = 8) -> CompiledLoss:
    """A module that returns a loss, compiled: the same value and the same gradients for the same noise.

    For Pyro's idiom of an ELBO as a module with an optimiser of torch. A call returns a tensor whose ``backward()`` adds the
    gradients to those of the parameters, and which is differentiable once. The first call is eager; where a call cannot be
    compiled, all are eager, with one :class:`~pyro_vae.engine.tracing.NotCompiledWarning` that gives the reason. Calls are
    verified as those of :class:`~pyro_vae.inference.svi.CompiledSVI` are.

    Args:
        loss: a module that returns a scalar tensor, such as ``Trace_ELBO()(model, guide)``.
        check: ``"auto"``; or ``"always"``: every compiled call is compared with the eager one, for debugging.
        most_graphs: maximum number of compiled graphs, for as many shapes and kinds of arguments.

    Example:
        >>> loss = compiled(pyro.infer.Trace_ELBO()(model, guide))  # doctest: +SKIP
        >>> loss(x)  # initialises the parameters  # doctest: +SKIP
        >>> optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)  # doctest: +SKIP
        >>> for _ in range(1000):  # doctest: +SKIP
        ...     optimizer.zero_grad()
        ...     loss(x).backward()
        ...     optimizer.step()
    """
    return CompiledLoss(loss, check=check, most_graphs=most_graphs)
