"""Smooth bounds for outputs of a net: scales of normal distributions, rates."""

import math

import torch
from torch import Tensor

__all__ = ["bent", "bounded_scale"]


def bent(value: Tensor, free: float, limit: float) -> Tensor:
    """A smooth bound: the identity on [-free, free], continued by atan to the range (-limit, limit).

    Twice differentiable, with a gradient that is never zero; that of atan decays slower than that of tanh, so that values
    near the limit can recover.
    """
    inner = value.clamp(-free, free)
    room = (limit - free) * 2 / math.pi
    return inner + room * torch.atan((value - inner) / room)


def bounded_scale(log_variance: Tensor) -> Tensor:
    """exp(log_variance / 2), with the log-scale bounded smoothly by +-10, see :func:`bent`.

    For log-scales within +-7 (scales from 1/1100 to 1100), the usual range, the value is exact. At the upper limit the
    squared scale is 5e8, and the lower limit is above float32's resolution of the mean, so that densities are finite and
    accurate at both ends.
    """
    return bent(0.5 * log_variance, 7.0, 10.0).exp()
