"""Pyro's global state: its param store, and the handlers that are active."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyro
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

__all__ = ["Store", "has_handlers"]


class Store(Mapping[str, Tensor]):
    """The unconstrained parameters in Pyro's store, whose dictionary is another one after ``scope()``."""

    def __getitem__(self, name: str) -> Tensor:
        return pyro.get_param_store()._params[name]

    def get(self, name: str, default: Any = None) -> Any:
        return pyro.get_param_store()._params.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(pyro.get_param_store()._params)

    def __len__(self) -> int:
        return len(pyro.get_param_store()._params)


def has_handlers() -> bool:
    """Whether handlers are active that would see the sites of a program; ``block`` alone, as in MCMC, hides them."""
    return any(type(handler) is not BlockMessenger for handler in _PYRO_STACK)
