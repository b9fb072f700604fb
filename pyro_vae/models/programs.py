"""A program pair: any Pyro model and guide, as one module that has all of their parameters."""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = [
    "ProgramPair",
    "evaluating",
    "example_of",
    "is_held",
    "is_program_pair",
    "owner_of",
    "programs_and_data",
    "store_parameter",
]

Program = Callable[..., Any]


def owner_of(program: Any) -> Any:
    """The object whose method a program is, without Pyro's handlers and ``functools.partial``; or the program itself."""
    inner: Any = poutine.unwrap(program)
    while isinstance(inner, functools.partial):
        inner = poutine.unwrap(inner.func)
    return getattr(inner, "__self__", inner)


class ProgramPair(nn.Module):
    r"""A model p(x, z) and a guide q(z | x) with the same arguments: ``model(*batch)`` and ``guide(*batch)``.

    Each is any Pyro program: a function, a method or a module, with or without Pyro's handlers around it. Site names are
    free; all sites are in one plate of dimension -1 over the observations. The parameters of the pair are those of the
    modules that the programs are, or are methods of, and, after :meth:`prepare`, those that the programs register in Pyro's
    param store by ``pyro.param`` and ``pyro.module``; of a constrained parameter, the unconstrained tensor in the store.

    A parameter of a module is used directly, without Pyro's store: two modules that register under the same name are both
    trained, and the store keeps no reference to them.

    Args:
        model: the model; or, without a second argument, a module with methods ``model`` and ``guide``, or a pair
            ``(model, guide)``.
        guide: the guide.

    Attributes:
        module: the module to which both programs belong; None if there is none. It may have three methods:
            ``check(*batch)`` raises a ``ValueError`` for data on which the model is not defined; ``terms(reconstruction)``
            returns related quantities of the reconstruction term that the literature reports, by name; ``example()``
            returns a tensor of the dtype and device that observations must have, if these are not the parameters'.

    Raises:
        ValueError: model and guide are no pair of programs.
    """

    def __init__(self, model: Any, guide: Program | None = None) -> None:
        super().__init__()
        if isinstance(model, ProgramPair) and guide is None:
            model, guide = model.programs
        elif isinstance(model, tuple) and len(model) == 2 and guide is None:
            model, guide = model
        elif guide is None:
            if isinstance(model, tuple) or not is_program_pair(model):
                found = f"the class {model.__name__}" if isinstance(model, type) else f"one {type(model).__name__}"
                raise ValueError(
                    "expected a model and a guide, two Pyro programs, or a module that has methods model and guide; "
                    f"found {found}. Pass both programs."
                )
            model, guide = model.model, model.guide
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise ValueError(f"{name}: expected a Pyro program, a function, say, found {type(program).__name__}.")
            owner = owner_of(program)
            if owner is program and not isinstance(program, type) and callable(getattr(program, name, None)):
                raise ValueError(
                    f"{name}: expected a Pyro program, such as its method {name}, found {type(program).__name__} itself."
                )
        # A tuple, so that they are not registered as modules under these names too.
        self._programs: tuple[Program, Program] = (model, guide)
        owners = [owner for program in self._programs if isinstance(owner := owner_of(program), nn.Module)]
        if len(owners) == 2 and owners[0] is owners[1]:
            owners.pop()
        self.module = owners[0] if len(owners) == 1 and owner_of(model) is owner_of(guide) else None
        if self.module is None:
            self.owners = nn.ModuleList(owners)

    @property
    def programs(self) -> tuple[Program, Program]:
        """Model and guide as they were given."""
        return self._programs

    @property
    def holder(self) -> nn.Module:
        """The module whose ``state_dict`` has all parameters: the common module, or the pair if there are any others."""
        return self if self.module is None or self._parameters else self.module

    def model(self, *batch: Any) -> Any:
        """Run the model."""
        with _OwnParameters(self):
            return self._programs[0](*batch)

    def guide(self, *batch: Any) -> Any:
        """Run the guide."""
        with _OwnParameters(self):
            return self._programs[1](*batch)

    def prepare(self, *batch: Tensor) -> None:
        """Run both programs once, which initialises lazy parameters, and adopt those that they register in Pyro's store.

        torch's random state is restored. Has no effect on programs whose parameters are all in their modules.
        """
        devices = [t.device for t in batch if t.is_cuda][:1]
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            poutine.block(),
            poutine.trace(param_only=True) as capture,
        ):
            poutine.replay(self.model, trace=poutine.trace(self.guide).get_trace(*batch))(*batch)
        held = {id(p) for p in self.parameters()}
        for name, site in capture.trace.nodes.items():
            if site["type"] != "param":
                continue
            tensor = _own_tensor(site)
            if tensor is None:
                tensor = pyro.get_param_store()._params[name]
            if id(tensor) not in held:
                held.add(id(tensor))
                # register_parameter accepts only an nn.Parameter, but gradients must reach the store's own tensor.
                self._parameters[name] = tensor  # type: ignore[assignment]

    def check(self, *batch: Tensor) -> None:
        """Calls ``check`` of the module, if it has one."""
        if (check := getattr(self.module, "check", None)) is not None:
            check(*batch)

    def terms(self, reconstruction: Tensor) -> dict[str, Tensor]:
        """The ``terms`` of the module, if it has any."""
        terms = getattr(self.module, "terms", None)
        return {} if terms is None else terms(reconstruction)

    def example(self) -> Tensor | None:
        """A tensor of the dtype and device that observations must have; None if the pair has no floating-point tensor."""
        example = getattr(self.module, "example", None)
        return example_of(self) if example is None else example()


