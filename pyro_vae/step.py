"""One step of training: batch, loss, backward, Adam; eager, or all of it as one compiled graph.

A compiled step traces the objective once per batch size, Pyro's handlers, plates and distributions included, down to the
tensor operations of loss, gradient and update, and compiles these by Inductor. Nothing of Pyro is left in it. It draws the
same noise from the same generator as the eager step, and the two may take turns on the same optimiser.
"""

import math
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.compiling import NotCompiledWarning, UntraceableError, inductor, reason_of, trace
from pyro_vae.data import Data
from pyro_vae.objectives import Objective

__all__ = ["NOT_TERMS", "CompiledStep", "EagerStep", "NonFiniteStepError"]

# What fit adds to an objective's terms in its records.
NOT_TERMS = ("epoch", "step", "seconds", "images_per_second", "compile_seconds", "test")


class NonFiniteStepError(Exception):
    """A loss or gradient that is not finite; parameters and moments are those before that step.

    Attributes:
        index: of the batch.
        loss: on it.
        ago: steps made after it, and undone with it.
    """

    def __init__(self, index: Tensor, loss: float) -> None:
        super().__init__(f"loss {loss:g}, or its gradient")
        self.index, self.loss, self.ago = index, loss, 0


class EagerStep:
    """``step(index)``: one step of Adam on the batch at these places of the data. Returns the objective's terms.

    Args:
        objective: see :class:`~pyro_vae.objectives.Objective`.
        data: observations, on the device of the parameters.
        optimizer: Adam, one group; after steps made before, its state is theirs.
        clip_grad_norm: the gradient is scaled down to this norm, over all parameters, where it is longer. None: it is not.
        done: steps made before.

    Attributes:
        not_compiled: why an objective that was to be compiled is trained eagerly, if it is.

    Raises:
        NonFiniteStepError: by a step, or by :meth:`end`.
    """

    def __init__(
        self,
        objective: Objective,
        data: Data,
        optimizer: torch.optim.Adam,
        *,
        clip_grad_norm: float | None = None,
        done: int = 0,
    ) -> None:
        self.objective, self.data, self.optimizer = objective, data, optimizer
        self.parameters: list[nn.Parameter] = optimizer.param_groups[0]["params"]
        self.clip_grad_norm, self.count = clip_grad_norm, done
        self.compile_seconds = 0.0
        self.not_compiled = ""

    def begin(self) -> None:
        """Before steps in which nothing but the parameters, buffers and learning rate changes."""

    def end(self) -> None:
        """After them: the optimiser's state is all up to date, and every step was finite."""

    def __call__(self, index: Tensor) -> dict[str, float]:
        self.count += 1
        terms = self._eager(index)
        if self.count % _FLUSH_EVERY == 0:
            _flush(self.optimizer)
        return terms

    def _eager(self, index: Tensor) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._backward(index)
        # NaN and infinity survive a sum, so one number tells, and one read brings everything here.
        total = torch.stack([terms["loss"], *(p.grad.sum() for p in self.parameters if p.grad is not None)]).sum()
        *numbers, total = torch.stack([*terms.values(), total]).detach().tolist()
        values = dict(zip(terms, numbers, strict=True))
        if not math.isfinite(total):
            raise NonFiniteStepError(index, values["loss"])
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_grad_norm)
        self.optimizer.step()
        return values

    def _backward(self, index: Tensor) -> dict[str, Tensor]:
        """The objective's terms on a batch; the gradient of its loss goes into the parameters."""
        terms = self.objective(*self.data.batch(index))
        if self.count == 1:
            _check_terms(self.objective, terms)
        terms["loss"].backward()
        return terms


