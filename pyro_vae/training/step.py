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
    """A loss or gradient that is not finite; parameters and moments are those before that step.

    Attributes:
        index: of the batch.
        loss: on it.
        ago: steps made after it, and undone with it.
    """

    def __init__(self, index: Tensor, loss: float) -> None:
        super().__init__(f"loss {loss:g}, or its gradient")
        self.index, self.loss, self.ago = index, loss, 0


class EagerStep:
    """``step(index)``: one step of the optimiser on the batch at these places of the data. Returns the objective's terms.

    Args:
        objective: see :class:`~pyro_vae.training.objective.Objective`.
        data: observations, on the device of the parameters.
        optimizer: of the parameters that are trained; after steps made before, its state is theirs.
        clip_grad_norm: the gradient is scaled down to this norm, over all parameters, where it is longer. None: it is not.
        done: steps made before.
        steps: steps that the run will have made at its end, for what changes in its course.

    Attributes:
        not_compiled: why an objective that was to be compiled is trained eagerly, if it is.

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
        """Before steps in which nothing but the parameters, buffers and learning rate changes."""

    def end(self) -> None:
        """After them: the optimiser's state is all up to date, and every step was finite."""

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
        """What changes in the course of training is set for the step after so many."""
        self.objective.at_step(count, count + 1 if self.steps is None else self.steps)

    def _eager(self, index: Tensor) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._backward(index)
        # NaN and infinity survive a sum, so one number tells, and one read brings everything here.
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
        """The objective's terms on a batch; the gradient of its loss goes into the parameters."""
        terms = self.objective(*self.data.batch(index))
        if self.count == 1:
            _check_terms(self.objective, terms)
        terms["loss"].backward()
        return terms


# What is flushed every so many steps; see flush_moments.
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
