"""A training step as one compiled graph.

The objective is traced once per batch size, Pyro's handlers, plates and distributions included, to the tensor operations of
loss, gradient and update, which are compiled by Inductor. A compiled step draws the same noise from the same generator as
the eager step, and both can be interleaved on the same optimiser.
"""

import copy
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.engine.calls import Calls
from pyro_vae.engine.guards import PythonState
from pyro_vae.engine.modes import untraced
from pyro_vae.engine.program import Graph, StepProgram
from pyro_vae.training.step import FLUSH_EVERY, EagerStep, NonFiniteStepError
from pyro_vae.training.updates import (
    AdamInGraph,
    AfterGraph,
    Slot,
    adam_takes,
    flush_moments,
    options_of,
    set_options,
)

__all__ = ["CompiledStep"]


class CompiledStep(EagerStep):
    """The same step as one graph per batch size, traced and compiled at the first batch of that size.

    What Python decides while it is traced stays decided. :meth:`begin` compares the Python state that it depends on: where
    that has changed, steps are eager until it has stayed the same from one ``begin`` to the next; then they are traced anew.
    Tensors are live, wherever they are. :class:`~pyro_vae.engine.calls.Calls` says how compiled steps are verified against
    eager ones, and what happens where they differ.

    A verified step keeps the compiled result, so that the parameters do not depend on when steps are verified. If a loss is
    not finite, the state is rolled back and the steps since the last verification are re-run eagerly; likewise if Adam's
    first moments are not finite, in which NaN and infinity of all gradients since the last check persist.

    The update is part of the graph for :class:`torch.optim.Adam` and :class:`torch.optim.AdamW`; any other optimiser steps
    after the compiled gradient.

    Args:
        sizes: batch sizes to compile; steps of other sizes run eagerly. None: all.
        say: called with a message after each compilation.
        All others: as for :class:`EagerStep`.

    Attributes:
        compile_seconds: total time of tracing and compilation.
    """

    def __init__(
        self, *args: Any, sizes: Collection[int] | None = None, say: Callable[[str], None] | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._say = say
        self._program = _Step(self, sizes)
        self._calls: Calls[_Batch, dict[str, float]] = Calls(
            self._program, what="trained eagerly", every=_CHECK_EVERY, patience=1, say=self._compiled
        )

    def _compiled(self, graph: Graph) -> None:
        self.compile_seconds += graph.seconds
        if self._say is not None:
            self._say(f"compiled for batches of {graph.about.size:,} in {graph.seconds:.1f} s")

    def begin(self) -> None:
        self._program.settle()
        self._calls.begin()

    def end(self) -> None:
        if not self.not_compiled and not self._program.is_finite():
            now = options_of(self.optimizer)
            self._telling_how_many(self._calls.rerun)
            set_options(self.optimizer, now)

    def __call__(self, index: Tensor) -> dict[str, float]:
        if self.not_compiled:
            return super().__call__(index)
        batch = _Batch(index, self.count, options_of(self.optimizer))
        self._next()
        terms = self._telling_how_many(lambda: self._calls(batch))
        self.not_compiled = self._calls.reason
        if self.count % FLUSH_EVERY == 0:
            flush_moments(self.optimizer, FLUSH_EVERY)
        return terms

    def _telling_how_many(self, call: Callable[[], dict[str, float]]) -> dict[str, float]:
        try:
            return call()
        except NonFiniteStepError as error:
            error.ago, self._calls.rolled_back = self._calls.rolled_back, 0
            raise


@dataclass
class _Batch:
    """The argument of a step: indices of the batch, number of previous steps, and options of the optimiser."""

    index: Tensor
    count: int
    options: list[dict[str, Any]]


@dataclass
class _About:
    """Data about a graph."""

    size: int
    names: list[str]  # of the terms
    update: AdamInGraph | AfterGraph


class _Step(StepProgram[_Batch, dict[str, float]]):
    def __init__(self, step: CompiledStep, sizes: Collection[int] | None) -> None:
        self.step, self.sizes = step, sizes
        self.python = PythonState(step.objective, step.data)
        self._settled, self._last = True, -1
        self._known: set[int] = set()
        self._slots = [Slot(p, step.optimizer, group) for group in step.optimizer.param_groups for p in group["params"]]
        self._in_graph = adam_takes(self._slots)
        self._updates: list[AdamInGraph | AfterGraph] = []

    def settle(self) -> None:
        """Check whether the Python state is unchanged since the last call, or is one that was compiled for."""
        token = self.python.token()
        self._settled = token in self._known or self._last in (-1, token)
        self._last = token

    def key(self, call: _Batch) -> Hashable:
        size = len(call.index)
        if not self._settled or (self.sizes is not None and size not in self.sizes):
            return None
        return size, self._last

    def inputs(self, call: _Batch) -> Sequence[Tensor]:
        return [call.index]

    def eager(self, call: _Batch) -> dict[str, float]:
        step = self.step
        step._at_step(call.count)
        terms = EagerStep._eager(step, call.index)
        self.python.rebind()
        if (call.count + 1) % FLUSH_EVERY == 0:
            flush_moments(step.optimizer, FLUSH_EVERY)
        return terms

    def trace(self, call: _Batch, noted: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Any]:
        step = self.step
        with self.python.traced():
            terms = step.objective(*step.data.batch(call.index))
        found = torch.autograd.grad(terms["loss"], step.parameters, allow_unused=True)
        pairs = [(p, g) for p, g in zip(step.parameters, found, strict=True) if g is not None]
        gradients = [g for _, g in pairs]
        if step.clip_grad_norm is not None:  # as in torch's clip_grad_norm_
            norm = torch.stack([g.norm() for g in gradients]).norm()
            scale = (step.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = [g * scale for g in gradients]
        with untraced():
            update = self._update([p for p, _ in pairs])
        with torch.no_grad():
            update.trace(gradients)
        in_graph = isinstance(update, AdamInGraph)
        self._known.add(self._last)
        numbers = [*terms.values()]
        if not in_graph:
            numbers.append(torch.stack([g.sum() for g in gradients]).sum())  # through which NaN and infinity propagate
        return numbers, [] if in_graph else gradients, _About(len(call.index), [*terms], update)

    def _update(self, parameters: Sequence[Tensor]) -> AdamInGraph | AfterGraph:
        optimizer, chosen = self.step.optimizer, {id(p) for p in parameters}
        slots = [slot for slot in self._slots if id(slot.parameter) in chosen]
        if self._in_graph:
            update: AdamInGraph | AfterGraph = AdamInGraph(slots)
        else:
            update = AfterGraph(slots, optimizer.step)
        self._updates.append(update)
        return update

    def reset(self, call: _Batch) -> None:
        set_options(self.step.optimizer, call.options)

    def after(self, graph: Graph, times: int, others: list[Tensor]) -> None:
        update = graph.about.update
        if isinstance(update, AdamInGraph):
            update.after(times, others)
        elif times:
            self.step.optimizer.zero_grad(set_to_none=True)
            update.after(times, others)

    def result(self, call: _Batch, graph: Graph, numbers: list[float], others: list[Tensor]) -> dict[str, float]:
        terms = dict(zip(graph.about.names, numbers, strict=False))
        if not (math.isfinite(terms["loss"]) and math.isfinite(numbers[-1])):
            raise NonFiniteStepError(call.index, terms["loss"])
        return terms

    def difference(self, found: dict[str, float], expected: dict[str, float]) -> str:
        if not all(map(math.isfinite, expected.values())):
            return ""  # reported by fit
        for name, value in expected.items():
            if not math.isclose(found.get(name, math.nan), value, rel_tol=1e-4, abs_tol=1e-5):
                return f"its {name} is {found.get(name)}, where the eager step has {value}"
        return ""

    def state(self) -> Iterable[Tensor]:
        yield from self.step.objective.parameters()
        yield from self.step.objective.buffers()
        for state in self.step.optimizer.state.values() if self._in_graph else ():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def save(self) -> Any:
        return None if self._in_graph else copy.deepcopy(self.step.optimizer.state_dict())

    def load(self, saved: Any) -> None:
        if not self._in_graph:
            options = options_of(self.step.optimizer)
            self.step.optimizer.load_state_dict(saved)
            set_options(self.step.optimizer, options)

    def is_finite(self) -> bool:
        return all(update.finite() for update in self._updates)

    def gradients(self, graph: Graph, call: _Batch) -> list[Tensor]:
        step, parameters = self.step, self.parameters(graph)
        step.optimizer.zero_grad(set_to_none=True)
        step._backward(call.index)
        self.python.rebind()
        if step.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(step.parameters, step.clip_grad_norm)
        gradient_factor = graph.about.update.gradient_factor
        return [torch.zeros_like(p) if p.grad is None else gradient_factor * p.grad for p in parameters]


# Steps between verifications: an eager step and a snapshot then take 0.5 % of the time.
_CHECK_EVERY = 1000
