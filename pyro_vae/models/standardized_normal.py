"""A normal distribution over values in their original units whose log-density is computed on standardised values."""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["StandardizedNormal"]


class StandardizedNormal(dist.TorchDistribution):
    r"""x = a + b u with u ~ N(m, s^2), elementwise.

    .. math:: \log p(x) = \log N\Big(\frac{x - a}{b}; m, s^2\Big) - \log b

    x is standardised before it is rounded to the dtype of m and s: with x, a and b in float64, a float32 net can model
    seconds since 1970. Samples and moments have the dtype of a and b.

    Args:
        mean: m, the mean of u.
        stddev: s > 0, the standard deviation of u.
        loc: a.
        scale: b > 0.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # the distribution of u validates m and s
    support = constraints.real
    has_rsample = True

    def __init__(self, mean: Tensor, stddev: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.standardized = dist.Normal(mean, stddev, validate_args=validate_args)
        self.loc, self.scale = loc, scale
        shape = torch.broadcast_shapes(self.standardized.batch_shape, loc.shape, scale.shape)
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "StandardizedNormal":
        u, shape = self.standardized, torch.Size(batch_shape)
        kept = (u.loc.expand(shape), u.scale.expand(shape), self.loc, self.scale)
        return StandardizedNormal(*kept, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc + self.scale * self.standardized.mean

    @property
    def variance(self) -> Tensor:
        return self.stddev.square()

    @property
    def stddev(self) -> Tensor:
        return self.scale * self.standardized.stddev

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + self.scale * self.standardized.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        u = self.standardized
        log_prob: Tensor = u.log_prob(((value - self.loc) / self.scale).to(u.mean.dtype))
        return log_prob - self.scale.log().to(log_prob.dtype)
