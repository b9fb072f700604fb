"""The Bernoulli distribution by logits, extended to grey values, with few passes over the pixels."""

from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

__all__ = ["RelaxedBernoulli", "RelaxedBernoulliEvent"]


class RelaxedBernoulli(dist.Bernoulli):
    """Bernoulli whose log_prob accepts grey values: x log p + (1 - x) log(1 - p) for x in [0, 1]; samples are 0 or 1.

    An infinite logit is scored as the largest finite one of its type.
    """

    support = constraints.unit_interval

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits, x = broadcast_all(_finite(self.logits), value)
        return -F.binary_cross_entropy_with_logits(logits, x, reduction="none")

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> dist.TorchDistribution:
        ndims = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return RelaxedBernoulliEvent(self, ndims) if ndims else self


class RelaxedBernoulliEvent(dist.Independent):  # to_event returns an instance
    """Independent Bernoulli pixels whose joint log_prob is computed by one fused formula, in about half the time."""

    def log_prob(self, value: Tensor) -> Tensor:
        logits, ndims = self.base_dist.logits, self.reinterpreted_batch_ndims
        half = logits.dtype not in (torch.float32, torch.float64)  # products below would overflow
        if ndims == 0 or half or logits.shape[-ndims:] != value.shape[-ndims:]:
            return super().log_prob(value)
        if self.base_dist._validate_args:
            self.base_dist._validate_sample(value)
        logits, x = logits.flatten(-ndims), value.flatten(-ndims)
        if torch.is_grad_enabled() and (logits.requires_grad or x.requires_grad):
            log_prob, _ = _BernoulliLogProb.apply(logits, x)
            return log_prob
        return _bernoulli_log_prob(logits, x)


class _BernoulliLogProb(torch.autograd.Function):
    """sum_d x_d l_d - softplus(l_d) with its gradient, by one exponential per pixel for both.

    softplus(l) = relu(l) - log max(s, 1 - s), s the sigmoid of l, which the gradient x - s needs as well. The maximum lies
    in [1/2, 1], so that one logarithm serves a product of up to 126 of them. The second output, s, is for backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        s = logits.sigmoid()
        largest = torch.maximum(s, 1 - s).unflatten(-1, (-1, _block(logits.shape[-1])))
        logits = _finite(logits)
        return (x * logits - logits.relu()).sum(-1) + largest.prod(-1).log().sum(-1), s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits, x, s = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            s = logits.sigmoid()
        gradient = gradient.unsqueeze(-1)
        to_logits, to_x = ctx.needs_input_grad
        return (
            (gradient * (x - s)).sum_to_size(logits.shape) if to_logits else None,
            (gradient * logits).sum_to_size(x.shape) if to_x else None,
        )

    @staticmethod
    def jvp(ctx: Any, logits_change: Tensor, x_change: Tensor | None, *_: Any) -> tuple[Tensor, None]:
        logits, x, s = ctx.saved_tensors
        change = (x - s) * logits_change
        if x_change is not None:
            change = change + logits * x_change
        return change.sum(-1), None


def _finite(logits: Tensor) -> Tensor:
    """The largest finite numbers in place of infinite ones: 0 times them, where x is 0 or 1, is 0 and not nan."""
    largest = torch.finfo(logits.dtype).max
    return logits.clamp(-largest, largest)


def _block(pixels: int) -> int:
    """Factors per product: the largest divisor of the number of pixels up to 126; 2^-126 is float32's smallest normal."""
    return next(n for n in range(126, 0, -1) if pixels % n == 0)  # 112 for 784 pixels


_CACHE = 2**19  # numbers in a buffer; with fewer, calls cost more than the memory saves


def _bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """The same without a gradient, sum_d ((2 x_d - 1) l_d - |l_d|) / 2 - log(1 + exp(-|l_d|)), in blocks of rows.

    One logarithm serves a product of factors 1 + exp(-|l|), each in (1, 2].
    """
    signs = (2 * x - 1).expand(torch.broadcast_shapes(logits.shape, x.shape))
    return _bernoulli_rows(logits.expand(signs.shape), signs)


def _bernoulli_rows(logits: Tensor, signs: Tensor) -> Tensor:
    if logits.dim() > 1 and logits.numel() > _CACHE:
        if (rows := _CACHE // logits[0].numel()) <= 1:
            return torch.stack([_bernoulli_rows(a, b) for a, b in zip(logits, signs, strict=True)])
        return torch.cat([_bernoulli_rows(a, b) for a, b in zip(logits.split(rows), signs.split(rows), strict=True)])
    logits = _finite(logits)
    size = torch.copysign(logits, logits.new_tensor(-1.0))  # -|l| in one pass
    # The terms are added per pixel: two separate sums would cancel, and lose the precision of a small log p.
    linear = torch.addcmul(size, signs, logits).sum(-1)
    return 0.5 * linear - size.exp_().add_(1).unflatten(-1, (-1, _block(logits.shape[-1]))).prod(-1).log_().sum(-1)
