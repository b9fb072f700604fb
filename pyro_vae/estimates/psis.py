"""Estimates and diagnostics from arrays of log importance weights (draws, observations); independent of Pyro."""

import math

import torch
from torch import Tensor

__all__ = ["Accumulator", "pareto_k"]


class Accumulator:
    """Accumulates log weights ``(draws, B)`` in chunks; stores two sums and the largest weights of each observation."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        # The tail to fit a generalised Pareto distribution to (Vehtari et al. 2024), and the weight just below it.
        self.keep = math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples))) + 1
        self.log_sum = self.log_sum_squares = torch.tensor(-math.inf, dtype=torch.float64)
        self.largest: Tensor | None = None

    def add(self, log_weights: Tensor) -> Tensor:
        """Add log weights ``(draws, B)``; returns the log of their sum over the draws, ``(B,)``."""
        shift = log_weights.amax(0)
        shift = torch.where(shift > -math.inf, shift, 0.0)  # avoids -inf - -inf if all weights are 0
        weights = (log_weights - shift).exp_()
        log_sum = shift + weights.sum(0, dtype=torch.float64).log()
        log_sum_squares = 2 * shift + weights.square_().sum(0, dtype=torch.float64).log()
        self.log_sum = torch.logaddexp(self.log_sum.to(log_sum.device), log_sum)
        self.log_sum_squares = torch.logaddexp(self.log_sum_squares.to(log_sum.device), log_sum_squares)
        rows = log_weights.T if self.largest is None else torch.cat([self.largest, log_weights.T], dim=1)
        # (B, kept): topk along contiguous rows is twice as fast as along columns
        self.largest = rows.contiguous().topk(min(self.keep, rows.shape[1]), dim=1).values
        return log_sum

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Value, standard error, effective sample size and Pareto k, each ``(B,)``."""
        if self.largest is None:
            raise ValueError("results: no weights were added.")
        k = self.num_samples
        possible = self.log_sum > -math.inf
        ess = torch.where(possible, (2 * self.log_sum - self.log_sum_squares).exp(), 0.0)
        # Relative variance of the mean weight: by the delta method, the variance of its log. Undefined for a single draw.
        variance = (k / ess - 1).clamp_min(0) / (k - 1) if k > 1 else torch.full_like(ess, math.nan)
        return self.log_sum - math.log(k), variance.sqrt(), ess, pareto_k(self.largest.T)


def pareto_k(largest: Tensor) -> Tensor:
    """Shape k of a generalised Pareto distribution fitted to the tail of importance weights (Vehtari et al. 2024).

    By the estimator of Zhang and Stephens (2009, Technometrics 51:316), with a prior worth ten observations at 0.5.

    Args:
        largest: log weights ``(M + 1, B)``, descending: a tail of M weights, and the threshold.

    Returns:
        ``(B,)``: nan if M < 5; -inf if there is no tail (log weights equal within 1e-3); inf if fewer than 5 weights exceed
        the threshold, or all weights are 0.
    """
    size = len(largest) - 1
    if size < 5:
        return torch.full_like(largest[0], math.nan)
    weights = (largest.double() - largest[0]).exp()  # relative to the largest: no overflow
    tail = (weights[:-1] - weights[-1]).flip(0)  # (M, B), ascending excesses over the threshold
    count = (tail > 0).sum(0)  # (B,): weights equal to the threshold do not belong to the tail, and add 0 to its sums
    place = size - count + (count / 4 + 0.5).long() - 1
    quartile = tail.gather(0, place.clamp(0, size - 1).unsqueeze(0)).squeeze(0)
    grid = 30 + int(math.sqrt(size))
    steps = torch.arange(1, grid + 1, dtype=tail.dtype, device=tail.device).unsqueeze(-1)
    theta = 1 / tail[-1] + (1 - (grid / (steps - 0.5)).sqrt()) / (3 * quartile)  # (grid, B)
    shape = torch.log1p(-theta.unsqueeze(1) * tail).sum(1) / count  # (grid, B)
    profile = count * ((-theta / shape).log() - shape - 1)  # log-likelihood of each theta
    theta_hat = (theta * profile.softmax(0)).sum(0)
    k = torch.log1p(-theta_hat * tail).sum(0) / count
    k = (count * k + 10 * 0.5) / (count + 10)
    k = torch.where(count >= 5, k, math.inf)
    k = torch.where(largest[0] - largest[-1] < 1e-3, -math.inf, k)  # these differences may be rounding errors
    return torch.where(largest[0] == -math.inf, math.inf, k)
