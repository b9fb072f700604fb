"""Guards on Python state: a trace is valid only while the Python state on which it depends is unchanged."""

import functools
import gc
import operator
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_vae.engine.modes import UntraceableError

__all__ = ["PythonState", "constant"]


class _Same:
    """Compares an object by identity, and keeps it alive, so that its id is not reused."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def constant(value: Any, depth: int = 4) -> Any:
    """A comparable snapshot of a value: numbers, flags, strings and containers of them by value, all else by identity."""
    if isinstance(value, bool | int | float | str | None):
        return type(value), value if value == value else "nan"
    if isinstance(value, np.generic):
        return constant(value.item())
    if depth == 0 or isinstance(value, type | nn.Module | Tensor):
        return _Same(value)
    if isinstance(value, np.ndarray) and value.nbytes <= _MOST_BYTES:
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, list | tuple):
        return type(value), tuple(constant(v, depth - 1) for v in value)
    if isinstance(value, dict):
        return type(value), tuple((constant(k, depth - 1), constant(v, depth - 1)) for k, v in value.items())
    if isinstance(value, set | frozenset):
        return type(value), frozenset(constant(v, depth - 1) for v in value)
    if _is_plain(value):
        return _Same(value), constant(vars(value), depth - 1)
    return _Same(value)


_MOST_BYTES = 2**20
_GONE = object()


def _is_plain(value: Any) -> bool:
    """Whether an object has attributes and its class is the user's; objects of library classes may have caches."""
    kind = type(value)
    return hasattr(value, "__dict__") and (kind.__name__ in ("SimpleNamespace", "Namespace") or _is_users(kind.__module__))


@functools.cache
def _is_users(module: str) -> bool:
    """Whether a module is the user's code, or one of this package's models and objectives, which are treated alike."""
    root = module.split(".")[0]
    if root == "pyro_vae":
        return module.split(".")[1:2] not in (["engine"], ["inference"]) and module not in _OURS
    if root in sys.stdlib_module_names and root != "__main__":
        return False
    return "site-packages" not in (getattr(sys.modules.get(module), "__file__", None) or "") or root in _PACKAGES


_OURS = tuple(f"pyro_vae.training.{name}" for name in ("fit", "step", "compiled_step", "updates"))
_PACKAGES: set[str] = set()  # installed packages whose programs are traced, treated as the user's code


def _package_of(program: Any) -> str:
    while hasattr(program, "func"):  # functools.partial
        program = program.func
    own = getattr(program, "__module__", None) if hasattr(program, "__code__") else type(program).__module__
    return (getattr(getattr(program, "__self__", None), "__module__", None) or own or "").split(".")[0]


class _Cell(NamedTuple):
    """A value of a mapping, by key; its name in messages, and the depth of its comparison."""

    mapping: Any
    key: Any
    name: str
    depth: int

    def constant(self) -> Any:
        return constant(self.mapping.get(self.key, _GONE), self.depth)


