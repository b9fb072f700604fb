"""Records of Monte-Carlo estimates: value, standard error, number of draws, and diagnostics."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae._checks import level_of_user

__all__ = ["Estimate", "ImportanceEstimate", "LogMarginal", "UnreliableEstimateWarning"]


@dataclass(frozen=True)
class Estimate:
    """A Monte-Carlo estimate of a mean over a data set.

    Args:
        value: the estimate, nats per observation.
        standard_error: standard deviation of ``value`` over new draws of the latents, for the same data; 0 if it is exact.
        num_samples: latent draws per observation; 0 if it needs none.
    """

    value: float
    standard_error: float
    num_samples: int


@dataclass(frozen=True)
class ImportanceEstimate(Estimate):
    """An :class:`Estimate` by importance sampling, with diagnostics of its weights.

    Args:
        median_ess: median over the observations of the effective sample size.
        unreliable: number of observations for which Pareto k indicates that the standard error is not reliable; None for
            fewer than 25 draws, too few to estimate it.
    """

    median_ess: float
    unreliable: int | None


class UnreliableEstimateWarning(UserWarning):
    """The importance weights have too heavy a tail for a reliable standard error."""


@dataclass(frozen=True, eq=False)
class LogMarginal:
    """log p(x) per observation, in nats, a lower bound in expectation: E[value] <= log p(x), with equality in the limit.

    Args:
        value: ``(B,)``, log of the mean importance weight.
        standard_error: ``(B,)``, of ``value``, by the delta method; nan for a single draw.
        ess: ``(B,)``, effective sample size, from 1 to ``num_samples``; 0 where every weight is 0.
        pareto_k: ``(B,)``, shape of the weights' tail; good below 0.5, unreliable above 0.7; nan if there are too few
            draws to estimate it, fewer than 25.
        num_samples: draws made per observation.
    """

    value: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    num_samples: int

    @property
    def unreliable(self) -> Tensor:
        """``(B,)`` of bool: Pareto k above min(1 - 1 / log10(K), 0.7) (Vehtari et al. 2024); False below 25 draws.

        Also False if the effective sample size is 0.9 K or more: the weights are then so even that their tail is irrelevant.
        """
        if self.num_samples < 25:
            return torch.zeros_like(self.pareto_k, dtype=torch.bool)
        return (self.pareto_k > min(1 - 1 / math.log10(self.num_samples), 0.7)) & (self.ess < 0.9 * self.num_samples)

    def warn(self, name: str) -> None:
        """Warn, as the function ``name``, at the user's line, of observations whose error cannot be trusted."""
        if bad := int(self.unreliable.sum()):
            warnings.warn(
                f"{name}: {bad:,} of {len(self.value):,} observations have importance weights of too heavy a tail (Pareto "
                f"k): there the value reads low and its error too small. Draw more than {self.num_samples:,}, or fit a "
                "better guide.",
                UnreliableEstimateWarning,
                stacklevel=level_of_user(),
            )

    @property
    def mean(self) -> ImportanceEstimate:
        """The mean over all observations, with its standard error for independent draws."""
        error = (self.standard_error**2).sum().sqrt() / len(self.value)
        return ImportanceEstimate(
            value=self.value.mean().item(),
            standard_error=error.item(),
            num_samples=self.num_samples,
            median_ess=self.ess.median().item(),
            unreliable=int(self.unreliable.sum()) if self.num_samples >= 25 else None,
        )
