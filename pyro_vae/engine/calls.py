"""Compiled calls of a program: one graph per key, verified against eager execution, with rollback and fall-back."""

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pyro_vae._checks import level_of_user
from pyro_vae.engine import compiling
from pyro_vae.engine.modes import UntraceableError
from pyro_vae.engine.program import Graph, NotYetError, Program, close, near
from pyro_vae.engine.tracing import NotCompiledWarning, reason_of, trace

__all__ = ["Calls"]

C = TypeVar("C")
R = TypeVar("R")


@dataclass
class _Copy:
    tensors: list[tuple[Tensor, Tensor]]
    python: Any


@dataclass
class _Log(Generic[C]):
    """A snapshot, and the calls since then: each with the random state before it, and the number of repetitions."""

    copy: _Copy
    calls: list[tuple[C, Tensor, int]] = field(default_factory=list)
    length: int = 0
    numbers: int = 0
    held: dict[int, tuple[Tensor, int]] = field(default_factory=dict)  # inputs and their version counters


class Calls(Generic[C, R]):
    """Compiled calls of a program.

    A graph is traced and compiled for each key. The result is that of the compiled call. It is verified against the eager
    call with the same noise at the 1st, 2nd, 4th, 8th ... call, at the first one after :meth:`begin`, and after every
    ``every`` calls. If the program cannot be traced, or a verification fails, there is one
    :class:`~pyro_vae.engine.tracing.NotCompiledWarning` with the reason, and the program falls back to eager execution; the
    state is rolled back to the snapshot of the last verification, and the calls since then are re-run eagerly.

    If a guard fails, the graph changes nothing, and the call runs eagerly with the same noise.

    Rounding can make a large difference: a ReLU with an input near 0 passes all of a gradient or none, depending on the
    last digit. The verification therefore perturbs the parameters by rounding errors, and accepts a difference that is no
    larger than the resulting change of the eager gradient.

    Args:
        program: the program.
        what: its name in the warning.
        every: maximum number of calls between verifications.
        most: maximum number of cached graphs.
        patience: the call with a new key that is compiled.
        first: the same for the first key.
        say: called with each new graph.

    Attributes:
        reason: the reason for eager execution; empty if calls are compiled.
        graphs: the cached graphs by key, least recently used first.
        seconds: total time of tracing and compilation.
        rolled_back: after an error in :meth:`rerun`: number of calls after the one that raised it.
    """

    def __init__(
        self,
        program: Program[C, R],
        *,
        what: str,
        every: int = 1000,
        most: int = 8,
        patience: int = 10,
        first: int = 1,
        say: Callable[[Graph], None] | None = None,
    ) -> None:
        self.program, self.what, self.every, self.most, self.say = program, what, every, most, say
        self.patience, self.first = patience, first
        self.reason, self.seconds, self.rolled_back = "", 0.0, 0
        self.graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._met: dict[Hashable, int] = {}
        self._checked: set[Hashable] = set()
        self._retraced: set[Hashable] = set()
        self._log: _Log[C] | None = None
        self._lock = threading.RLock()

    def __call__(self, call: C) -> R:
        """One call."""
        return self.run(call, 1)[-1]

    def run(self, call: C, times: int) -> list[R]:
        """The results of ``times`` consecutive calls."""
        results: list[R] = []
        with self._lock:
            while len(results) < times:
                results += self._some(call, times - len(results))
        return results

    def begin(self) -> None:
        """Accept the current state; the next call of each graph is verified."""
        self._log = None
        self._checked.clear()

    def rerun(self) -> R:
        """Roll back to the last snapshot and re-run the calls since then eagerly; returns the result of the last one.

        Raises:
            Exception: raised by one of the calls.
        """
        log, self._log = self._since, None
        self._restore(log.copy)
        self.rolled_back = log.length
        for call, noise, times in log.calls:
            torch.set_rng_state(noise)
            self.program.reset(call)
            for _ in range(times):
                self.rolled_back -= 1
                result = self.program.eager(call)
        return result

    def _can_rerun(self) -> bool:
        return all(tensor._version == version for tensor, version in self._since.held.values())

    def _some(self, call: C, most: int) -> list[R]:
        if self.reason:
            self._log = None
            return [self.program.eager(call)]
        key = self.program.key(call)
        log = self._since
        key, graph = (None, None) if key is None else self._graph(key, call)
        if graph is None and self._is_long():
            log = self._log = _Log(self._copy())
        if graph is None or self._is_due(key, graph):
            self._note(call, 1)
            return [self._eager(call) if graph is None else self._check(key, graph, call)]
        until_due = (1 << graph.made.bit_length()) - graph.made
        times = min(most, until_due, self.every - log.length) if self.program.at_once(graph) else 1
        return self._compiled(graph, call, times)

    def _is_due(self, key: Hashable, graph: Graph) -> bool:
        is_power = graph.made & (graph.made - 1) == 0
        return key not in self._checked or is_power or self._is_long()

    @property
    def _since(self) -> _Log[C]:
        """The current log; a new one if there is none."""
        if self._log is None:
            self._log = _Log(self._copy())
        return self._log

    def _is_long(self) -> bool:
        return self._since.length >= self.every or self._since.numbers > _MOST_NUMBERS

    def _note(self, call: C, times: int) -> None:
        log = self._since
        if self.program.stateless:
            log = self._log = _Log(log.copy)
        log.calls.append((call, torch.get_rng_state(), times))
        log.length += times
        for tensor in self.program.inputs(call):
            if id(tensor) not in log.held:
                log.held[id(tensor)] = tensor, tensor._version
                log.numbers += tensor.numel()

    def _eager(self, call: C) -> R:
        try:
            return self.program.eager(call)
        except Exception:
            if self.program.is_finite() or not self._can_rerun():
                raise
            return self.rerun()

    def _graph(self, key: Hashable, call: C) -> tuple[Hashable, Graph | None]:
        graph = self.graphs.get(key)
        if graph is not None:
            self.graphs.move_to_end(key)
            return key, graph
        self._met[key] = self._met.get(key, 0) + 1
        if len(self._met) > _MOST_KINDS:
            self._met.clear()  # keys keep arguments alive
            self._give_up(
                f"it would need more than {_MOST_KINDS} graphs: an argument, or Python state on which it depends, changes "
                "too often"
            )
            return key, None
        if self._met[key] < (self.patience if self.graphs else self.first):
            return key, None
        try:
            graph = self._compile(call)
        except NotYetError:
            return key, None
        except Exception as error:  # raised by Python, Pyro, the tracer or the compiler
            self._give_up(reason_of(error))
            return key, None
        key = self.program.key(call)  # again, since tracing has recorded the Python state on which it depends
        self._log = _Log(self._copy())  # a new snapshot, since tracing has initialised the optimiser's state
        self.graphs[key] = graph
        if len(self.graphs) > self.most:
            self.graphs.popitem(last=False)
        return key, graph

    def _compile(self, call: C) -> Graph:
        start, about = time.perf_counter(), None
        inputs = self.program.inputs(call)

        def function(noted: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            nonlocal about
            numbers, others, about = self.program.trace(call, noted)
            return numbers, others

        traced = trace(function, inputs)
        if any(place < len(inputs) for place in traced.written):
            raise UntraceableError("it writes to one of its arguments; write to a copy instead")
        graph = Graph(traced, compiling.compiled(traced, inputs), about, time.perf_counter() - start)
        self.seconds += graph.seconds
        if self.say is not None:
            self.say(graph)
        return graph

    def _compiled(self, graph: Graph, call: C, times: int) -> list[R]:
        self._note(call, times)
        noise = self._since.calls[-1][1]
        before = self._copy() if times > 1 and graph.traced.guards else None
        try:
            made, results = self._call(graph, call, times)
        except Exception:  # from an operation or a rejected result: the eager calls raise it, if it is real
            if not self._can_rerun():
                raise
            return [self.rerun()]
        if made == times:
            return results
        self._unnote(times - made)
        if before is not None:  # re-run the calls before the failed one to restore the random state before it
            self._restore(before)
            torch.set_rng_state(noise)
            if made > 0:
                self._call(graph, call, made)
        else:
            torch.set_rng_state(noise)
        if graph.failed > _MOST_FAILURES and 2 * graph.failed > graph.made:
            self._retrace_or_give_up(graph)
        self._note(call, 1)
        return [*results, self._eager(call)]

    def _retrace_or_give_up(self, graph: Graph) -> None:
        """Retrace once, since the values at the first trace may have been untypical; then fall back."""
        key = next(key for key, each in self.graphs.items() if each is graph)
        if key not in self._retraced:
            self._retraced.add(key)
            del self.graphs[key]
            self._met[key] = self.patience
        else:
            line = graph.failures.most_common(1)[0][0]
            self._give_up(f"a value that Python reads from a tensor changes too often ({line})")

    def _unnote(self, times: int) -> None:
        call, noise, noted = self._since.calls.pop()
        if noted > times:
            self._since.calls.append((call, noise, noted - times))
        self._since.length -= times

    def _call(self, graph: Graph, call: C, times: int) -> tuple[int, list[R]]:
        """Consecutive compiled calls, until a guard fails: the number of calls made, and their results."""
        self.program.before(graph)
        tried, rows, others = graph.call(self.program.inputs(call), times)
        width = graph.traced.numbers
        held = rows[(tried - 1) * width]
        made = tried if held > 0 else tried - 1
        if made < tried:
            graph.failures[graph.traced.guards[round(-held)]] += 1
        graph.made += tried
        self.program.after(graph, made, others)
        numbers = [rows[i * width + 1 : (i + 1) * width] for i in range(made)]
        return made, [self.program.result(call, graph, each, others) for each in numbers]

    def _check(self, key: Hashable, graph: Graph, call: C) -> R:
        """Run the call eagerly and compiled, from the same state with the same noise; keep the compiled result if equal."""
        self._checked.add(key)
        noise, before = torch.get_rng_state(), self._copy()
        expected = self._eager(call)
        if self._log is None:  # previous calls were rolled back and re-run
            return expected
        after, eager, copies = torch.get_rng_state(), self._copy(), self.program.gradient_copies(graph)
        self._restore(before)
        torch.set_rng_state(noise)
        try:
            made, results = self._call(graph, call, 1)
        except Exception as error:  # of an operation
            self._restore(eager)
            torch.set_rng_state(after)
            self._give_up(reason_of(error))
            return expected
        if made == 0:
            self._restore(eager)
            torch.set_rng_state(after)
            return expected
        problem = self.program.difference(results[0], expected) or self._other_tensors(graph, eager)
        if not problem and not torch.equal(torch.get_rng_state(), after):
            problem = "it draws other random numbers than the eager call"
        found = self.program.gradient_copies(graph)
        if not problem and not near(found, copies):
            compiled = self._copy()
            problem = "" if self._is_rounding(graph, call, before, noise, found, copies) else _GRADIENT
            self._restore(compiled)
            torch.set_rng_state(after)
        elif not problem and not self._same_steps(graph, before, eager, found, copies):
            problem = "its parameters are not those of the eager step"
        if problem:
            self._restore(eager)
            torch.set_rng_state(after)
            if again := self._can_rerun():
                self._give_up(f"compiled, {problem}")
            else:
                self._give_up(f"compiled, {problem}; earlier calls are not re-run, since their inputs have changed")
            return self.rerun() if again else expected
        if not self.program.is_finite() and self._can_rerun():
            return self.rerun()
        self._log = _Log(self._copy())
        return results[0]

    def _is_rounding(
        self,
        graph: Graph,
        call: C,
        before: _Copy,
        noise: Tensor,
        found: Sequence[Tensor],
        expected: Sequence[Tensor],
    ) -> bool:
        """Whether the difference is no larger than the change of the eager gradient if parameters change by rounding."""
        generator = torch.Generator().manual_seed(graph.made)
        gradients = []
        for trial in range(9):
            self._restore(before)
            with torch.no_grad():
                for p in self.program.parameters(graph) if trial else ():
                    digits = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 2 * torch.finfo(p.dtype).eps
                    p.mul_(1 + digits)
            torch.set_rng_state(noise)
            gradients.append(self.program.gradients(graph, call))
        spread = [2 * max((other - one).norm().item() for other in others) for one, *others in zip(*gradients, strict=True)]
        return near(found, expected, spread)

    def _same_steps(
        self, graph: Graph, before: _Copy, eager: _Copy, found: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> bool:
        """Whether the updates of the parameters are equal, for elements whose gradients agree to a relative 1e-4."""
        if not self.program.moments(graph):
            return True  # the graph does not update parameters
        old, new = ({id(t): kept for t, kept in copied.tensors} for copied in (before, eager))
        for p, one, other in zip(self.program.parameters(graph), found, expected, strict=True):
            sure = (one - other).abs() <= 1e-4 * other.abs()
            step, rounding = new[id(p)] - old[id(p)], 4 * torch.finfo(p.dtype).eps * old[id(p)].abs()
            if not bool(((p.detach() - new[id(p)]).abs() <= 1e-2 * step.abs() + rounding)[sure].all()):
                return False
        return True

    def _other_tensors(self, graph: Graph, eager: _Copy) -> str:
        """Compare the other tensors that the graph mutates, which are neither parameters nor moments."""
        leave_out = {id(t) for t in (*self.program.parameters(graph), *self.program.moments(graph))}
        expected = {id(t): kept for t, kept in eager.tensors}
        same = all(close(t, expected[id(t)]) for t in graph.written if id(t) not in leave_out)
        return "" if same else "its buffers are not those of the eager step"

    def _copy(self) -> _Copy:
        tensors = {id(t): t for t in self.program.state()}
        for graph in self.graphs.values():
            tensors.update((id(t), t) for t in graph.written)
        return _Copy([(t, t.detach().clone()) for t in tensors.values()], self.program.save())

    def _restore(self, copied: _Copy) -> None:
        with torch.no_grad():
            for tensor, before in copied.tensors:
                tensor.copy_(before)
        self.program.load(copied.python)

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        warnings.warn(f"{self.what}, not compiled: {reason}", NotCompiledWarning, stacklevel=level_of_user())


_GRADIENT = "its gradient is not that of the eager step"
_MOST_NUMBERS = 2**24  # maximum size of the inputs that are kept to re-run calls
_MOST_FAILURES = 8
_MOST_KINDS = 200