class PythonState:
    """The globals, closure variables, attributes and modules that Python code uses while it runs under :meth:`recorded`.

    Args:
        roots: functions, modules and objects to start from.

    Attributes:
        modules: the ``nn.Module`` objects among them.
        forbidden: a call whose value differs each time (a clock, an iterator), and its line; empty if there is none.
    """

    def __init__(self, *roots: Any) -> None:
        self.modules: dict[nn.Module, None] = {}
        self.forbidden = ""
        self._cells: dict[tuple[int, Any], _Cell] = {}
        self._mappings: list[Any] = []  # of the cells
        self._keys: list[Any] = []
        self._first: list[Any] = []  # the values when the cells were added
        self._buffers: dict[tuple[nn.Module, str], Tensor] = {}
        self._codes: set[CodeType] = set()
        self._seen: set[int] = set()
        self._keep: list[Any] = []
        self._last: list[Any] = []
        self._containers: list[tuple[Any, list[Any]]] = []
        self._holders: list[tuple[Any, tuple[str, ...]]] = []  # objects with attributes that are watched
        self._tokens: dict[tuple[Any, ...], int] = {}
        self._token = -1
        if new := {_package_of(root) for root in roots} - _PACKAGES - {"torch", "pyro", "functools", ""}:
            _PACKAGES.update(new)
            _is_users.cache_clear()
        for root in roots:
            self._add_object(root)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records the state that code running in this context uses."""
        before = sys.getprofile()
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(None)
            profiler: Any = before
            if hasattr(profiler, "enable"):  # cProfile's, which is no function
                profiler.enable()
            else:
                sys.setprofile(profiler)

    def watch(
        self, mapping: "Mapping[Any, Any] | _Closure | _Length", key: Any, name: str, *, by_identity: bool = False
    ) -> None:
        """Add a value to compare; by identity, if the content of a container is irrelevant."""
        place = id(getattr(mapping, "mapping", mapping)), key
        if place not in self._cells:
            self._cells[place] = _Cell(mapping, key, name, 0 if by_identity else 3)
            self._mappings.append(mapping if type(mapping) is dict else _Get(mapping))  # a defaultdict would make the value
            self._keys.append(key)
            self._first.append(self._cells[place].constant())

    def watch_mapping(self, mapping: Mapping[Any, Any], name: str) -> None:
        """Add all values of a mapping, and their number."""
        self.watch(_Length(mapping), len, f"{name}s")
        for key in mapping:
            self.watch(mapping, key, f"{name} {key}")

    def token(self) -> int:
        """A number that identifies the current values: equal values have equal numbers."""
        values = self._values()
        is_known = self._token >= 0 and len(values) == len(self._last)
        if is_known and all(map(operator.is_, values, self._last)) and self._containers_are_same():
            return self._token
        if (known := len(self._last)) < len(values):  # cells added since then had no influence before
            self._tokens = {(*each[:known], *self._first[known:]): token for each, token in self._tokens.items()}
        self._last = values
        pairs = zip(self._cells.values(), values, strict=True)
        self._containers = [(value, _elements(value)) for cell, value in pairs if cell.depth and _is_mutable(value)]
        now = tuple(self.snapshot())
        self._token = self._tokens.setdefault(now, len(self._tokens))
        return self._token

    def _values(self) -> list[Any]:
        try:
            return [*map(operator.getitem, self._mappings, self._keys)]  # twice as fast as get
        except KeyError:
            return [cell.mapping.get(cell.key, _GONE) for cell in self._cells.values()]

    def _containers_are_same(self) -> bool:
        for container, elements in self._containers:
            if len(container) != len(elements) or (elements and not all(map(operator.is_, _elements(container), elements))):
                return False
        return True

    def snapshot(self) -> list[Any]:
        """The values now, for :meth:`changes`."""
        return [cell.constant() for cell in self._cells.values()]

    def changes(self, before: list[Any]) -> list[str]:
        """Names of the values that have changed since the snapshot, or since they were added."""
        then = [*before, *self._first[len(before) :]]
        pairs = zip(self._cells.values(), then, self.snapshot(), strict=True)
        return [cell.name for cell, old, new in pairs if old != new]

    @contextmanager
    def traced(self) -> Iterator[None]:
        """A context in which a program is traced: its Python state is recorded, and restored if an error is raised.

        Raises:
            UntraceableError: the program changes Python state, reads the clock, or takes from an iterator.
        """
        for holder, leave_out in self._holders:  # which may have got attributes since
            self._watch_attributes(holder, leave_out)
        before, saved = self.snapshot(), self._save()
        try:
            with pyro.validation_enabled(False), self.recorded():
                yield
            self.rebind()
            if changes := self.changes(before):
                raise UntraceableError(f"it changes {changes[0]} as it runs")
            if self.forbidden:
                raise UntraceableError(self.forbidden)
        except Exception:
            self._restore(*saved)
            raise

    def _save(self) -> tuple[list[Any], list[tuple[dict[str, Any], set[str]]], list[tuple[Any, Any]]]:
        values = [cell.mapping.get(cell.key, _GONE) for cell in self._cells.values()]
        attributes = [(vars(holder), {*vars(holder)}) for holder, _ in self._holders]
        contents = [(value, value.copy()) for value in values if _is_mutable(value)]
        return values, attributes, contents

    def _restore(self, values: Any, attributes: Any, contents: Any) -> None:
        for cell, value in zip(self._cells.values(), values, strict=False):
            if value is not _GONE and cell.mapping.get(cell.key, _GONE) is not value:
                if isinstance(cell.mapping, _Closure):
                    cell.mapping.cell.cell_contents = value
                elif isinstance(cell.mapping, dict):
                    cell.mapping[cell.key] = value
        for holder, names in attributes:
            for name in holder.keys() - names:
                del holder[name]
        for container, content in contents:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)

    def rebind(self) -> None:
        """Undo the replacement of buffers: copy the values of the new tensors to the original ones, and restore these.

        Raises:
            UntraceableError: a buffer has changed its shape or dtype.
        """
        for (module, name), old in self._buffers.items():
            new = module._buffers.get(name)
            if new is old:
                continue
            if new is None or (new.shape, new.dtype) != (old.shape, old.dtype):
                raise UntraceableError(f"the buffer {name} changes its shape or type in forward()")
            with torch.no_grad():
                old.copy_(new)
            module._buffers[name] = old

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call":
            if frame.f_code.co_name == "_call_impl" and isinstance(module := frame.f_locals.get("self"), nn.Module):
                self._add_object(module)
            elif _is_users(name):
                if frame.f_code.co_freevars and frame.f_code not in self._codes:
                    for function in gc.get_referrers(frame.f_code):  # a frame does not refer to its function
                        if isinstance(function, FunctionType):
                            self._add_object(function)
                self._add_code(frame.f_code, frame.f_globals)
                first = frame.f_code.co_varnames[0] if frame.f_code.co_argcount else ""
                if first == "self":
                    self._meet(frame.f_locals.get(first), is_new=frame.f_code.co_name == "__init__")
        elif event == "c_call" and _is_users(name) and not self.forbidden and not name.startswith("pyro_vae."):
            if getattr(argument, "__module__", None) == "time" or getattr(argument, "__name__", "") in _CLOCKS:
                self.forbidden = f"it reads the clock ({frame.f_code.co_filename}:{frame.f_lineno})"
            elif argument is next:
                self.forbidden = f"it takes from an iterator ({frame.f_code.co_filename}:{frame.f_lineno})"

    def _add_code(self, code: CodeType, variables: Mapping[str, Any]) -> None:
        if code in self._codes:
            return
        self._codes.add(code)
        for name in code.co_names:
            if name in variables:
                self.watch(variables, name, f"the global {name}")
                self._add_object(variables[name])
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                self._add_code(inner, variables)

    def _meet(self, value: Any, *, is_new: bool) -> None:
        if is_new and id(value) not in self._seen:  # an object created during the call has no state between calls
            self._seen.add(id(value))
            self._keep.append(value)
        self._add_object(value)

    def _add_object(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._keep.append(value)
        if isinstance(value, nn.Module):
            self._add_module(value)
        elif isinstance(value, FunctionType):
            if _is_users(value.__module__ or ""):
                self._add_code(value.__code__, value.__globals__)
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
                self.watch(_Closure(cell), name, f"the variable {name}")
                self._add_object(_Closure(cell).get(name))
            self._add_object(getattr(value, "__wrapped__", None))
        elif hasattr(value, "__func__"):
            self._add_object(value.__func__)
            self._add_object(value.__self__)
        elif hasattr(value, "func") and hasattr(value, "args"):  # functools.partial
            for part in (value.func, *value.args, *getattr(value, "keywords", {}).values()):
                self._add_object(part)
        elif _is_plain(value) or isinstance(value, SimpleNamespace):
            self._add_attributes(value)

    def _add_module(self, module: nn.Module) -> None:
        self.modules[module] = None
        caches = [name for name in vars(module) if isinstance(module, Transform) and name.startswith("_cached_")]
        if isinstance(module, AutoGuide):
            caches.append("plates")  # made anew in each call
        self._add_attributes(module, leave_out=("_parameters", "_buffers", "_modules", *caches))
        for part, word in (("_parameters", "parameter"), ("_buffers", "buffer"), ("_modules", "module")):
            self.watch_mapping(vars(module)[part], f"{type(module).__name__}'s {word}")
            for name, child in vars(module)[part].items():
                if part == "_buffers" and child is not None:
                    self._buffers[module, name] = child
                if isinstance(child, nn.Module):
                    self._add_object(child)

    def _add_attributes(self, value: Any, leave_out: tuple[str, ...] = ()) -> None:
        self._holders.append((value, leave_out))
        self.watch(_Length(vars(value)), len, f"the attributes of {type(value).__name__}")
        self._watch_attributes(value, leave_out)

    def _watch_attributes(self, value: Any, leave_out: tuple[str, ...]) -> None:
        for name, held in list(vars(value).items()):
            if name not in leave_out:
                self.watch(vars(value), name, f"{name} of {type(value).__name__}")
                if isinstance(held, nn.Module | FunctionType) or _is_plain(held):
                    self._add_object(held)


_CLOCKS = ("now", "today", "utcnow")


class _Get:
    """A mapping whose missing values are ``_GONE``."""

    def __init__(self, mapping: Any) -> None:
        self.get = mapping.get

    def __getitem__(self, key: Any) -> Any:
        return self.get(key, _GONE)


class _Length:
    """The length of a mapping, as a mapping."""

    def __init__(self, mapping: Mapping[Any, Any]) -> None:
        self.mapping = mapping

    def get(self, *_: Any) -> int:
        return len(self.mapping)


class _Closure:
    """A closure variable as a mapping."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def get(self, _: Any, default: Any = _GONE) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # not bound yet
            return default


def _is_mutable(value: Any) -> bool:
    return isinstance(value, list | dict | set) and len(value) <= _MOST_ELEMENTS


def _elements(container: Any) -> list[Any]:
    return [*container.values()] if isinstance(container, dict) else [*container]


_MOST_ELEMENTS = 100
