"""A step of training as one compiled graph.

It traces the objective once per batch size, Pyro's handlers, plates and distributions included, down to the
tensor operations of loss, gradient and update, and compiles these by Inductor. Nothing of Pyro is left in it. It draws the
same noise from the same generator as the eager step, and the two may take turns on the same optimiser.
"""

import math
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.engine.guards import held_by
from pyro_vae.engine.tracing import Compiled, NotCompiledWarning, UntraceableError, compiled, reason_of
from pyro_vae.training.step import FLUSH_EVERY, EagerStep, NonFiniteStepError
from pyro_vae.training.updates import flush_moments, options_of, set_options, update_of

__all__ = ["CompiledStep"]


@dataclass
class _Graph:
    call: Compiled
    names: list[str]  # of the terms
    trained: list[int]  # the places of parameters that have a gradient
    steps: int = 0  # made of it


@dataclass
class _Copy:
    """All that a step changes."""

    tensors: list[Tensor]
    update: Any


class CompiledStep(EagerStep):
    """The same as one graph per batch size, traced and compiled when that size is first seen.

    What Python decides while it is traced stays decided until :meth:`begin`, which looks at what all modules hold beside
    their tensors (a flag, a number). Where that has changed, steps are eager until it has stayed the same from one
    ``begin`` to the next; then they are traced anew. Tensors are live, wherever they are. An objective that cannot be
    traced, because it decides by the value of
    a tensor or changes Python's state as it goes, is trained eagerly, with one :class:`NotCompiledWarning`. So is one
    whose compiled step does not equal the eager one for the same noise, which is checked at steps 1, 2, 4, 8 and so on, at
    the first after ``begin``, and every 1,000 steps. What counts in these steps is the compiled one, so that the weights do
    not depend on when there was a check.

    A difference as large as rounding makes it is no fault of the graph: a ReLU at its kink passes all of an image's gradient
    or none, as the last digit of its input has it. The check finds how far the eager gradient itself moves when the
    parameters move by their last digit, and allows for that.

    A copy is kept at ``begin`` and every 1,000 steps, and where a check fails, the steps since then are made again, eagerly.
    So they are where a loss is not finite, or Adam's first moments are not, which keep every NaN and infinity of a
    gradient, so that a look at them before each copy tells of all steps since the last.

    The update is part of the graph for :class:`torch.optim.Adam` without weight decay; any other optimiser steps after the
    compiled gradient, as it is.

    Args:
        sizes: batch sizes to compile; the others are stepped eagerly. None: all.
        say: called with a line for people when something has been compiled.
        All others: as for :class:`EagerStep`.

    Attributes:
        compile_seconds: spent on tracing and compiling so far.
    """

    def __init__(
        self, *args: Any, sizes: Collection[int] | None = None, say: Callable[[str], None] | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._sizes, self._say = sizes, say
        self._all_graphs: dict[Any, dict[int, _Graph]] = {}  # by what the modules hold, then by batch size
        self._last_held: Any = None  # by the modules, at the last begin()
        self._update = update_of(self.optimizer, self.parameters)

    def begin(self) -> None:
        held = held_by(self.objective)
        self._settled = held in self._all_graphs or self._last_held in (None, held)
        self._last_held = held
        self._graphs = self._all_graphs.setdefault(held, {}) if self._settled else {}
        self._keep()

    def end(self) -> None:
        self._verify()
        self._update.settle()

    def __call__(self, index: Tensor) -> dict[str, float]:
        if self.not_compiled:
            return super().__call__(index)
        self._since.append((index, torch.get_rng_state(), self.count, options_of(self.optimizer)))
        self._next()
        try:
            terms = self._step(index)
        except NonFiniteStepError:  # by this step, or by one before it that nobody has looked at
            terms = self._again()
        if not math.isfinite(terms["loss"]):
            terms = self._again()
        if self.count % FLUSH_EVERY == 0:
            flush_moments(self.optimizer, FLUSH_EVERY)
        if self.count % _KEEP_EVERY == 0:
            self._verify()
            self._keep()
        return terms

    def _step(self, index: Tensor) -> dict[str, float]:
        size = index.shape[0]
        if not (self._settled and (self._sizes is None or size in self._sizes)):
            return self._eager(index)
        graph = self._graphs.get(size)
        if graph is None or size not in self._checked or (graph.steps & (graph.steps - 1)) == 0:  # a power of two were made
            self._checked.add(size)
            return self._check(size, index)
        return self._run(graph, index)

    def _run(self, graph: _Graph, index: Tensor) -> dict[str, float]:
        graph.steps += 1
        with torch.no_grad():
            values, *gradients = graph.call(*self._arguments, self._update.numbers(), *self._held_data, index)
        *numbers, total = values.tolist()
        terms = dict(zip(graph.names, numbers, strict=True))
        if not math.isfinite(total):
            raise NonFiniteStepError(index, terms["loss"])
        self._update.after(graph.trained, gradients)
        return terms

    def _eager(self, index: Tensor) -> dict[str, float]:
        self._update.settle()
        terms = super()._eager(index)
        self._update.made([place for place, p in enumerate(self.parameters) if p.grad is not None])
        self._look_up()
        return terms

    def _look_up(self) -> None:
        """The tensors as they are now: optimisers make theirs at the first gradient, and forward() may rebind buffers."""
        self._live = [*self.objective.parameters(), *self.objective.buffers(), *self._update.tensors()]
        self._arguments = [t.detach() for t in self._live]
        self._held_data = list(self.data.held)

    def _copy(self) -> _Copy:
        return _Copy([t.detach().clone() for t in self._live], self._update.copy())

    def _restore(self, copied: _Copy) -> None:
        self._look_up()
        with torch.no_grad():
            for tensor, kept in zip(self._live, copied.tensors, strict=True):
                tensor.copy_(kept)
        self._update.restore(copied.update)

    def _keep(self) -> None:
        """A copy to go back to, and from here on what it takes to make the steps again."""
        self._look_up()
        self._kept = self._copy()
        self._since: list[tuple[Tensor, Tensor, int, list[dict[str, Any]]]] = []
        self._checked: set[int] = set()  # batch sizes

    def _verify(self) -> None:
        if not self.not_compiled and not self._update.finite():
            self._again()

    def _again(self) -> dict[str, float]:
        """The steps since the copy, eagerly, which raises at the first that is not finite; the terms of the last one."""
        self._restore(self._kept)
        options_now = options_of(self.optimizer)
        with torch.random.fork_rng(devices=[]):
            for made, (index, noise, count, options) in enumerate(self._since, start=1):
                torch.set_rng_state(noise)
                set_options(self.optimizer, options)
                self._at_step(count)
                try:
                    terms = self._eager(index)
                except NonFiniteStepError as error:
                    error.ago = len(self._since) - made
                    raise
                if (count + 1) % FLUSH_EVERY == 0:
                    flush_moments(self.optimizer, FLUSH_EVERY)
        set_options(self.optimizer, options_now)
        return terms

    def _check(self, size: int, index: Tensor) -> dict[str, float]:
        """The eager step, and the compiled one from where it began with the same noise, which is the one that counts."""
        noise, before = torch.get_rng_state(), self._copy()
        terms = self._eager(index)
        after, eager, moved = torch.get_rng_state(), self._copy(), self._update.moved()
        try:
            if size not in self._graphs:
                self._restore(before)
                torch.set_rng_state(noise)
                self._graphs[size] = self._compile(index)
            self._restore(before)
            torch.set_rng_state(noise)
            found = self._run(self._graphs[size], index)
        except Exception as error:  # whatever Python, Pyro, the tracer and the compiler raise
            self._restore(eager)
            torch.set_rng_state(after)
            self._verify()
            self._give_up(reason_of(error))
            return terms
        problem = _other_terms(found, terms) or self._other_buffers(eager)
        if not problem and not self._near(self._update.moved(), moved):
            compiled, found_noise = self._copy(), torch.get_rng_state()
            problem = "" if self._is_rounding(before, noise, index, self._update.moved(), moved) else _GRADIENT
            self._restore(compiled)
            torch.set_rng_state(found_noise)
        if problem:
            self._restore(eager)
            torch.set_rng_state(after)
            self._give_up(f"compiled, {problem}")
            return self._again()
        return found

    def _near(self, found: Sequence[Tensor], expected: Sequence[Tensor], spread: Sequence[float] | None = None) -> bool:
        size = torch.stack([m.norm() for m in expected]).norm()
        return all(
            bool((one - other).norm() <= 1e-3 * other.norm() + 1e-4 * size + extra)  # 1e-4: of rounding errors alone
            for one, other, extra in zip(found, expected, spread or [0.0] * len(expected), strict=True)
        )

    def _is_rounding(
        self, before: _Copy, noise: Tensor, index: Tensor, found: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> bool:
        """Whether the eager gradient moves as far when the parameters move by their last digits."""
        generator = torch.Generator().manual_seed(self.count)
        gradients = []
        for trial in range(9):
            self._restore(before)
            with torch.no_grad():
                for p in self.parameters if trial else ():
                    digits = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 2 * torch.finfo(p.dtype).eps
                    p.mul_(1 + digits)
            torch.set_rng_state(noise)
            self.optimizer.zero_grad(set_to_none=True)
            self._backward(index)
            if self.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.clip_grad_norm)
            gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters])
        spread = [
            2 * self._update.share * max((other - one).norm().item() for other in others)
            for one, *others in zip(*gradients, strict=True)
        ]
        return self._near(found, expected, spread)

    def _other_buffers(self, eager: _Copy) -> str:
        first = len(list(self.objective.parameters()))
        places = range(first, first + len(list(self.objective.buffers())))
        pairs = [(self._live[place], eager.tensors[place]) for place in places]
        same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs)
        return "" if same else "its buffers are not those of the eager step"

    def _give_up(self, reason: str) -> None:
        self.not_compiled = reason
        warnings.warn(f"trained eagerly, not compiled: {reason}", NotCompiledWarning, stacklevel=6)

    def _compile(self, index: Tensor) -> _Graph:
        """Traces a step, which runs it: the caller restores what it changes."""
        start = time.perf_counter()
        names: list[str] = []
        trained: list[int] = []
        numbers = self._update.numbers()
        self._look_up()

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:  # known again wherever they are met, as objects
            bound = [(module, name, b) for module in self.objective.modules() for name, b in module._buffers.items()]
            terms = self.objective(*self.data.batch(index))
            for module, name, old in bound:
                _rebind(module, name, old)
            gradients = torch.autograd.grad(terms["loss"], self.parameters, allow_unused=True)
            names[:] = terms
            trained[:] = [place for place, g in enumerate(gradients) if g is not None]
            some = [gradients[place] for place in trained]
            if self.clip_grad_norm is not None:  # as torch's clip_grad_norm_ does it
                norm = torch.stack([g.norm() for g in some]).norm()
                scale = (self.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                some = [g * scale for g in some]
            with torch.no_grad():
                total, *rest = self._update.trace(trained, some, numbers)
            values = [value.detach() for value in terms.values()]
            return torch.stack([*values, terms["loss"].detach() if total is None else total]), *rest

        held = held_by(self.objective)
        call = compiled(function, [*self._live, numbers, *self._held_data, index])
        if held_by(self.objective) != held:
            raise UntraceableError("the objective changes its own Python attributes in forward()")
        seconds = time.perf_counter() - start
        self.compile_seconds += seconds
        if self._say is not None:
            self._say(f"compiled for batches of {len(index):,} in {seconds:.1f} s")
        return _Graph(call, names, trained)


_GRADIENT = "its gradient is not that of the eager step"


def _rebind(module: nn.Module, name: str, old: Tensor | None) -> None:
    """A buffer that forward() has put another tensor in the place of: its value goes into the old one."""
    new = module._buffers[name]
    if new is old:
        return
    if old is None or new is None or (new.shape, new.dtype) != (old.shape, old.dtype):
        raise UntraceableError(f"the buffer {name} changes its shape or type in forward()")
    old.copy_(new.detach())
    module._buffers[name] = old


def _other_terms(found: dict[str, float], terms: dict[str, float]) -> str:
    """Which term of a compiled step differs from the eager one's by more than rounding; empty if none does."""
    if not all(map(math.isfinite, terms.values())):
        return ""  # for fit to tell
    for name, value in terms.items():
        if not math.isclose(found.get(name, math.nan), value, rel_tol=1e-4, abs_tol=1e-5):
            return f"its {name} is {found.get(name)}, where the eager step has {value}"
    return ""


# One eager step and a copy in so many compiled ones: 0.5 % of the time.
_KEEP_EVERY = 1000
