"""What Python decides while a function is traced stays decided: what modules hold beside their tensors, to be compared."""

from typing import Any

import numpy as np
from torch import Tensor, nn

__all__ = ["held_by"]


class _Same:
    """An object that equals itself alone, and lives on, so that no other takes its identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def held_by(root: nn.Module) -> Any:
    """What a module and its submodules hold: numbers, flags and words by value, all else by identity."""

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

    return tuple(held(module) for module in root.modules())


def _constant(value: Any, depth: int = 4) -> Any:
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if depth == 0 or isinstance(value, type | nn.Module | Tensor):
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
