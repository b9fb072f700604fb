"""Pyro's stochastic variational inference, its steps compiled whole."""

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.util import zero_grads
from pyro.optim.optim import is_scheduler
from pyro.util import warn_if_nan
from torch import Tensor
from tqdm.auto import trange

from pyro_vae._checks import one_of, whole_number
from pyro_vae.engine.arguments import ArgumentReader, Arguments, explain
from pyro_vae.engine.calls import Calls
from pyro_vae.engine.gradients import Gradient, ValueAndGradient
from pyro_vae.engine.guards import PythonState
from pyro_vae.engine.modes import UntraceableError, untraced
from pyro_vae.engine.program import Graph, NotYetError, StepProgram
from pyro_vae.engine.store import Store, has_handlers
from pyro_vae.training.updates import AdamInGraph, AfterGraph, Slot, adam_takes

__all__ = ["CompiledSVI"]

Loss = float | tuple[float, ...]


class CompiledSVI(SVI):
    """``pyro.infer.SVI`` whose steps are compiled: the same model, guide, optimiser, loss, arguments and results.

    A step is traced once, Pyro's handlers, the loss and the optimiser's update included, down to its tensor operations, and
    compiled to one call: ``loss_and_grads`` of any ELBO, with the same noise from the same generator, on the parameters in
    Pyro's store and on the optimiser's own state, so that steps of both classes may take turns. ``Adam``, ``AdamW`` and
    ``ClippedAdam``, with schedules or not, are part of the compiled step; any other optimiser steps after the compiled
    gradient, as it is.

    The first step is Pyro's own. The second is compiled, and so is the 10th with arguments of any other kind: shapes and
    types of tensors, values of all else. The compiled step is compared with Pyro's own for the same noise at its 1st, 2nd,
    4th, 8th ... call, and at every 1,000th. Where a model branches on the value of a tensor, the compiled step has the
    branch that was taken, and a guard: where the value differs, it changes nothing, and the step is Pyro's own. What
    cannot be compiled is run by Pyro's own steps, with one :class:`~pyro_vae.engine.tracing.NotCompiledWarning` that gives
    the reason: a model that changes Python state as it runs, draws from Python's or NumPy's random numbers, or reads the
    clock.

    Args:
        model: Pyro program.
        guide: Pyro program.
        optim: of ``pyro.optim``.
        loss: an ELBO of ``pyro.infer``, or a function, see ``pyro.infer.SVI``.
        loss_and_grads: see ``pyro.infer.SVI``.
        check: ``"auto"``, as above; ``"always"``: every compiled step is compared, for debugging.
        most_graphs: compiled steps that are kept, for as many kinds of arguments; the one not used for longest goes first.

    Attributes:
        reason: why steps are Pyro's own; empty if they are compiled.

    Raises:
        ValueError: no ``PyroOptim``; or no such ``check``.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> svi = CompiledSVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        >>> losses = svi.run(300, torch.tensor([1.0, 2.0, 3.0]), progress_bar=False)  # doctest: +SKIP
        >>> pyro.param("loc").item()  # doctest: +SKIP
        2.0
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: Any,
        loss_and_grads: Callable[..., Any] | None = None,
        *,
        check: str = "auto",
        most_graphs: int = 8,
    ) -> None:
        one_of("check", check, ("auto", "always"))
        super().__init__(model, guide, optim, loss, loss_and_grads)
        self._program = _Step(self)
        self._calls: Calls[_Call, Loss] = Calls(
            self._program,
            what="SVI is run by Pyro's own steps",
            every=_CHECK_EVERY if check == "auto" else 0,
            most=whole_number("most_graphs", most_graphs),
        )
        self._program.calls = self._calls
        python = PythonState(model, guide, self.loss)
        for name in ("model", "guide", "loss"):
            python.watch(vars(self), name, name)
        python.watch_mapping(Store(), "the parameter")
        self._losses: Calls[Arguments, Gradient] = Calls(
            ValueAndGradient(self._evaluate, python, parameters=tuple), what="losses are evaluated by Pyro itself", first=10
        )
        self._read = ArgumentReader()
        self._has_several: bool | None = None  # losses; not known before the first evaluation

    @property
    def reason(self) -> str:
        """Why steps are Pyro's own; empty if they are compiled."""
        return self._calls.reason

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step, see ``pyro.infer.SVI.step``: the loss."""
        return self._calls(self._program.arguments(args, kwargs))

    def run(self, num_steps: int, *args: Any, progress_bar: bool = True, **kwargs: Any) -> Tensor:
        """Several steps with the same arguments, many of them in one call of the compiled step.

        Args:
            num_steps: how many.
            args: of model and guide.
            progress_bar: show one, with the mean of the last losses.
            kwargs: of model and guide.

        Returns:
            The losses: ``(num_steps,)``, float64; ``(num_steps, 2)`` of a loss that has two, such as ReweightedWakeSleep's.
        """
        num_steps = whole_number("num_steps", num_steps)
        call = self._program.arguments(args, kwargs)
        losses: list[Loss] = []
        with trange(num_steps, disable=not progress_bar) as bar:
            while len(losses) < num_steps:
                some = self._calls.run(call, min(_AT_ONCE, num_steps - len(losses)))
                losses += some
                bar.update(len(some))
                bar.set_postfix_str(f"loss {torch.tensor(some).mean(0).tolist():.4g}" if isinstance(some[0], float) else "")
        return torch.tensor(losses, dtype=torch.float64)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss without a step, see ``pyro.infer.SVI.evaluate_loss``; the 10th evaluation is compiled."""
        if not self._program.has_begun or self._losses.reason or self._has_several is not False:
            loss = super().evaluate_loss(*args, **kwargs)
            self._has_several = isinstance(loss, tuple)
            return loss
        return self._losses(self._read(args, kwargs)).value.item()

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.loss(self.model, self.guide, *args, **kwargs)

    def explain(self) -> str:
        """A description of the graphs, their guards and calls, in lines; or the reason why there are none."""
        return explain(self._calls)


