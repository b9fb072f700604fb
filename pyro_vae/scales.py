"""Numbers of a net bent smoothly into bounds: scales of normal distributions, rates."""

import math

import torch
from torch import Tensor

__all__ = ["bent", "bounded_scale"]


def bent(value: Tensor, free: float, limit: float) -> Tensor:
    """The value itself up to +-free, beyond it bent twice differentiably into +-limit, never a zero gradient.

    atan (not tanh) leaves a gradient large enough to come back.
    """
    inner = value.clamp(-free, free)
    room = (limit - free) * 2 / math.pi
    return inner + room * torch.atan((value - inner) / room)


def bounded_scale(log_variance: Tensor) -> Tensor:
    """exp(log_variance / 2), with the log-scale bent twice differentiably into +-10, never a zero gradient.

    Exactly the plain value where the log-scale lies within +-7 (scales from 1/1100 to 1100), so it changes nothing in a
    normal training. At the upper limit the squared scale is 5e8 and the lower one stays above float32's resolution of the
    mean, so that densities are finite and right on both sides.
    """
    return bent(0.5 * log_variance, 7.0, 10.0).exp()
