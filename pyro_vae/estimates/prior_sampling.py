"""The decoder and the prior alone, no encoder: Monte-Carlo log-likelihood, and reconstruction by search in the prior.

.. math:: \\log p(x) \\approx \\log \\frac1M \\sum_m p(x \\mid z_m), \\qquad z_m \\sim p(z)

The same M draws serve all images, so the log-likelihoods of all pairs (draw, image) are one matrix product
(``likelihood.pairwise_log_prob``) and memory is O(M x B), never O(M x B x pixels).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_vae._checks import whole_number
from pyro_vae.estimates.psis import Accumulator
from pyro_vae.estimates.records import ImportanceEstimate, LogMarginal
from pyro_vae.models.programs import evaluating

if TYPE_CHECKING:
    from pyro_vae.models.vae import VAE

__all__ = ["DirectLogMarginal", "direct_log_marginal", "direct_log_prob", "pairwise_log_prob", "prior_search"]


def pairwise_log_prob(vae: "VAE") -> Callable[[Tensor, Tensor], Tensor]:
    """The likelihood's method of that name: decoder outputs ``(M, ...)``, x ``(B, *event_shape)`` -> ``(M, B)``, nats.

    Raises:
        ValueError: the likelihood has none.
    """
    method: Callable[[Tensor, Tensor], Tensor] | None = getattr(vae.likelihood, "pairwise_log_prob", None)
    if method is None:
        raise ValueError(
            "The direct fit scores all pairs of draws and observations: expected a likelihood with a method "
            f"pairwise_log_prob(output, x), found {vae.likelihood}. Add it, or use NegativeELBO and log_marginal, which do "
            "without."
        )
    return method


def direct_log_prob(vae: "VAE", z: Tensor, x: Tensor) -> Tensor:
    """log (1/M) sum_m p(x_i | z_m) for given draws: z ``(M, latent_dim)``, x ``(B, *event_shape)`` -> ``(B,)``, nats."""
    return pairwise_log_prob(vae)(vae.decoder_output(z), x).logsumexp(0) - math.log(len(z))


@dataclass(frozen=True, eq=False)
class DirectLogMarginal(LogMarginal):
    """:class:`~pyro_vae.estimates.records.LogMarginal` by draws from the prior that all observations share.

    Args:
        mean_error: standard error of the mean over the observations. Their errors are not independent, since the draws are
            the same, so it is found from the spread of that mean between groups of draws.
    """

    mean_error: float

    @property
    def mean(self) -> ImportanceEstimate:
        return replace(super().mean, standard_error=self.mean_error)


@torch.no_grad()
def direct_log_marginal(vae: "VAE", x: Tensor, *, num_samples: int = 10_000) -> DirectLogMarginal:
    """log p(x) by plain Monte Carlo from the prior, in groups of draws, so that memory stays bounded whatever M.

    Unbiased for p(x), and for log p(x) a lower bound in expectation that is loose while few draws explain x: see ``ess`` and
    ``pareto_k``. Uses torch's global random state.

    Args:
        vae: its decoder, likelihood and prior; the encoder is not used.
        x: observations ``(B, *event_shape)``.
        num_samples: draws M, shared by all observations.

    Raises:
        ValueError: fewer draws than the 20 groups whose spread gives the error, x is no batch of observations, or the
            likelihood has no ``pairwise_log_prob``.
    """
    num_samples = whole_number("num_samples", num_samples, minimum=20)
    vae.check_batch(x)
    vae.check(x)
    log_prob = pairwise_log_prob(vae)
    groups = max(20, math.ceil(num_samples / 5000))
    sizes = [num_samples * (g + 1) // groups - num_samples * g // groups for g in range(groups)]
    draws = vae.prior_of().sample((num_samples,)).split(sizes)
    images = x.split(max(1, 2**20 // max(sizes)))  # pairs of 4 MB at once: what stays in a cache
    accumulators, logs = [Accumulator(num_samples) for _ in images], []
    with evaluating(vae):
        for z in draws:
            output = vae.decoder_output(z)  # (group, *event_shape)
            sums = [a.add(log_prob(output, part)) for a, part in zip(accumulators, images, strict=True)]
            logs.append(torch.cat(sums) - math.log(len(z)))  # (B,)
    value, error, ess, tail = (torch.cat(columns) for columns in zip(*(a.figures() for a in accumulators), strict=True))
    # Delta method: the mean of log p(x) moves by the mean over images of the relative deviation of p(x), group by group.
    deviation = (torch.stack(logs) - value).exp().mean(1)  # (groups,)
    return DirectLogMarginal(value, error, ess, tail, num_samples, (deviation.std() / math.sqrt(groups)).item())


@torch.no_grad()
def prior_search(vae: "VAE", x: Tensor, *, num_samples: int = 20_000) -> tuple[Tensor, Tensor]:
    """Reconstruct without an encoder: score draws from the prior by p(x | z).

    Uses torch's global random state.

    Args:
        vae: its decoder, likelihood and prior.
        x: observations ``(B, *event_shape)``.
        num_samples: draws, shared by all observations.

    Returns:
        (best, average), each ``(B, *event_shape)``: the decoder's mean at the draw of largest p(x | z), and its average over
        all draws weighted by p(x | z), which is the posterior mean of the reconstruction, self-normalised. Memory is that of
        the decoder's outputs for all draws and of their log-likelihoods for 500 observations.

    Raises:
        ValueError: no draws, x is no batch of observations, or the likelihood has no ``pairwise_log_prob``.
    """
    vae.check_batch(x)
    vae.check(x)
    log_prob = pairwise_log_prob(vae)
    z = vae.prior_of().sample((whole_number("num_samples", num_samples),))
    with evaluating(vae):
        outputs = torch.cat([vae.decoder_output(part) for part in z.split(5000)])  # (num_samples, *event_shape)
    means = vae.likelihood(outputs).mean
    best, average = [], []
    for images in x.split(500):  # (num_samples, 500) log-likelihoods at once
        log_p = log_prob(outputs, images)
        best.append(means[log_p.argmax(0)])
        average.append((log_p.to(means.dtype).softmax(0).T @ means.flatten(1)).unflatten(-1, vae.event_shape))
    return torch.cat(best), torch.cat(average)
