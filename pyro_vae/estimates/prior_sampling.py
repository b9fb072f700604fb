"""Estimates with decoder and prior alone, without the encoder: Monte-Carlo log-likelihood, and reconstruction by search.

.. math:: \\log p(x) \\approx \\log \\frac1M \\sum_m p(x \\mid z_m), \\qquad z_m \\sim p(z)

All observations share the M draws, so that the log-likelihoods of all pairs (draw, observation) are one matrix product
(``likelihood.pairwise_log_prob``), and memory is O(M x B) rather than O(M x B x elements).
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
    """The likelihood's ``pairwise_log_prob``: decoder outputs ``(M, ...)``, x ``(B, *event_shape)`` -> ``(M, B)``, nats.

    Raises:
        ValueError: the likelihood has no such method.
    """
    method: Callable[[Tensor, Tensor], Tensor] | None = getattr(vae.likelihood, "pairwise_log_prob", None)
    if method is None:
        raise ValueError(
            "The direct fit scores all pairs of draws and observations: expected a likelihood with a method "
            f"pairwise_log_prob(output, x), found {vae.likelihood}. Add it, or use NegativeELBO and log_marginal, which do "
            "not need it."
        )
    return method


def direct_log_prob(vae: "VAE", z: Tensor, x: Tensor) -> Tensor:
    """log (1/M) sum_m p(x_i | z_m) for given draws: z ``(M, latent_dim)``, x ``(B, *event_shape)`` -> ``(B,)``, nats."""
    return pairwise_log_prob(vae)(vae.decoder_output(z), x).logsumexp(0) - math.log(len(z))


@dataclass(frozen=True, eq=False)
class DirectLogMarginal(LogMarginal):
    """:class:`~pyro_vae.estimates.records.LogMarginal` with draws from the prior that all observations share.

    Args:
        mean_error: standard error of the mean over the observations. Since they share the draws, their errors are not
            independent; the standard error is estimated from the variation of the mean between groups of draws.
    """

    mean_error: float

    @property
    def mean(self) -> ImportanceEstimate:
        return replace(super().mean, standard_error=self.mean_error)


@torch.no_grad()
def direct_log_marginal(vae: "VAE", x: Tensor, *, num_samples: int = 10_000) -> DirectLogMarginal:
    """log p(x) by simple Monte Carlo with draws from the prior, in groups of draws, so that memory does not grow with M.

    Unbiased for p(x). For log p(x) it is a lower bound in expectation, which is loose if few of the draws explain x: see
    ``ess`` and ``pareto_k``. Uses torch's global random state.

    Args:
        vae: its decoder, likelihood and prior; the encoder is not used.
        x: observations ``(B, *event_shape)``.
        num_samples: draws M, shared by all observations.

    Raises:
        ValueError: fewer draws than 20, the number of groups of which the error is estimated; x is no batch of observations;
            or the likelihood has no ``pairwise_log_prob``.
    """
    num_samples = whole_number("num_samples", num_samples, minimum=20)
    vae.check_batch(x)
    vae.check(x)
    log_prob = pairwise_log_prob(vae)
    groups = max(20, math.ceil(num_samples / 5000))
    sizes = [num_samples * (g + 1) // groups - num_samples * g // groups for g in range(groups)]
    draws = vae.prior_of().sample((num_samples,)).split(sizes)
    images = x.split(max(1, 2**20 // max(sizes)))  # 4 MB of pairs at once, to fit into the processor's cache
    accumulators, logs = [Accumulator(num_samples) for _ in images], []
    with evaluating(vae):
        for z in draws:
            output = vae.decoder_output(z)  # (group, *event_shape)
            sums = [a.add(log_prob(output, part)) for a, part in zip(accumulators, images, strict=True)]
            logs.append(torch.cat(sums) - math.log(len(z)))  # (B,)
    value, error, ess, tail = (torch.cat(columns) for columns in zip(*(a.results() for a in accumulators), strict=True))
    # Delta method: the deviation of the mean of log p(x) is the mean relative deviation of p(x), of each group.
    deviation = (torch.stack(logs) - value).exp().mean(1)  # (groups,)
    return DirectLogMarginal(value, error, ess, tail, num_samples, (deviation.std() / math.sqrt(groups)).item())


@torch.no_grad()
def prior_search(vae: "VAE", x: Tensor, *, num_samples: int = 20_000) -> tuple[Tensor, Tensor]:
    """Reconstruct without the encoder: weigh draws from the prior by p(x | z).

    Uses torch's global random state.

    Args:
        vae: its decoder, likelihood and prior.
        x: observations ``(B, *event_shape)``.
        num_samples: draws, shared by all observations.

    Returns:
        (best, average), each ``(B, *event_shape)``: the decoder's mean at the draw of largest p(x | z), and its average over
        all draws with weights p(x | z), the self-normalised importance estimate of the posterior mean. Memory: the
        decoder's outputs for all draws, and their log-likelihoods for 500 observations.

    Raises:
        ValueError: num_samples is below 1, x is no batch of observations, or the likelihood has no ``pairwise_log_prob``.
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