class CompiledStep(EagerStep):
    """The same as one graph per batch size, traced and compiled when that size is first seen.

    What Python decides while it is traced stays decided until :meth:`begin`, which looks at what all modules hold beside
    their tensors (the weight of a KL, say). Where that has changed, steps are eager until it has stayed the same from one
    ``begin`` to the next; then they are traced anew. An objective that cannot be traced, because it decides by the value of
    a tensor or changes Python's state as it goes, is trained eagerly, with one :class:`NotCompiledWarning`. So is one
    whose compiled step does not equal the eager one for the same noise, which is checked at steps 1, 2, 4, 8 and so on, at
    the first after ``begin``, and every 1,000 steps. What counts in these steps is the compiled one, so that the weights do
    not depend on when there was a check.

    A copy is kept at ``begin`` and every 1,000 steps, and where a check fails, the steps since then are made again, eagerly.
    So they are where a loss is not finite, or Adam's first moments are not, which keep every NaN and infinity of a
    gradient, so that a look at them before each copy tells of all steps since the last.

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
        objective, optimizer = self.objective, self.optimizer
        self._sizes, self._say = sizes, say
        self._all_graphs: dict[Any, dict[int, _Graph]] = {}  # by what the modules hold, then by batch size
        self._last_held: Any = None  # by the modules, at the last begin()
        # Made by the optimiser.
        self._updates = [int(state["step"]) if (state := optimizer.state.get(p)) else 0 for p in self.parameters]
        self._names = [name for name, _ in (*objective.named_parameters(), *objective.named_buffers())]
        # These stand for Adam's moments until it makes them.
        self._zeros = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters}
        self._kept = [torch.empty_like(t) for t in self._state()]

    def begin(self) -> None:
        held = _held(self.objective)
        self._settled = held in self._all_graphs or self._last_held in (None, held)
        self._last_held = held
        self._graphs = self._all_graphs.setdefault(held, {}) if self._settled else {}
        self._keep()

    def end(self) -> None:
        self._verify()
        self._count_updates()

    def __call__(self, index: Tensor) -> dict[str, float]:
        if self.not_compiled:
            return super().__call__(index)
        self.count += 1
        self._since.append((index, torch.get_rng_state()))
        try:
            terms = self._step(index)
        except NonFiniteStepError:  # by this step, or by one before it that nobody has looked at
            terms = self._again()
        if not math.isfinite(terms["loss"]):
            terms = self._again()
        if self.count % _FLUSH_EVERY == 0:
            _flush(self.optimizer)
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
        graph.steps += 1
        with torch.no_grad():
            (values,) = graph.call(*self._arguments, self._scalars(), *self.data.held, index)
        for place in graph.updates:
            self._updates[place] += 1
        return dict(zip(graph.names, values.tolist(), strict=True))

    def _eager(self, index: Tensor) -> dict[str, float]:
        self._count_updates()
        terms = super()._eager(index)
        for place, p in enumerate(self.parameters):
            self._updates[place] += p.grad is not None
        self._arguments = self._state()  # Adam makes its moments at a parameter's first gradient
        return terms

    def _count_updates(self) -> None:
        for p, updates in zip(self.parameters, self._updates, strict=True):
            if state := self.optimizer.state.get(p):
                state["step"].fill_(updates)

    def _keep(self) -> None:
        """A copy to go back to, and from here on what it takes to make the steps again: batches and states of the noise."""
        self._arguments = self._state()
        for kept, tensor in zip(self._kept, self._arguments, strict=True):
            kept.copy_(tensor)
        self._kept_updates = list(self._updates)
        self._since: list[tuple[Tensor, Tensor]] = []
        self._checked: set[int] = set()  # batch sizes

    def _verify(self) -> None:
        firsts = self._arguments[-2 * len(self.parameters) : -len(self.parameters)]
        if not self.not_compiled and not torch.stack([first.sum() for first in firsts]).sum().isfinite():
            self._again()

    def _again(self) -> dict[str, float]:
        """The steps since the copy, eagerly, which raises at the first that is not finite; the terms of the last one."""
        for tensor, kept in zip(self._arguments, self._kept, strict=True):
            tensor.copy_(kept)
        self._updates = list(self._kept_updates)
        with torch.random.fork_rng(devices=[]):
            for made, (index, noise) in enumerate(self._since, start=1):
                torch.set_rng_state(noise)
                try:
                    terms = self._eager(index)
                except NonFiniteStepError as error:
                    error.ago = len(self._since) - made
                    raise
        return terms

    def _check(self, size: int, index: Tensor) -> dict[str, float]:
        """The eager step, and the compiled one from where it began with the same noise, which is the one that counts."""
        copies = [t.clone() for t in self._arguments]
        scalars, noise = self._scalars(), torch.get_rng_state()
        terms = self._eager(index)
        after = torch.get_rng_state()
        try:
            if size not in self._graphs:
                torch.set_rng_state(noise)
                self._graphs[size] = self._compile(copies, scalars, index)
            graph = self._graphs[size]
            graph.steps += 1
            torch.set_rng_state(noise)
            with torch.no_grad():
                (values,) = graph.call(*copies, scalars, *self.data.held, index)
        except Exception as error:  # whatever Python, Pyro, the tracer and the compiler raise
            torch.set_rng_state(after)
            self._verify()
            self._give_up(reason_of(error))
            return terms
        found = dict(zip(graph.names, values.tolist(), strict=True))
        number = len(self.parameters)
        buffers, firsts = slice(-2 * number - len(list(self.objective.buffers())), -2 * number), slice(-2 * number, -number)
        problem = _difference(found, terms, copies[firsts], self._arguments[firsts])
        if problem := problem or _other_buffers(copies[buffers], self._arguments[buffers]):
            torch.set_rng_state(after)
            self._give_up(f"compiled, {problem}")
            return self._again()
        for tensor, compiled in zip(self._arguments, copies, strict=True):
            tensor.copy_(compiled)
        return found

    def _give_up(self, reason: str) -> None:
        self.not_compiled = reason
        warnings.warn(f"trained eagerly, not compiled: {reason}", NotCompiledWarning, stacklevel=6)

    def _state(self) -> list[Tensor]:
        """Parameters, buffers, and Adam's first and second moments: what a step changes, without a copy."""
        moments = [
            (state["exp_avg"], state["exp_avg_sq"]) if (state := self.optimizer.state.get(p)) else self._zeros[p]
            for p in self.parameters
        ]
        firsts, seconds = zip(*moments, strict=True)
        return [t.detach() for t in (*self.objective.parameters(), *self.objective.buffers(), *firsts, *seconds)]

    def _scalars(self) -> Tensor:
        """What changes from step to step in Adam, by parameter: lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)."""
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        rows = {n: (group["lr"] / (1 - beta1 ** (n + 1)), 1 / math.sqrt(1 - beta2 ** (n + 1))) for n in set(self._updates)}
        return torch.tensor([rows[n] for n in self._updates], dtype=self.parameters[0].dtype)

    def _compile(self, state: Sequence[Tensor], scalars: Tensor, index: Tensor) -> "_Graph":
        start = time.perf_counter()
        names: list[str] = []
        number, width = len(self.parameters), len(self.data.held)
        places = {id(p): place for place, p in enumerate(self.objective.parameters())}
        trained = [places[id(p)] for p in self.parameters]
        updates: list[int] = []
        beta1, beta2 = self.optimizer.param_groups[0]["betas"]
        eps = self.optimizer.param_groups[0]["eps"]

        def function(*tensors: Tensor) -> tuple[Tensor]:
            *held, chosen = tensors
            held, (scalars, *columns) = held[: -1 - width], held[-1 - width :]
            held, firsts, seconds = held[: -2 * number], held[-2 * number : -number], held[-number:]
            leaves = list(held)
            for place in trained:
                leaves[place] = held[place].detach().requires_grad_()
            named = dict(zip(self._names, leaves, strict=True))
            batch = self.data.convert(*(column.index_select(0, chosen) for column in columns))
            terms = torch.func.functional_call(self.objective, named, batch)
            for name, old in zip(self._names[len(places) :], held[len(places) :], strict=True):
                if (new := named[name]) is not old:  # a buffer that forward() has put another tensor in the place of
                    if (new.shape, new.dtype) != (old.shape, old.dtype):
                        raise UntraceableError(f"the buffer {name} changes its shape or type in forward()")
                    old.copy_(new.detach())
            gradients = torch.autograd.grad(terms["loss"], [leaves[place] for place in trained], allow_unused=True)
            names[:] = terms
            updates[:] = [place for place, g in enumerate(gradients) if g is not None]
            if self.clip_grad_norm is not None:  # as torch's clip_grad_norm_ does it
                norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
                scale = (self.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                gradients = tuple(None if g is None else g * scale for g in gradients)
            for place, g, first, second, (rate, root) in zip(trained, gradients, firsts, seconds, scalars, strict=True):
                if g is None:
                    continue
                first_new = first + (1 - beta1) * (g - first)
                second_new = beta2 * second + (1 - beta2) * g * g
                change = rate * first_new / (second_new.sqrt() * root + eps)
                for old, new in ((held[place], held[place] - change), (first, first_new), (second, second_new)):
                    old.copy_(new)
            return (torch.stack([value.detach() for value in terms.values()]),)

        held = _held(self.objective)
        inputs = (*(t.clone() for t in state), scalars, *self.data.held, index)  # tracing runs the operations
        graph = trace(function, inputs)
        if _held(self.objective) != held:
            raise UntraceableError("the objective changes its own Python attributes in forward()")
        call = inductor(graph, inputs)
        seconds = time.perf_counter() - start
        self.compile_seconds += seconds
        if self._say is not None:
            self._say(f"compiled for batches of {len(index):,} in {seconds:.1f} s")
        return _Graph(call, names, updates)


@dataclass
class _Graph:
    call: Callable[..., Any]
    names: list[str]  # of the terms
    updates: list[int]  # the parameters that have a gradient
    steps: int = 0  # made of it


class _Same:
    """An object that equals itself alone, and lives on, so that no other takes its identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _held(objective: nn.Module) -> Any:
    """What the modules hold beside what a step is given: numbers, flags and words by value, all else by identity."""

    def held(module: nn.Module) -> Any:
        others = dict(vars(module))
        parameters, buffers, children = (others.pop(name) for name in ("_parameters", "_buffers", "_modules"))
        return (
            type(module),
            tuple((name, _Same(p), p is not None and p.requires_grad) for name, p in parameters.items()),
            tuple((name, b if b is None else (b.shape, b.dtype)) for name, b in buffers.items()),
            tuple((name, _Same(child)) for name, child in children.items()),
            _constant(others),
        )

    return tuple(held(module) for module in objective.modules())


def _constant(value: Any, depth: int = 4) -> Any:
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return _Same(value), value._version
    if depth == 0 or isinstance(value, type | nn.Module):
        return _Same(value)
    if isinstance(value, list | tuple):
        return tuple(_constant(v, depth - 1) for v in value)
    if isinstance(value, dict):
        return tuple((_constant(k, depth - 1), _constant(v, depth - 1)) for k, v in value.items())
    if isinstance(value, set | frozenset):
        return frozenset(_constant(v, depth - 1) for v in value)
    if hasattr(value, "__dict__") and type(value).__module__.split(".")[0] not in _OTHERS:
        return _Same(value), _constant(vars(value), depth - 1)
    return _Same(value)


# Libraries whose objects keep caches, which change without a change of what they compute.
_OTHERS = ("builtins", "functools", "numpy", "pyro", "torch")


def _difference(
    found: dict[str, float], terms: dict[str, float], found_moments: Sequence[Tensor], moments: Sequence[Tensor]
) -> str:
    """How a compiled step differs from the eager one by more than rounding; empty if it does not."""
    if not all(map(math.isfinite, terms.values())):
        return ""  # for fit to tell
    for name, value in terms.items():
        if not math.isclose(found.get(name, math.nan), value, rel_tol=1e-4, abs_tol=1e-5):
            return f"its {name} is {found.get(name)}, where the eager step has {value}"
    size = torch.stack([m.norm() for m in moments]).norm()
    for one, other in zip(found_moments, moments, strict=True):  # a gradient of rounding errors alone may differ
        if not (one - other).norm() <= 1e-3 * other.norm() + 1e-4 * size:
            return "its gradient is not that of the eager step"
    return ""


def _other_buffers(found: Sequence[Tensor], buffers: Sequence[Tensor]) -> str:
    same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in zip(found, buffers, strict=True))
    return "" if same else "its buffers are not those of the eager step"


# Moments of a parameter without gradient decay until they are denormal, and Adam then takes ten times as long: on MNIST,
# whose outer pixels are almost never set, twice as long from the second epoch on. What is left decays by no more than
# 0.9^200 until the next time, and what is set to zero would not change any parameter by more than 1e-22.
_FLUSH_EVERY = 200


# One eager step and a copy in so many compiled ones: 0.5 % of the time.
_KEEP_EVERY = 1000


def _flush(optimizer: torch.optim.Adam) -> None:
    for state in optimizer.state.values():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            moment.masked_fill_(moment.abs() < min(torch.finfo(moment.dtype).tiny / 0.9**_FLUSH_EVERY, 1e-28), 0)


def _check_terms(objective: Objective, terms: Any) -> None:
    if not (
        isinstance(terms, dict) and "loss" in terms and all(torch.is_tensor(v) and v.dim() == 0 for v in terms.values())
    ):
        found = {k: getattr(v, "shape", v) for k, v in terms.items()} if isinstance(terms, dict) else type(terms).__name__
        raise ValueError(
            f"fit: expected {type(objective).__name__} to return a dict of scalar tensors with 'loss', found {found}."
        )
    if clash := [name for name in terms if name in NOT_TERMS]:
        raise ValueError(f"fit: {type(objective).__name__} returns {', '.join(clash)}, which fit itself records. Rename it.")
