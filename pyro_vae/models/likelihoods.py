"""Likelihoods p(x | z): decoder output -> Pyro distribution over one observation.

A likelihood is any callable ``likelihood(output) -> distribution`` over elements (no event dimensions; the VAE adds them):
a module, an object or a function. If it takes context, ``likelihood(output, *context)``, each context tensor has the
leading dimensions of output. It may have four methods:

- ``check(x)`` or ``check(x, *context)``: raises a ``ValueError`` for data on which the density is not defined. Without this
  method, x must lie in the support of the distribution;
- ``terms(reconstruction, event_shape)``: quantities related to E[-log p(x | z)] that the literature reports, by name;
- ``pairwise_log_prob(output, x)``: log p(x | z) of all pairs of z and x by matrix products, without a tensor of shape
  (B, M, elements). Only the direct fit, :mod:`pyro_vae.estimates.prior_sampling`, needs it;
- ``standardize(x)``: the standardised x, which is the encoder's input. A VAE with such a likelihood gets x in float64, and
  accepts any floating-point type.
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


Likelihood: TypeAlias = Callable[..., dist.TorchDistribution]  # see the module's docstring


@dataclass(frozen=True)
class BernoulliLikelihood:
    r"""Independent Bernoulli elements, parametrised by logits l (not by probabilities, which saturate in float32).

    .. math:: \log p(x \mid z) = \sum_d x_d \, l_d(z) - \mathrm{softplus}(l_d(z))

    For binary x this is a log probability. For grey x in [0, 1] the same formula, minus the binary cross-entropy, is the
    "relaxed Bernoulli" of most published VAE examples. It is not a normalised density over [0, 1]: compare it only with
    values of the same formula.

    Example:
        >>> p = BernoulliLikelihood()(torch.tensor([200.0]))
        >>> p.log_prob(torch.tensor([0.0]))
        tensor([-200.])
    """

    def __call__(self, output: Tensor) -> dist.TorchDistribution:
        # All real logits are valid, so their validation, a pass over them, is skipped. Values of x are still validated.
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
    examples that minimise squared error + KL. They omit the second term, the :meth:`constant` (448.73 nats for 784
    pixels at variance 1/2), without which a reconstruction, ELBO or log-likelihood is not that of a normalised density.
    Here all of them include it, and the squared error is reported in addition, as ``squared_error``.

    Args:
        variance: :math:`\sigma^2`, the same for every element.
        mean: function of the decoder's output that gives m(z): ``"sigmoid"``, with values in (0, 1), or ``"identity"``.

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
    r"""Independent normal elements whose mean and variance are both given by the decoder, two outputs per element.

    .. math:: -\log p(x \mid z) = \sum_d \frac{(x_d - m_d(z))^2}{2 \sigma_d^2(z)} + \frac12 \log(2 \pi \sigma_d^2(z))

    The decoder's output is ``(*batch, *event_shape, 2)``: mean and log-variance, which is bounded by
    :func:`~pyro_vae.models.scales.bounded_scale`. If the data lie in a subspace, the likelihood has no maximum, and the
    variance falls towards that bound.
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
        """The expanded square as two matrix products, with 1 / variance and mean / variance: -> ``(M, B)``."""
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
    r"""A :class:`LearnedNormalLikelihood` of standardised data, as a density of the data in their original units.

    .. math:: x_d \mid z \sim N\big(a_d + b_d m_d(z), \, b_d^2 \sigma_d^2(z)\big), \qquad
        \log p(x \mid z) = \log p\Big(\frac{x - a}{b} \,\Big|\, z\Big) - \sum_d \log b_d

    The decoder's output is ``(*batch, *event_shape, 2)``: mean and log-variance of :math:`(x - a) / b`, which are of order 1
    whatever the units of the data. The encoder's input is :math:`(x - a) / b` too. a and b are buffers, saved with the
    parameters. They stay in float64 when a model is converted, because float32 cannot resolve differences of 1 at 1.7e9,
    times in seconds, say. Samples and means of p(x | z) are therefore in float64.

    Args:
        loc: a, ``event_shape``: the mean of the training data.
        scale: b > 0, ``event_shape``: the standard deviation of the training data.

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
        """Called by ``to``, ``float`` and ``half``: buffers follow the device, but stay in float64."""
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
        """That of :class:`LearnedNormalLikelihood` for standardised x, minus the sum of the log scales: -> ``(M, B)``."""
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

    The exposure e, 1 by default, is the known quantity to which expected counts are proportional: time of observation,
    area, population, sequencing depth of a cell. It is given as a context tensor with one row per observation. Log rates
    within +-20 are unchanged; beyond, they are bounded smoothly by +-25, so that no rate overflows.

    Args:
        exposure: index of the exposure among the context tensors, from 0; the tensor is ``(B,)``, ``(B, 1)`` or
            ``(B, *event_shape)``, above 0. None: no exposure, and the likelihood takes no context.

    Raises:
        ValueError: exposure is no whole number >= 0; in a call, the exposure is missing or has the wrong shape.

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
                f"PoissonLikelihood: expected the exposure as context tensor {index}, counted from 0, found {len(context)} "
                "context tensors. Pass it, or construct the likelihood without exposure."
            )
        return context[index]

    def pairwise_log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """x . log r - sum r - sum log x!, one matrix product: ``(M, *event_shape)``, ``(B, *event_shape)`` -> ``(M, B)``."""
        if self.exposure is not None:
            raise ValueError(
                "PoissonLikelihood: expected no exposure for the pairwise log-likelihood of draws and observations, found "
                f"exposure={self.exposure}. Use NegativeELBO or log_marginal, which score each observation separately."
            )
        log_rate, x = bent(output, _FREE_LOG_RATE, _LIMIT_LOG_RATE).flatten(1), x.flatten(1)
        return log_rate @ x.T - log_rate.exp().sum(-1, keepdim=True) - (x + 1).lgamma().sum(-1)

    def check(self, x: Tensor, *context: Tensor) -> None:
        _check_all("x", x, x.isfinite() & (x >= 0) & (x == x.round()), "whole numbers >= 0. Pass unscaled counts")
        if self.exposure is not None and context:
            e = self._exposure(context)
            _check_all("exposure", e, e.isfinite() & (e > 0), "finite numbers above 0. Drop observations without exposure")

    def terms(self, reconstruction: Tensor, event_shape: Sequence[int]) -> dict[str, Tensor]:
        return {}


# Rates from 2e-9 to 5e8 are exactly exp(output); at the limit, 7e10, squared gradients do not overflow float32.
_FREE_LOG_RATE, _LIMIT_LOG_RATE = 20.0, 25.0


def check_support(p: dist.TorchDistribution, x: Tensor) -> None:
    """Raise a ``ValueError`` with a few of the values if observations x lie outside the support of p(x | z)."""
    try:
        good = p.support.check(x)
    except NotImplementedError:  # the distribution defines no support
        return
    if not good.all():
        some = ", ".join(f"{value:g}" for value in x[~good].flatten()[:3].tolist())
        inner = p.base_dist if isinstance(p, dist.Independent) else p
        raise ValueError(
            f"expected x in the support of the likelihood, {type(inner).__name__}: {few_values(str(inner.support))}; found "
            f"values outside, {some}, ... Scale x, or use another likelihood."
        )


def _check_all(name: str, values: Tensor, good: Tensor, expected: str) -> None:
    if not good.all():
        bad = values[~good]
        some = ", ".join(f"{value:g}" for value in bad[:3].tolist())
        more = f", ... ({len(bad):,} of {values.numel():,})" if len(bad) > 3 else ""
        raise ValueError(f"PoissonLikelihood: found {name} {some}{more}, expected {expected}.")


def _centered(mean: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both minus the mean of x, to avoid cancellation in the expanded square."""
    center = x.mean(0)
    return mean - center, x - center


def _check_finite(x: Tensor) -> None:
    if not x.isfinite().all():
        raise ValueError("A normal likelihood scores finite values; found NaN or infinity. Remove or replace them.")
