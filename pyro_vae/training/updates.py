"""The optimiser's part of a compiled step: Adam's update as tensor operations in the graph; any other after its gradient."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["AdamInGraph", "AfterGraph", "flush_moments", "options_of", "set_options", "update_of"]


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What a schedule may change from step to step: the learning rate, and momentum or betas in some."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def set_options(optimizer: torch.optim.Optimizer, options: Sequence[dict[str, Any]]) -> None:
    """Put back what :func:`options_of` has given."""
    for group, values in zip(optimizer.param_groups, options, strict=True):
        group.update(values)


def update_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> "AdamInGraph | AfterGraph":
    """How an optimiser takes part in a compiled step."""
    plain = {"amsgrad": False, "maximize": False, "weight_decay": 0, "differentiable": False}
    if type(optimizer) is torch.optim.Adam and all(
        g[name] == v for g in optimizer.param_groups for name, v in plain.items()
    ):
        return AdamInGraph(optimizer, parameters)
    return AfterGraph(optimizer, parameters)


class AdamInGraph:
    """Adam without weight decay (Kingma and Ba 2015, arXiv:1412.6980), on the optimiser's own moments.

    The counts of steps are kept here, parameter by parameter, and written to the optimiser by :meth:`settle`.

    Attributes:
        share: of a change of the gradient that :meth:`moved` shows.
    """

    def __init__(self, optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self._groups = [group for group in optimizer.param_groups for _ in group["params"]]
        self._counts = [int(state["step"]) if (state := optimizer.state.get(p)) else 0 for p in parameters]
        # These stand for Adam's moments until it makes them.
        self._zeros = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in parameters}
        self.share = 1 - min(group["betas"][0] for group in optimizer.param_groups)

    def tensors(self) -> list[Tensor]:
        """First moments, then second ones."""
        moments = [
            (state["exp_avg"], state["exp_avg_sq"]) if (state := self.optimizer.state.get(p)) else self._zeros[p]
            for p in self.parameters
        ]
        firsts, seconds = zip(*moments, strict=True)
        return [*firsts, *seconds]

    def numbers(self) -> Tensor:
        """What changes from step to step, by parameter: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), and of the betas
        1 - beta1, beta2, 1 - beta2: a schedule such as OneCycleLR moves them along with the learning rate.
        """
        rows: dict[Any, tuple[float, ...]] = {}
        for group, n in zip(self._groups, self._counts, strict=True):
            if (id(group), n) not in rows:
                beta1, beta2 = group["betas"]
                rate, root = group["lr"] / (1 - beta1 ** (n + 1)), 1 / math.sqrt(1 - beta2 ** (n + 1))
                rows[id(group), n] = (rate, root, 1 - beta1, beta2, 1 - beta2)
        values = [rows[id(group), n] for group, n in zip(self._groups, self._counts, strict=True)]
        return torch.tensor(values, dtype=self.parameters[0].dtype)

    def trace(self, places: Sequence[int], gradients: Sequence[Tensor], numbers: Tensor) -> tuple[None]:
        """The update of the parameters at these places, in place."""
        moments, number = self.tensors(), len(self.parameters)
        for place, g in zip(places, gradients, strict=True):
            first, second = moments[place], moments[number + place]
            eps = self._groups[place]["eps"]
            rate, root, of_first, kept, of_second = numbers[place]
            first_new = first + of_first * (g - first)
            second_new = kept * second + of_second * g * g
            parameter = self.parameters[place]
            change = rate * first_new / (second_new.sqrt() * root + eps)
            for old, new in ((parameter, parameter - change), (first, first_new), (second, second_new)):
                old.copy_(new)
        return (None,)

    def after(self, places: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """After a compiled step."""
        self.made(places)

    def made(self, places: Sequence[int]) -> None:
        """A step was made of the parameters at these places."""
        for place in places:
            self._counts[place] += 1

    def moved(self) -> list[Tensor]:
        """Copies of what shows the last gradient, parameter by parameter."""
        return [first.clone() for first in self.tensors()[: len(self.parameters)]]

    def finite(self) -> bool:
        """Whether every gradient so far was: first moments keep NaN and infinity."""
        return bool(torch.stack([first.sum() for first in self.tensors()[: len(self.parameters)]]).sum().isfinite())

    def settle(self) -> None:
        """Write the counts to the optimiser."""
        for p, count in zip(self.parameters, self._counts, strict=True):
            if state := self.optimizer.state.get(p):
                state["step"].fill_(count)

    def copy(self) -> list[int]:
        return list(self._counts)

    def restore(self, copied: list[int]) -> None:
        self._counts = list(copied)


class AfterGraph:
    """Any optimiser, which steps on the gradients that the graph returns. Methods as of :class:`AdamInGraph`."""

    share = 1.0

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        self.optimizer, self.parameters = optimizer, parameters

    def tensors(self) -> list[Tensor]:
        return []

    def numbers(self) -> Tensor:
        return torch.zeros(0)

    def trace(self, places: Sequence[int], gradients: Sequence[Tensor], numbers: Tensor) -> tuple[Tensor, ...]:
        """The sum of all gradients, which NaN and infinity survive, and the gradients."""
        return torch.stack([g.sum() for g in gradients]).sum(), *gradients

    def after(self, places: Sequence[int], gradients: Sequence[Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for place, g in zip(places, gradients, strict=True):
            self.parameters[place].grad = g
        self.optimizer.step()

    def made(self, places: Sequence[int]) -> None:
        pass

    def moved(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]

    def finite(self) -> bool:
        return True  # each step has looked

    def settle(self) -> None:
        pass

    def copy(self) -> Any:
        return copy.deepcopy(self.optimizer.state_dict())

    def restore(self, copied: Any) -> None:
        options = options_of(self.optimizer)
        self.optimizer.load_state_dict(copied)
        set_options(self.optimizer, options)


def flush_moments(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Set Adam's smallest moments to zero, as must be done every so many steps.

    Moments of a parameter without gradient decay until they are denormal, and Adam then takes ten times as long: on MNIST,
    whose outer pixels are almost never set, twice as long from the second epoch on. What is left decays by no more than
    0.9^steps until the next time, and what is set to zero would not change any parameter by more than 1e-22.
    """
    if isinstance(optimizer, torch.optim.Adam):
        for state in optimizer.state.values():
            for moment in (state["exp_avg"], state["exp_avg_sq"]):
                moment.masked_fill_(moment.abs() < min(torch.finfo(moment.dtype).tiny / 0.9**steps, 1e-28), 0)
