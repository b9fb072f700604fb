"""Torch modes that are active while a function is traced: they guard values that Python reads, and intercept backward()."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from pyro.util import torch_isnan, warn_if_nan
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = ["LossAsTensor", "UntraceableError", "ValueGuards", "untraced"]

_aten = torch.ops.aten
_READ_PAST_TORCH = {Tensor.tolist: "tolist()", Tensor.numpy: "numpy()", Tensor.__array__: "a conversion to NumPy"}
_LIBRARIES = ("torch", "pyro", "opt_einsum", "contextlib", "functools")


class UntraceableError(Exception):
    """A function cannot be traced; the message is the reason."""


@contextmanager
def untraced() -> Iterator[None]:
    """Suspends tracing: tensors made in this context are outside tensors of the graph."""
    with _disable_current_modes():
        yield


class LossAsTensor(TorchFunctionMode):
    """Keeps the loss a tensor where Pyro converts it to a number, and records the tensors of calls of ``backward()``.

    Args:
        noted: list to which these tensors are appended; the gradient is that of their sum.
    """

    def __init__(self, noted: list[Tensor]) -> None:
        super().__init__()
        self._noted = noted

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.item and args[0].is_floating_point() and _is_of_a_loss(sys._getframe(1)):
            return args[0].detach()
        if func is torch.isnan and _is_warning_of_a_loss(sys._getframe(1)):
            return np.False_  # a guard would undo the step; the caller warns of the number
        if func is Tensor.backward:
            self._noted.append(args[0])
            return None
        if func in _READ_PAST_TORCH:
            raise UntraceableError(f"it reads a tensor's values by {_READ_PAST_TORCH[func]} ({line_of_user()})")
        return func(*args, **(kwargs or {}))


def _is_of_a_loss(frame: FrameType | None) -> bool:
    """Whether the caller is a loss, which only sums values, and not a model, whose control flow may depend on them."""
    from pyro.infer.elbo import ELBO

    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "torch":
        frame = frame.f_back
    if frame is None:
        return False
    name = frame.f_globals.get("__name__", "")
    of_pyro = name.startswith("pyro.infer.") and name.split(".")[2] not in ("autoguide", "reparam", "mcmc")
    return of_pyro or isinstance(frame.f_locals.get("self"), ELBO)


def _is_warning_of_a_loss(frame: FrameType | None) -> bool:
    """Whether an ELBO asks Pyro for a warning if its loss is NaN."""
    for code in (torch_isnan.__code__, warn_if_nan.__code__):
        while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "torch":
            frame = frame.f_back
        if frame is None or frame.f_code is not code:
            return False
        frame = frame.f_back
    return frame is not None and _is_of_a_loss(frame)


class ValueGuards(TorchDispatchMode):
    """Specialises the graph on values of tensors that Python reads, or on which a shape depends, and guards them.

    The graph has the control flow of the traced call. A guard is a boolean tensor in the graph: whether the value is
    unchanged. Outside tensors are copied before they are mutated, for :meth:`restore`.

    Attributes:
        guards: the guards.
        lines: for each guard, the line of the user's code that reads the value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.guards: list[Tensor] = []
        self.lines: list[str] = []
        self._made: dict[int, Any] = {}  # storages by identity, kept alive
        self._before: list[tuple[Any, Any]] = []  # mutated storages, and copies of their original values

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.native_batch_norm.default and args[3] is not None:  # mutates running means undeclared
            func = _aten._native_batch_norm_legit.default
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func._schema.is_mutable:
            self._copy_outside(func, args, kwargs)
        result = self._call(func, args, kwargs)
        taken = {t.untyped_storage()._cdata for t in tensors}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in taken:
                self._made[storage._cdata] = storage
        return result

    def _call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is _aten._local_scalar_dense.default:
            with untraced():
                value = args[0].item()
            self._guard(args[0].isnan() if value != value else args[0] == value)
            return value
        if func is _aten.equal.default:
            with untraced():
                value = torch.equal(*args)
            if args[0].shape == args[1].shape:
                self._guard((args[0] == args[1]).all() == value)
            return value
        if func is _aten.nonzero.default:
            return self._places(args[0])
        if func is _aten.masked_select.default:
            values, mask = torch.broadcast_tensors(*args)
            return values[tuple(self._places(mask).unbind(1))]
        if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
            places: list[Tensor | None] = []
            for index in args[1]:
                places.extend(self._places(index).unbind(1) if _is_mask(index) else [index])
            return func(args[0], places, *args[2:], **kwargs)
        if torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags:
            raise UntraceableError(f"{func.name()} gives a shape or a number that depends on values ({line_of_user()})")
        return func(*args, **kwargs)

    def _places(self, mask: Tensor) -> Tensor:
        with untraced():
            nonzero = mask != 0
            places = nonzero.nonzero()
        self._guard(((mask != 0) == nonzero).all())
        return places

    def _guard(self, same: Tensor) -> None:
        self.guards.append(same.detach())
        self.lines.append(line_of_user())

    def _copy_outside(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            for t in tree_leaves(given):
                storage = t.untyped_storage() if isinstance(t, Tensor) else None
                if storage is not None and storage._cdata not in self._made:
                    self._made[storage._cdata] = storage
                    with untraced():
                        self._before.append((storage, storage.clone()))

    def restore(self) -> None:
        """Restore the values of mutated outside tensors."""
        for storage, before in self._before:
            storage.copy_(before)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def line_of_user() -> str:
    """The innermost line of a program that is no library's; or of Pyro, where it is Pyro that asks."""
    frame: FrameType | None = sys._getframe(1)
    inner = ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(("pyro_vae.training.", "pyro_vae.inference.")):
            break  # what follows has called the program
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"
        if not name.startswith("pyro_vae.engine.") and name.split(".")[0] not in _LIBRARIES:
            return line
        if not inner and name.startswith("pyro."):
            inner = line
        frame = frame.f_back
    return inner or "in no line of Python"
