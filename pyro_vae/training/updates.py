"""The optimiser in a compiled step: Adam's update as part of the graph; any other optimiser steps after the graph."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor

__all__ = ["AdamInGraph", "AfterGraph", "Slot", "adam_takes", "flush_moments", "options_of", "set_options"]


@dataclass
class Slot:
    """A parameter, with its optimiser and parameter group.

    Args:
        parameter: the parameter.
        optimizer: the optimiser.
        group: the one of its ``param_groups`` with the parameter.
    """

    parameter: Tensor
    optimizer: torch.optim.Optimizer
    group: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """The optimiser's state for the parameter; empty before its first gradient."""
        return self.optimizer.state.get(self.parameter, {})


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options that a scheduler may change between steps: the learning rate, in some also momentum or betas."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def set_options(optimizer: torch.optim.Optimizer, options: Sequence[Mapping[str, Any]]) -> None:
    """Restore options returned by :func:`options_of`."""
    for group, values in zip(optimizer.param_groups, options, strict=True):
        group.update(values)


def adam_takes(slots: Sequence[Slot]) -> bool:
    """Whether :class:`AdamInGraph` implements the optimisers of these parameters."""
    plain = {"amsgrad": False, "maximize": False, "differentiable": False}
    kinds = torch.optim.Adam, torch.optim.AdamW, ClippedAdam
    return all(
        type(slot.optimizer) in kinds
        and not torch.is_tensor(slot.group["lr"])
        and all(slot.group.get(name, value) == value for name, value in plain.items())
        for slot in slots
    )


