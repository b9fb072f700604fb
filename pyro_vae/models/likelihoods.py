"""Likelihoods p(x | z): decoder output -> Pyro distribution over one observation.

A likelihood is any callable ``likelihood(output) -> distribution`` over elements (no event dimensions; the VAE adds them):
a module, an object or a function. Where it takes context too, ``likelihood(output, *context)``, each context tensor comes
with the leading dimensions of output. It may have four methods:

- ``check(x)``: raises a ``ValueError`` where the density is not defined for such data; ``check(x, *context)`` looks at the
  context too; without it, x has to lie in the support of the distribution;
- ``terms(reconstruction, event_shape)``: other names under which the literature reports E[-log p(x | z)];
- ``pairwise_log_prob(output, x)``: log p(x | z) of ALL pairs by matrix products: no (B, M, elements) tensor exists. Only the
  direct fit, :mod:`pyro_vae.estimates.prior_sampling`, asks for it;
- ``standardize(x)``: x as the encoder is given it, numbers of order 1. With it, x comes in float64, and a batch of any
  floating-point type is taken.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vae._checks import few_values, number, whole_number
from pyro_vae.models.relaxed_bernoulli import RelaxedBernoulli
from pyro_vae.models.scales import bent, bounded_scale
from pyro_vae.models.standardized_normal import StandardizedNormal

__all__ = [
    "BernoulliLikelihood",
    "LearnedNormalLikelihood",
    "Likelihood",
    "NormalLikelihood",
    "PoissonLikelihood",
    "StandardizedNormalLikelihood",
    "check_support",
]


Likelihood: TypeAlias = Callable[..., dist.TorchDistribution]  # see the head of this file


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
        # Any real logits are valid; checking that they are real would cost a pass over them. Values are still checked.
        p = RelaxedBernoulli(logits=output, validate_args=False)
        p._validate_args = dist.Bernoulli._validate_args
        return p

    def pairwise_log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """x . l - sum softplus(l), one matrix product: ``(M, *event_shape)``, ``(B, *event_shape)`` -> ``(M, B)``."""
        logits = output.flatten(1)
        return logits @ x.flatten(1).T - F.softplus(logits).sum(-1, keepdim=True)

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
        number("variance", self.variance)
        if self.mean not in ("sigmoid", "identity"):
            raise ValueError(f"NormalLikelihood: mean must be 'sigmoid' or 'identity', found {self.mean!r}.")

    def __call__(self, output: Tensor) -> dist.TorchDistribution:
        mean = torch.sigmoid(output) if self.mean == "sigmoid" else output
        return dist.Normal(mean, math.sqrt(self.variance))

    def pairwise_log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """``-(|m|^2 - 2 m . x + |x|^2) / (2 variance) - constant``, one matrix product: -> ``(M, B)``."""
        mean, x = _centered(self(output).mean.flatten(1), x.flatten(1))
        squares = (mean**2).sum(-1, keepdim=True) - 2 * mean @ x.T + (x**2).sum(-1)
        return -squares / (2 * self.variance) - self.constant(x.shape[1:])

    def constant(self, event_shape: Sequence[int]) -> float:
        """D/2 log(2 pi variance), in nats: the part of -log p(x | z) that depends neither on x nor on z."""
        return 0.5 * math.prod(event_shape) * math.log(2 * math.pi * self.variance)

    def check(self, x: Tensor) -> None:
        _check_finite(x)

    def terms(self, reconstruction: Tensor, event_shape: Sequence[int]) -> dict[str, Tensor]:
        return {"squared_error": 2 * self.variance * (reconstruction - self.constant(event_shape))}


@dataclass(frozen=True)
class LearnedNormalLikelihood:
    r"""Independent normal elements, mean and variance both from the decoder: two raw numbers per element.

    .. math:: -\log p(x \mid z) = \sum_d \frac{(x_d - m_d(z))^2}{2 \sigma_d^2(z)} + \frac12 \log(2 \pi \sigma_d^2(z))

    The decoder's output is ``(*batch, *event_shape, 2)``: mean and log-variance, which is bounded by
    :func:`~pyro_vae.models.scales.bounded_scale`. On data that lie in a subspace the variance falls towards that bound and
    the density grows without a maximum.
    """

    def __call__(self, output: Tensor) -> dist.TorchDistribution:
        if output.shape[-1] != 2:
            raise ValueError(
                f"LearnedNormalLikelihood: expected decoder output of shape (..., 2), mean and log-variance, "
                f"found {tuple(output.shape)}. Give the decoder outputs=2."
            )
        mean, log_variance = output.unbind(-1)
        return dist.Normal(mean, bounded_scale(log_variance))

    def pairwise_log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """The square multiplied out, two matrix products, with 1 / variance and mean / variance: -> ``(M, B)``."""
        p = self(output)
        mean, x = _centered(p.mean.flatten(1), x.flatten(1))
        scale = p.stddev.flatten(1)
        precision = scale**-2
        squares = precision @ (x**2).T - 2 * (mean * precision) @ x.T + (mean**2 * precision).sum(-1, keepdim=True)
        return -0.5 * squares - (scale.log() + 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)

    def check(self, x: Tensor) -> None:
        _check_finite(x)

    def terms(self, reconstruction: Tensor, event_shape: Sequence[int]) -> dict[str, Tensor]:
        return {}


class StandardizedNormalLikelihood(nn.Module):
    r"""A :class:`LearnedNormalLikelihood` of standardised data, as a density of the data in their own units.

    .. math:: x_d \mid z \sim N\big(a_d + b_d m_d(z), \, b_d^2 \sigma_d^2(z)\big), \qquad
        \log p(x \mid z) = \log p\Big(\frac{x - a}{b} \,\Big|\, z\Big) - \sum_d \log b_d

    The decoder's output is ``(*batch, *event_shape, 2)``: mean and log-variance of :math:`(x - a) / b`, so that its numbers
    are of order 1 whatever the units of the data; the VAE gives its encoder :math:`(x - a) / b` too. a and b are buffers,
    saved with the weights, and stay in float64 where a model is converted: what differs by 1 at 1.7e9, seconds, say, is the
    same number in float32. Draws and means of p(x | z) are in float64 with them.

    Args:
        loc: a, ``event_shape``: the mean of the training data.
        scale: b, ``event_shape``, above 0: their standard deviation.

    Example:
        >>> likelihood = StandardizedNormalLikelihood(torch.tensor([1000.0]), torch.tensor([50.0]))
        >>> p = likelihood(torch.zeros(1, 2))  # mean 0 and log-variance 0 of the standardised data
        >>> p.mean, p.stddev
        (tensor([1000.], dtype=torch.float64), tensor([50.], dtype=torch.float64))
        >>> likelihood.standardize(torch.tensor([1100.0]))
        tensor([2.], dtype=torch.float64)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        if loc.shape != scale.shape or not (loc.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
            raise ValueError(
                f"StandardizedNormalLikelihood: expected finite loc and scale > 0 of one shape, found shapes "
                f"{tuple(loc.shape)} and {tuple(scale.shape)}, scale from {scale.min():g} to {scale.max():g}."
            )
        self.register_buffer("loc", loc.double())
        self.register_buffer("scale", scale.double())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StandardizedNormalLikelihood":
        """What ``to``, ``float`` and ``half`` go through: buffers change their device, not their type."""
        kept = {name: buffer for name, buffer in self.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            setattr(self, name, (kept[name] if name in kept and not buffer.is_meta else buffer).to(buffer.device).double())
        return self

    def standardize(self, x: Tensor) -> Tensor:
        """(x - a) / b, float64."""
        return (x - self.loc) / self.scale

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        p = LearnedNormalLikelihood()(output)
        return StandardizedNormal(p.mean, p.stddev, self.loc, self.scale)

    def pairwise_log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """As of :class:`LearnedNormalLikelihood`, of standardised x, less the logs of the scales: -> ``(M, B)``."""
        log_prob = LearnedNormalLikelihood().pairwise_log_prob(output, self.standardize(x).to(output.dtype))
        return log_prob - self.scale.log().sum().to(log_prob.dtype)

    def check(self, x: Tensor) -> None:
        _check_finite(x)

    def terms(self, reconstruction: Tensor, event_shape: Sequence[int]) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class PoissonLikelihood:
    r"""Independent Poisson counts; the decoder's output is the log of the rate r.

    .. math:: \log p(x \mid z) = \sum_d x_d \, (\log r_d(z) + \log e_d) - r_d(z) \, e_d - \log x_d!

    The exposure e, 1 unless it is given, is what counts are proportional to: time watched, area, population, the number of
    reads of a cell. It is known, not modelled: a context tensor of one row per observation. Log rates are their own within
    +-20 and bend smoothly to stay within +-25, so that no rate overflows.

    Args:
        exposure: which of the context tensors is the exposure, counted from 0: ``(B,)``, ``(B, 1)`` or
            ``(B, *event_shape)``, above 0. None: there is none, and the likelihood takes no context.

    Raises:
        ValueError: exposure is no whole number >= 0; in a call, a context without it, or one of another shape.

    Example:
        >>> output = torch.zeros(2, 3)  # log rates of 2 observations of 3 elements
        >>> PoissonLikelihood()(output).mean[0]
        tensor([1., 1., 1.])
        >>> PoissonLikelihood(exposure=0)(output, torch.tensor([1.0, 10.0])).mean[:, 0]
        tensor([ 1., 10.])
    """

    exposure: int | None = None

    def __post_init__(self) -> None:
        if self.exposure is not None:
            whole_number("exposure", self.exposure, minimum=0)

    @property
    def takes_context(self) -> bool:
        return self.exposure is not None

    def __call__(self, output: Tensor, *context: Tensor) -> dist.TorchDistribution:
        rate = bent(output, _FREE_LOG_RATE, _LIMIT_LOG_RATE).exp()
        if self.exposure is None:
            return dist.Poisson(rate)
        exposure = self._exposure(context)
        shape = (*exposure.shape, *(1,) * (rate.dim() - exposure.dim()))
        if len(shape) > rate.dim() or any(n not in (1, m) for n, m in zip(shape, rate.shape, strict=True)):
            raise ValueError(
                f"PoissonLikelihood: expected exposure of shape (B,), (B, 1) or (B, *event_shape), found "
                f"{tuple(exposure.shape)} for rates of shape {tuple(rate.shape)}. Reshape it."
            )
        return dist.Poisson(rate * exposure.reshape(shape).to(rate.dtype))

    def _exposure(self, context: Sequence[Tensor]) -> Tensor:
        index = self.exposure or 0
        if len(context) <= index:
            raise ValueError(
                f"PoissonLikelihood: expected context tensor {index}, the exposure, counted from 0, found a context of "
                f"{len(context)}. Give it, or leave exposure out of the likelihood."
            )
        return context[index]

    def pairwise_log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """x . log r - sum r - sum log x!, one matrix product: ``(M, *event_shape)``, ``(B, *event_shape)`` -> ``(M, B)``."""
        if self.exposure is not None:
            raise ValueError(
                "PoissonLikelihood: expected no exposure where all pairs of draws and observations are scored, found "
                f"exposure={self.exposure}. Use NegativeELBO or log_marginal, which score each observation by itself."
            )
        log_rate, x = bent(output, _FREE_LOG_RATE, _LIMIT_LOG_RATE).flatten(1), x.flatten(1)
        return log_rate @ x.T - log_rate.exp().sum(-1, keepdim=True) - (x + 1).lgamma().sum(-1)

    def check(self, x: Tensor, *context: Tensor) -> None:
        _check_all(
            "x", x, x.isfinite() & (x >= 0) & (x == x.round()), "whole numbers >= 0. Give counts as they are, unscaled"
        )
        if self.exposure is not None and context:
            e = self._exposure(context)
            _check_all("exposure", e, e.isfinite() & (e > 0), "finite numbers above 0. Drop observations without exposure")

    def terms(self, reconstruction: Tensor, event_shape: Sequence[int]) -> dict[str, Tensor]:
        return {}


# Rates from 2e-9 to 5e8 are exp(output) itself; 7e10, the limit, leaves float32 room for squared gradients.
_FREE_LOG_RATE, _LIMIT_LOG_RATE = 20.0, 25.0


def check_support(p: dist.TorchDistribution, x: Tensor) -> None:
    """Raise a ``ValueError`` where x, observations, lies outside the support of p(x | z); a few of them are shown."""
    try:
        good = p.support.check(x)
    except NotImplementedError:  # of a distribution that does not say
        return
    if not good.all():
        some = ", ".join(f"{value:g}" for value in x[~good].flatten()[:3].tolist())
        inner = p.base_dist if isinstance(p, dist.Independent) else p
        raise ValueError(
            f"expected x that {type(inner).__name__}, the likelihood, takes: {few_values(str(inner.support))}; found "
            f"observations that it does not, of {some}, ... Scale x, or take another likelihood."
        )


def _check_all(name: str, values: Tensor, good: Tensor, expected: str) -> None:
    if not good.all():
        bad = values[~good]
        some = ", ".join(f"{value:g}" for value in bad[:3].tolist())
        more = f", ... ({len(bad):,} of {values.numel():,})" if len(bad) > 3 else ""
        raise ValueError(f"PoissonLikelihood: found {name} {some}{more}, expected {expected}.")


def _centered(mean: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both less the mean of x: a square multiplied out would lose the digits that they have in common."""
    center = x.mean(0)
    return mean - center, x - center


def _check_finite(x: Tensor) -> None:
    if not x.isfinite().all():
        raise ValueError("A normal likelihood scores finite values; found NaN or infinity. Remove or replace them.")
