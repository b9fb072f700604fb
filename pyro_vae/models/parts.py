"""What a VAE is built of: callables that return distributions, and which of them take context."""

import functools
import inspect
import itertools
import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import nn

__all__ = ["checked_part", "context_sizes", "distribution_of"]


def distribution_of(name: str, value: Any) -> Any:
    """What a part has returned, once it is found to be a distribution of Pyro."""
    if not isinstance(value, TorchDistributionMixin):
        found = "one of torch.distributions" if isinstance(value, torch.distributions.Distribution) else type(value).__name__
        raise ValueError(
            f"VAE: expected the {name} to return a distribution of pyro.distributions, found {found}. Return one, such as "
            f"pyro.distributions.Normal(loc, scale){'' if name == 'likelihood' else '.to_event(1)'}."
        )
    return value


def checked_part(name: str, value: Any, default: Any) -> Any:
    """The part that is given, once it is found to be callable, or else the default."""
    value = default if value is None else value
    if isinstance(value, torch.distributions.Distribution):  # of which Pyro's are callable
        raise ValueError(
            f"VAE: expected a {name} that is called and returns a distribution, found a distribution, "
            f"{type(value).__name__}. Pass a function or module that makes it anew at each call."
        )
    if isinstance(value, type):
        raise ValueError(f"VAE: expected an instance, {value.__name__}(), found the class itself.")
    if not callable(value):
        raise ValueError(f"VAE: expected a {name} such as {type(default).__name__}(), found {value!r}.")
    return value


def context_sizes(part: Any, own: int) -> tuple[int, float]:
    """How many context tensors a part takes after its own inputs, at least and at most; (0, 0): it takes none."""
    takes = getattr(part, "takes_context", None)
    if takes is not None and not takes:
        return 0, 0
    call = part.forward if isinstance(part, nn.Module) else part
    function = getattr(call, "__func__", None)  # of a method, whose first parameter is self
    if function is None and not inspect.isroutine(call) and not isinstance(call, functools.partial):
        function = type(call).__call__  # an object may have no hash
    if function is None:
        return _sizes_of(call, own, bool(takes))
    return _sizes_of(function, own, bool(takes), skip=1)


@functools.lru_cache(maxsize=1024)  # a signature takes 10 microseconds, and each step asks for four
def _sizes_of(function: Any, own: int, takes: bool, skip: int = 0) -> tuple[int, float]:
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except ValueError:  # a function of C without a signature
        return (1, math.inf) if takes else (0, 0)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in positional)
    # y=None is a tensor that may be left out; scale=0.3 is an option, in whose place no label must come by accident.
    rest = list(itertools.takewhile(lambda p: p.default is p.empty or p.default is None or takes, positional[own:]))
    open_ended = any(p.kind is p.VAR_POSITIONAL for p in parameters) and len(rest) == len(positional[own:])
    return max(needed - own, 1 if takes else 0), math.inf if open_ended else len(rest)
