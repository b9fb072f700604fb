"""Likelihoods p(x | z): decoder output -> Pyro distribution over one observation.

A likelihood is a callable ``likelihood(output) -> distribution`` over elements (no event dimensions; the VAE adds them),
with two methods:

- ``check(x)``: raises a ``ValueError`` where the density is not defined for such data;
- ``terms(reconstruction, event_shape)``: other names under which the literature reports E[-log p(x | z)], if any.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["BernoulliLikelihood", "Likelihood", "NormalLikelihood"]


class Likelihood(Protocol):
    """What a VAE asks of a likelihood; see the head of this file."""

    def __call__(self, output: Tensor) -> dist.TorchDistribution: ...

    def check(self, x: Tensor) -> None: ...

    def terms(self, reconstruction: Tensor, event_shape: Sequence[int]) -> dict[str, Tensor]: ...


class _RelaxedBernoulli(dist.Bernoulli):
    """Bernoulli whose log_prob accepts grey values: x log p + (1 - x) log(1 - p) for x in [0, 1]; samples are 0 or 1."""

    support = constraints.unit_interval


@dataclass(frozen=True)
class BernoulliLikelihood:
    r"""Independent Bernoulli pixels, parametrised by logits l (never by probabilities, which saturate in float32).

    .. math:: \log p(x \mid z) = \sum_d x_d \, l_d(z) - \mathrm{softplus}(l_d(z))

    For binary x this is a probability. Grey x in [0, 1] is scored by the same formula, the "relaxed Bernoulli" of most
    published VAE examples: equal to minus the binary cross-entropy, but not a normalised density over [0, 1]. Compare it
    only with figures made the same way.

    Example:
        >>> p = BernoulliLikelihood()(torch.tensor([200.0]))
        >>> p.log_prob(torch.tensor([0.0]))
        tensor([-200.])
    """

    def __call__(self, output: Tensor) -> dist.TorchDistribution:
        return _RelaxedBernoulli(logits=output)

    def check(self, x: Tensor) -> None:
        low, high = x.min().item(), x.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"BernoulliLikelihood scores values in [0, 1]; found values from {low:g} to {high:g}. "
                "Scale the data to [0, 1] (uint8 images are scaled for you) or use NormalLikelihood."
            )

    def terms(self, reconstruction: Tensor, event_shape: Sequence[int]) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class NormalLikelihood:
    r"""Independent normal elements with one fixed variance.

    .. math:: -\log p(x \mid z) = \frac{\lVert x - m(z) \rVert^2}{2 \sigma^2} + \frac{D}{2} \log(2 \pi \sigma^2)

    With variance 1/2 the first term is the squared error summed over elements: the reconstruction term of the VAE
    examples that minimise squared error + KL. They drop the second term, the :meth:`constant` (448.73 nats for 784
    pixels at variance 1/2). Here every reconstruction, ELBO and log-likelihood keeps it, because without it they are no
    densities, and the squared error is reported beside them as ``squared_error``.

    Args:
        variance: :math:`\sigma^2`, the same for every element.
        mean: ``"sigmoid"`` squashes the decoder's output into (0, 1); ``"identity"`` takes it as it is.

    Example:
        >>> likelihood = NormalLikelihood(variance=0.5, mean="identity")
        >>> x, m = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])
        >>> nll = -likelihood(m).log_prob(x).sum()
        >>> round(nll.item() - likelihood.constant((2,)), 4)
        5.0
    """

    variance: float = 0.5
    mean: str = "sigmoid"

    def __post_init__(self) -> None:
        if not 0 < self.variance < math.inf:
            raise ValueError(f"NormalLikelihood: variance must be a positive number, found {self.variance}.")
        if self.mean not in ("sigmoid", "identity"):
            raise ValueError(f"NormalLikelihood: mean must be 'sigmoid' or 'identity', found {self.mean!r}.")

    def __call__(self, output: Tensor) -> dist.TorchDistribution:
        mean = torch.sigmoid(output) if self.mean == "sigmoid" else output
        return dist.Normal(mean, math.sqrt(self.variance))

    def constant(self, event_shape: Sequence[int]) -> float:
        """D/2 log(2 pi variance), in nats: the part of -log p(x | z) that depends neither on x nor on z."""
        return 0.5 * math.prod(event_shape) * math.log(2 * math.pi * self.variance)

    def check(self, x: Tensor) -> None:
        if not x.isfinite().all():
            raise ValueError("NormalLikelihood scores finite values; found NaN or infinity. Remove or replace them.")

    def terms(self, reconstruction: Tensor, event_shape: Sequence[int]) -> dict[str, Tensor]:
        return {"squared_error": 2 * self.variance * (reconstruction - self.constant(event_shape))}