class AdamInGraph:
    r"""Adam, AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and Pyro's ClippedAdam on the optimisers' own moments.

    .. math:: m \leftarrow m + (1 - \beta_1)(g - m), \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta - \frac{\eta}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    (Kingma and Ba 2015, arXiv:1412.6980). The learning rate, the betas and the count t are tensors, which are set from the
    optimiser's options before compiled steps, so that schedules work; ClippedAdam's decay of the learning rate is part of
    the graph.

    Args:
        slots: parameters with a gradient.

    Attributes:
        gradient_factor: the factor of the gradient in :meth:`gradient_copies`.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            _make_state(slot)
        self.slots = slots
        self.gradient_factor = 1 - min((slot.group["betas"][0] for slot in slots), default=0.0)
        groups = {id(slot.group): slot.group for slot in slots}
        self._groups = [*groups.values()]
        self._places = torch.tensor([[*groups].index(id(slot.group)) for slot in slots])
        self._options = torch.zeros(len(groups), 3, dtype=torch.float64)  # lr, beta1, beta2
        # ClippedAdam counts in Python.
        self._counts = [
            slot.state["step"] if torch.is_tensor(slot.state["step"]) else torch.zeros((), dtype=torch.float64)
            for slot in slots
        ]
        self._states = [slot.state for slot in slots]
        self._counting = [(s, count) for s, count in zip(self._states, self._counts, strict=True) if s["step"] is not count]
        self._python: list[Any] = []
        self.before()

    def tensors(self) -> list[Tensor]:
        """First moments, second moments, counts and options."""
        firsts, seconds = ([state[name] for state in self._states] for name in ("exp_avg", "exp_avg_sq"))
        return [*firsts, *seconds, *self._counts, self._options]

    def before(self) -> None:
        """Copy the options and counts from the optimisers to the tensors, if they have changed."""
        if (python := self._held_by_python()) != self._python:
            self._options.copy_(torch.tensor([[lr, *betas] for lr, betas in python[0]], dtype=torch.float64).reshape(-1, 3))
            for count, number in zip(self._counting, python[1], strict=True):
                count[1].fill_(number)
            self._python = python

    def _held_by_python(self) -> list[Any]:
        return [[(g["lr"], g["betas"]) for g in self._groups], [state["step"] for state, _ in self._counting]]

    def trace(self, gradients: Sequence[Tensor]) -> None:
        """The update, in place."""
        if not self.slots:
            return
        for group, row in zip(self._groups, self._options, strict=True):
            if "lrd" in group:
                row[0].mul_(group["lrd"])
        for count in self._counts:
            count.add_(1)
        t = torch.stack([count.double() for count in self._counts])
        lr, beta1, beta2 = self._options[self._places].unbind(1)
        numbers = torch.stack([lr / (1 - beta1**t), 1 / (1 - beta2**t).sqrt(), 1 - beta1, beta2, 1 - beta2, lr], 1)
        rows = {dtype: numbers.to(dtype).unbind() for dtype in {slot.parameter.dtype for slot in self.slots}}
        for place, (slot, g) in enumerate(zip(self.slots, gradients, strict=True)):
            group, state, p = slot.group, self._states[place], slot.parameter.detach()
            rate, root, of_first, kept, of_second, lr = rows[p.dtype][place]
            old = p
            if "clip_norm" in group:
                g = g.clamp(-group["clip_norm"], group["clip_norm"])
            if decay := group.get("weight_decay", 0):
                if group.get("decoupled_weight_decay", False):
                    old = p * (1 - lr * decay)
                else:
                    g = g + decay * p
            first, second = state["exp_avg"], state["exp_avg_sq"]
            first_new = first + of_first * (g - first)
            spread = g - first_new if group.get("centered_variance") else g
            second_new = kept * second + of_second * spread * spread
            if "clip_norm" in group:  # ClippedAdam adds eps before it corrects the second moment for its start at 0
                change = rate / root * first_new / (second_new.sqrt() + group["eps"])
            else:
                change = rate * first_new / (second_new.sqrt() * root + group["eps"])
            for tensor, new in ((p, old - change), (first, first_new), (second, second_new)):
                tensor.copy_(new)

    def after(self, times: int, gradients: Sequence[Tensor]) -> None:
        """Copy the counts and learning rates after ``times`` compiled steps to the optimisers."""
        if not self._counting:
            return
        for group in self._groups:
            if "lrd" in group:
                for _ in range(times):
                    group["lr"] *= group["lrd"]
        for state, _ in self._counting:
            state["step"] += times
        self._python = self._held_by_python()

    def gradient_copies(self) -> list[Tensor]:
        """Copies of the first moments, which depend on the last gradient, one per parameter."""
        return [state["exp_avg"].clone() for state in self._states]

    def finite(self) -> bool:
        """Whether all gradients so far were finite: NaN and infinity persist in the first moments."""
        return bool(torch.stack([state["exp_avg"].sum() for state in self._states]).sum().isfinite())


def _make_state(slot: Slot) -> None:
    """Initialise the state of a parameter, as the optimiser does at its first gradient."""
    if not slot.state:
        step = 0 if isinstance(slot.optimizer, ClippedAdam) else torch.zeros((), dtype=torch.float32)
        zeros = (torch.zeros_like(slot.parameter, memory_format=torch.preserve_format) for _ in range(2))
        slot.optimizer.state[slot.parameter] = dict(zip(("step", "exp_avg", "exp_avg_sq"), (step, *zeros), strict=True))


class AfterGraph:
    """Any optimisers, which step on the gradients returned by the graph. Same methods as :class:`AdamInGraph`.

    Args:
        slots: parameters with a gradient.
        step: a function that steps the optimisers.
    """

    gradient_factor = 1.0

    def __init__(self, slots: Sequence[Slot], step: Callable[[], Any]) -> None:
        self.slots, self._step = slots, step

    def tensors(self) -> list[Tensor]:
        return []

    def before(self) -> None:
        pass

    def trace(self, gradients: Sequence[Tensor]) -> None:
        pass

    def after(self, times: int, gradients: Sequence[Tensor]) -> None:
        for slot, g in zip(self.slots, gradients, strict=True):
            slot.parameter.grad = g
        self._step()

    def gradient_copies(self) -> list[Tensor]:
        return [torch.zeros_like(s.parameter) if s.parameter.grad is None else s.parameter.grad.clone() for s in self.slots]

    def finite(self) -> bool:
        return True  # checked at each step


def flush_moments(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Set Adam's smallest moments to zero, before they become denormal; to be called after every ``steps`` steps.

    Moments of a parameter without gradient decay until they are denormal, on which operations take ten times as long: on
    MNIST, whose outer pixels are almost always 0, Adam takes twice as long from the second epoch. Until the next call the
    remaining moments decay by a factor of at least 0.9^steps; those set to zero would not change any parameter by more than
    1e-22.
    """
    if isinstance(optimizer, torch.optim.Adam):
        for state in optimizer.state.values():
            for moment in (state["exp_avg"], state["exp_avg_sq"]):
                moment.masked_fill_(moment.abs() < min(torch.finfo(moment.dtype).tiny / 0.9**steps, 1e-28), 0)
