"""Schedules: :class:`LinearWarmup` and :class:`CyclicWarmup` of the KL's weight, functions of the number of steps;
:func:`staged_decay` of the learning rate, a function of the number of epochs.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pyro_vae._checks import number, whole_number

__all__ = ["CyclicWarmup", "LinearWarmup", "Schedule", "staged_decay"]

Schedule = Callable[[int], float]
"""A function from the number of steps made to the weight of the KL in the next step."""


@dataclass(frozen=True)
class LinearWarmup:
    r"""Linear warm-up of the KL's weight, which is constant afterwards (Sønderby et al. 2016, arXiv:1602.02282).

    .. math:: \beta(t) = \beta_0 + (\beta_1 - \beta_0) \min(t / T, 1)

    Args:
        steps: T, steps of the warm-up.
        start: :math:`\beta_0`; may be 0.
        final: :math:`\beta_1`.

    Example:
        >>> schedule = LinearWarmup(100)
        >>> schedule(0), schedule(50), schedule(1000)
        (0.0, 0.5, 1.0)
    """

    steps: int
    start: float = 0.0
    final: float = 1.0

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: int) -> float:
        return self.start + (self.final - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class CyclicWarmup:
    r"""Cyclical annealing of the KL's weight (Fu et al. 2019, arXiv:1903.10145): a linear rise in each cycle, then constant.

    .. math:: \beta(t) = \beta_0 + (\beta_1 - \beta_0) \min\Big(\frac{t \bmod T}{r T}, 1\Big)

    Args:
        steps: T, steps of a cycle.
        rise: r, the fraction of a cycle in which the weight rises, above 0 and up to 1.
        start: :math:`\beta_0`; may be 0.
        final: :math:`\beta_1`.
        cycles: number of cycles, after which the weight stays at :math:`\beta_1`.

    Example:
        >>> schedule = CyclicWarmup(100, cycles=2)
        >>> [schedule(step) for step in (0, 25, 50, 100, 125, 200)]
        [0.0, 0.5, 1.0, 0.0, 0.5, 1.0]
    """

    steps: int
    rise: float = 0.5
    start: float = 0.0
    final: float = 1.0
    cycles: int = 4

    def __post_init__(self) -> None:
        _check(self)
        whole_number("cycles", self.cycles)
        if number("rise", self.rise) > 1:
            raise ValueError(f"rise: expected a number from 0 to 1, found {self.rise!r}.")

    def __call__(self, step: int) -> float:
        if step >= self.cycles * self.steps:
            return self.final
        return self.start + (self.final - self.start) * min(step % self.steps / (self.rise * self.steps), 1.0)


STAGES = 8
"""Number of stages of :func:`staged_decay`."""


def staged_decay(epochs: int) -> float:
    """The learning rate after a number of epochs, relative to the initial one (Burda et al. 2016, arXiv:1509.00519).

    Stage i of 8 lasts 3^(i-1) epochs, 3,280 in all, with the factor 10^(-(i-1)/7). The last stage is not limited.

    For :class:`torch.optim.lr_scheduler.LambdaLR`, stepped once per epoch.

    Example:
        >>> [round(staged_decay(epoch), 2) for epoch in (0, 1, 3, 4, 12, 13)]
        [1.0, 0.72, 0.72, 0.52, 0.52, 0.37]
    """
    done, stage = 0, 0
    while stage < STAGES - 1 and epochs >= done + 3**stage:
        done, stage = done + 3**stage, stage + 1
    return float(10 ** (-stage / 7))


def _check(schedule: LinearWarmup | CyclicWarmup) -> None:
    whole_number("steps", schedule.steps)
    number("final", schedule.final)
    if schedule.start:
        number("start", schedule.start)