def is_program_pair(model: Any) -> bool:
    """Whether the argument is a pair of programs, or has methods ``model`` and ``guide``."""
    if isinstance(model, tuple | ProgramPair):
        return True
    return not isinstance(model, type) and all(callable(getattr(model, name, None)) for name in ("model", "guide"))


def example_of(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter, or else buffer, of a module; None if there is none."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t for t in tensors if t.is_floating_point()), None)


def programs_and_data(model: Any, guide: Any, data: Any) -> tuple[ProgramPair, Any]:
    """The pair and the data, from the arguments ``(model, guide, data)`` or ``(module, data)``."""
    if data is not None:
        return ProgramPair(model, guide), data
    if callable(guide):
        raise ValueError("expected data after model and guide, found none.")
    return ProgramPair(model), guide


class _OwnParameters(Messenger):
    """A handler that serves ``pyro.param`` from the parameters of the pair instead of Pyro's store."""

    def __init__(self, pair: ProgramPair) -> None:
        super().__init__()
        self._pair = pair
        self._held: set[int] | None = None

    def __enter__(self) -> Any:
        _running.append(self._pair)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        _running.pop()
        return super().__exit__(*error)

    def _pyro_param(self, msg: Any) -> None:
        if self._held is None:
            self._held = {id(p) for p in self._pair.parameters()}
        tensor = _own_tensor(msg)
        if tensor is not None and id(tensor) in self._held:
            msg["value"], msg["done"], msg["stop"] = tensor, True, True


_running: list[ProgramPair] = []  # a stack of the pairs whose programs are running, like Pyro's stack of handlers


def is_held(module: nn.Module) -> bool:
    """Whether a program of a pair with this module is running; then its parameters need no registration in Pyro's store."""
    return any(pair.module is module for pair in _running)


def store_parameter(name: str, parameter: nn.Parameter) -> None:
    """As ``pyro.param``, but that the parameter can still be pickled.

    Pyro leaves a weak reference in what a param statement returns, which does not pickle: in a view of the parameter here.
    """
    _statement(name, parameter, constraint=constraints.real, event_dim=None, name=name)


def _in_store(name: str, parameter: nn.Parameter, **options: Any) -> Tensor:
    value: Any = pyro.get_param_store().get_param(name, parameter, **options)
    view = value.view_as(value)
    view.unconstrained = value.unconstrained
    del value.unconstrained
    return view


_statement = effectful(_in_store, type="param")  # as pyro.param is made


def _own_tensor(site: Any) -> Tensor | None:
    """The ``nn.Parameter`` passed to a ``pyro.param`` statement, as by ``pyro.module`` and ``PyroModule``; else None."""
    initial = site["args"][1] if len(site["args"]) > 1 else None
    constrained = site["kwargs"].get("constraint", constraints.real) is not constraints.real
    return None if constrained or not isinstance(initial, nn.Parameter) else initial


@contextmanager
def evaluating(*programs: Any) -> Iterator[None]:
    """Evaluation mode for modules, and for the modules of which programs are methods; the previous mode is restored."""
    owners = [owner_of(program) for program in programs]
    modules = {module: module.training for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()}
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in modules.items():
            module.training = training