_CHECK_EVERY = 1000
_AT_ONCE = 500  # steps, after which a progress bar moves and a KeyboardInterrupt is seen


@dataclass
class _Call:
    """A call of ``step``: its arguments, and the learning rates and betas of the optimisers at that time."""

    arguments: Arguments
    rates: list[tuple[dict[str, Any], float, Any]]


@dataclass
class _About:
    """What is kept of a graph."""

    update: AdamInGraph | AfterGraph
    kind: type  # of the loss


class _Step(StepProgram[_Call, Loss]):
    calls: Calls[_Call, Loss]

    def __init__(self, svi: SVI) -> None:
        self.svi = svi
        self.python = PythonState(svi.model, svi.guide, svi.loss)
        for name in ("model", "guide", "optim", "loss", "loss_and_grads"):
            self.python.watch(vars(svi), name, name)
        self._store = Store()
        self._begun = False
        self._gradients: dict[int, Tensor] = {}  # of the last step, by parameter, for optimisers that are not in a graph
        self._held: dict[str, Tensor] = {}  # by Pyro's store, after the last eager step
        self._read = ArgumentReader()

    # --- what it is called with ---

    def arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> _Call:
        if self.calls.reason:
            return _Call(Arguments(args, kwargs, [], ()), [])
        return _Call(self._read(args, kwargs), self._rates())

    @property
    def has_begun(self) -> bool:
        """Whether there was a step, which makes the parameters."""
        return self._begun

    def _rates(self) -> list[tuple[dict[str, Any], float, Any]]:
        return [(g, g["lr"], g.get("betas")) for o in self._optimizers() for g in o.param_groups if "lr" in g]

    def key(self, call: _Call) -> Hashable:
        if not self._begun or has_handlers() or not torch.is_grad_enabled():
            return None  # the first step, which makes parameters; or handlers around it
        return self.python.token(), call.arguments.key, torch.get_default_dtype()

    def inputs(self, call: _Call) -> Sequence[Tensor]:
        return call.arguments.tensors

    # --- eager and traced ---

    def eager(self, call: _Call) -> Loss:
        with self._keeping_gradients():
            loss: Loss = SVI.step(self.svi, *call.arguments.args, **call.arguments.kwargs)
        self.python.rebind()
        params = pyro.get_param_store()._params
        changed = len(params) != len(self._held) or any(params.get(name) is not p for name, p in self._held.items())
        if changed or not self._begun:
            self._held, self._begun = dict(params), True
            self.python.watch_mapping(self._store, "the parameter")
            self.calls.begin()
        return loss

    @contextmanager
    def _keeping_gradients(self) -> Iterator[None]:
        """Keeps the gradients on which optimisers step that are not in a graph: Pyro's step sets them to zero."""
        updates = [graph.about.update for graph in self.calls.graphs.values()]
        parameters = {id(s.parameter): s.parameter for u in updates if isinstance(u, AfterGraph) for s in u.slots}

        def keep(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._gradients[id(parameter)] = parameter.grad.clone()

        self._gradients = {place: torch.zeros_like(p) for place, p in parameters.items()}
        hooks = [p.register_post_accumulate_grad_hook(keep) for p in parameters.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def reset(self, call: _Call) -> None:
        for group, lr, betas in call.rates:
            group.update({"lr": lr} if betas is None else {"lr": lr, "betas": betas})

    def trace(self, call: _Call, noted: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Any]:
        params, svi = dict(pyro.get_param_store()._params), self.svi
        with self.python.traced():
            with poutine.trace(param_only=True) as capture:
                loss = svi.loss_and_grads(svi.model, svi.guide, *call.arguments.args, **call.arguments.kwargs)
            self._restore_store(params)
        values = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
        parameters = list({id(p): p for p in values}.values())
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if noted and parameters:
            found = torch.autograd.grad(sum(noted[1:], noted[0]), parameters, allow_unused=True)
        # A gradient of zeros that an earlier step has left is one for the optimiser.
        pairs = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None or p.grad is not None]
        gradients = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        with untraced():
            update = self._update([p for p, _ in pairs], parameters)
        with torch.no_grad():
            update.trace(gradients)
        losses = loss if isinstance(loss, tuple) else (loss,)
        numbers = [n if isinstance(n, Tensor) else torch.tensor(float(n)) for n in losses]
        return numbers, gradients if isinstance(update, AfterGraph) else [], _About(update, type(loss))

    @staticmethod
    def _restore_store(params: dict[str, Tensor]) -> None:
        store = pyro.get_param_store()
        if store._params.keys() != params.keys() or any(store._params[name] is not p for name, p in params.items()):
            store._params.clear()
            store._params.update(params)
            store._param_to_name = {p: name for name, p in params.items()}
            raise UntraceableError("it puts parameters into Pyro's store, or replaces them there, as it runs")

    def _update(self, parameters: Sequence[Tensor], all_of_them: Sequence[Tensor]) -> AdamInGraph | AfterGraph:
        optim = self.svi.optim
        slots = [self._slot(p) for p in parameters]
        if not adam_takes(slots) or any(optim.grad_clip.get(p) for p in all_of_them):

            def step() -> None:
                optim(all_of_them)
                zero_grads(all_of_them)

            return AfterGraph(slots, step)
        for slot in slots:
            self.python.watch(optim.optim_objs, slot.parameter, "an optimiser")
            for name in ("state", "param_groups"):
                self.python.watch(vars(slot.optimizer), name, f"the {name} of an optimiser", by_identity=True)
            for name in slot.group.keys() - {"lr", "betas", "params"}:
                self.python.watch(slot.group, name, f"{name} of an optimiser")
        update = AdamInGraph(slots)
        for slot in slots:
            self.python.watch(slot.optimizer.state, slot.parameter, "the state of an optimiser", by_identity=True)
            for name in ("exp_avg", "exp_avg_sq"):
                self.python.watch(slot.state, name, f"{name} of an optimiser")
        return update

    def _slot(self, parameter: Tensor) -> Slot:
        optimizer = self.svi.optim.optim_objs.get(parameter)
        if optimizer is None:
            raise NotYetError("a parameter has no optimiser yet")
        optimizer = optimizer.optimizer if is_scheduler(optimizer) else optimizer
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        return Slot(parameter, optimizer, group)

    # --- around compiled calls ---

    def after(self, graph: Graph, times: int, others: list[Tensor]) -> None:
        if isinstance(graph.about.update, AfterGraph):
            self._gradients = {id(p): g.clone() for p, g in zip(self.parameters(graph), others, strict=True)}
        if times:
            graph.about.update.after(times, others)

    def gradient_copies(self, graph: Graph) -> list[Tensor]:
        if isinstance(graph.about.update, AfterGraph):
            return [self._gradients[id(p)] for p in self.parameters(graph)]
        return super().gradient_copies(graph)

    def at_once(self, graph: Graph) -> bool:
        return isinstance(graph.about.update, AdamInGraph)

    def result(self, call: _Call, graph: Graph, numbers: list[float], others: list[Tensor]) -> Loss:
        kind = graph.about.kind
        warn_if_nan(numbers[0], "loss")  # as the ELBO does
        if not issubclass(kind, tuple):
            return numbers[0]
        return tuple(numbers) if kind is tuple else kind(*numbers)

    def difference(self, found: Loss, expected: Loss) -> str:
        one, other = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
        same = torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
        return "" if same else f"its loss is {found}, where the eager step has {expected}"

    def state(self) -> Iterable[Tensor]:
        yield from pyro.get_param_store()._params.values()
        yield from self.svi.optim.optim_objs  # module_local_params: those that modules hold alone
        for optimizer in self._optimizers():
            for state in optimizer.state.values() if _is_adam(optimizer) else ():
                yield from (t for t in state.values() if isinstance(t, Tensor))

    def save(self) -> Any:
        """The states of optimisers; of Adam, the counts and rates that Python holds."""
        return [(o, _numbers_of(o) if _is_adam(o) else copy.deepcopy(o.state_dict())) for o in self._optimizers()]

    def load(self, saved: Any) -> None:
        for optimizer, kept in saved:
            if _is_adam(optimizer):
                _set_numbers(optimizer, kept)
            else:
                optimizer.load_state_dict(kept)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [o.optimizer if is_scheduler(o) else o for o in self.svi.optim.optim_objs.values()]

    def gradients(self, graph: Graph, call: _Call) -> list[Tensor]:
        parameters = self.parameters(graph)
        zero_grads(parameters)
        self.svi.loss_and_grads(self.svi.model, self.svi.guide, *call.arguments.args, **call.arguments.kwargs)
        self.python.rebind()
        gradient_factor = graph.about.update.gradient_factor
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad * gradient_factor for p in parameters]
        zero_grads(parameters)
        return gradients


def _is_adam(optimizer: torch.optim.Optimizer) -> bool:
    return adam_takes([Slot(p, optimizer, group) for group in optimizer.param_groups for p in group["params"]])


def _numbers_of(optimizer: torch.optim.Optimizer) -> Any:
    rates = [(group["lr"], group["betas"]) for group in optimizer.param_groups]
    return rates, [(state, state["step"]) for state in optimizer.state.values() if not isinstance(state.get("step"), Tensor)]


def _set_numbers(optimizer: torch.optim.Optimizer, numbers: Any) -> None:
    for group, (lr, betas) in zip(optimizer.param_groups, numbers[0], strict=True):
        group.update(lr=lr, betas=betas)
    for state, step in numbers[1]:
        state["step"] = step
