"""One step of training: batch, loss, backward, optimiser."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.data.dataset import Data
from pyro_vae.training.objective import Objective
from pyro_vae.training.updates import flush_moments

__all__ = ["FLUSH_EVERY", "EagerStep", "NonFiniteStepError"]


class NonFiniteStepError(Exception):
    """A loss or gradient is not finite; parameters and optimiser state are those before that step.

    Attributes:
        index: indices of the batch.
        loss: on the batch.
        ago: number of later steps, which were rolled back with it.
    """

    def __init__(self, index: Tensor, loss: float) -> None:
        super().__init__(f"loss {loss:g}, or its gradient")
        self.index, self.loss, self.ago = index, loss, 0


class EagerStep:
    """``step(index)``: one optimiser step on the batch of the given indices. Returns the objective's terms.

    Args:
        objective: see :class:`~pyro_vae.training.objective.Objective`.
        data: observations, on the device of the parameters.
        optimizer: of the trained parameters; if training is resumed, with its restored state.
        clip_grad_norm: maximum norm of the gradient of all parameters, to which a longer one is scaled down. None: no limit.
        done: number of steps made before.
        steps: total number of steps of the run, for schedules.

    Attributes:
        not_compiled: the reason for falling back to eager execution; empty if there was none.

    Raises:
        NonFiniteStepError: by a step, or by :meth:`end`.
    """

    def __init__(
        self,
        objective: Objective,
        data: Data,
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad_norm: float | None = None,
        done: int = 0,
        steps: int | None = None,
    ) -> None:
        self.objective, self.data, self.optimizer = objective, data, optimizer
        self.parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.clip_grad_norm, self.count, self.steps = clip_grad_norm, done, steps
        self.compile_seconds = 0.0
        self.not_compiled = ""

    def begin(self) -> None:
        """Called before a sequence of steps during which only parameters, buffers and learning rate change."""

    def end(self) -> None:
        """Called after such a sequence: brings the optimiser's state up to date; raises if a step was not finite."""

    def __call__(self, index: Tensor) -> dict[str, float]:
        self._next()
        terms = self._eager(index)
        if self.count % FLUSH_EVERY == 0:
            flush_moments(self.optimizer, FLUSH_EVERY)
        return terms

    def _next(self) -> None:
        self._at_step(self.count)
        self.count += 1

    def _at_step(self, count: int) -> None:
        """Apply the objective's schedules for the step after ``count`` steps."""
        self.objective.at_step(count, count + 1 if self.steps is None else self.steps)

    def _eager(self, index: Tensor) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._backward(index)
        # NaN and infinity propagate through sums, so one number shows them, and a single transfer reads all values.
        total = torch.stack([terms["loss"], *(p.grad.sum() for p in self.parameters if p.grad is not None)]).sum()
        *numbers, total = torch.stack([*terms.values(), total]).detach().tolist()
        values = dict(zip(terms, numbers, strict=True))
        if not math.isfinite(total):
            raise NonFiniteStepError(index, values["loss"])
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_grad_norm)
        self.optimizer.step()
        return values

    def _backward(self, index: Tensor) -> dict[str, Tensor]:
        """The objective's terms on a batch; accumulates the gradient of the loss in the parameters."""
        terms = self.objective(*self.data.batch(index))
        if self.count == 1:
            _check_terms(self.objective, terms)
        terms["loss"].backward()
        return terms


# Steps between calls of flush_moments.
FLUSH_EVERY = 200


def _check_terms(objective: Objective, terms: Any) -> None:
    if not (
        isinstance(terms, dict) and "loss" in terms and all(torch.is_tensor(v) and v.dim() == 0 for v in terms.values())
    ):
        found = {k: getattr(v, "shape", v) for k, v in terms.items()} if isinstance(terms, dict) else type(terms).__name__
        raise ValueError(
            f"fit: expected {type(objective).__name__} to return a dict of scalar tensors with 'loss', found {found}."
        )
    if not terms["loss"].requires_grad:
        raise ValueError(
            f"fit: expected the loss of {type(objective).__name__} to depend on parameters that are trained, found one "
            "without a gradient. Look for detach(), no_grad() or item() on its way."
        )
