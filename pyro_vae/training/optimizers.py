"""Construction of optimisers and learning-rate schedulers from the arguments of ``fit``."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_vae._checks import number
from pyro_vae.engine.cache import ensure_cache
from pyro_vae.training.objective import Objective
from pyro_vae.training.records import TrainingRecord

__all__ = ["Scheduler", "describe", "learning_rate", "make_optimizer"]

_LR = 1e-3  # where none is given


def learning_rate(lr: float | None, optimizer: Callable[..., Any] | None) -> float:
    """That which is given; or else that of ``functools.partial(optimizer, lr=...)``, or else 1e-3.

    Raises:
        ValueError: both are given, or it is no number > 0; or the optimiser is one of its own, or one of Pyro's.
    """
    is_class = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
    is_of_pyro = not is_class and str(getattr(optimizer, "__module__", "")).startswith("pyro.optim")
    if isinstance(optimizer, torch.optim.Optimizer) or is_of_pyro:
        kind = getattr(optimizer, "__name__", type(optimizer).__name__)
        found = f"{kind} of pyro.optim, an optimiser for Pyro's SVI" if is_of_pyro else f"one that is made, of {kind}"
        raise ValueError(
            f"optimizer: expected what makes an optimiser of torch.optim, found {found}. Pass the class, torch.optim.SGD, "
            "or functools.partial(torch.optim.SGD, momentum=0.9)."
        )
    if optimizer is not None and not callable(optimizer):
        found = repr(optimizer) if len(repr(optimizer)) < 40 else f"an object of {type(optimizer).__name__}"
        raise ValueError(f"optimizer: expected a function, found {found}.")
    own = optimizer.keywords.get("lr") if isinstance(optimizer, functools.partial) else None
    if lr is not None and own is not None:
        raise ValueError(f"lr: found {lr!r}, and {own!r} in optimizer. Give one of the two.")
    return number("lr", _LR if lr is None and own is None else own if lr is None else lr)


def make_optimizer(
    objective: Objective,
    lr: float,
    optimizer: Callable[..., torch.optim.Optimizer] | None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None,
) -> tuple[torch.optim.Optimizer, Any]:
    parameters = [p for p in objective.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("fit: the objective has no parameter that requires a gradient; nothing to train.")
    if any(p.is_inference() for p in parameters):
        raise ValueError("fit: parameters made in torch.inference_mode() cannot be trained. Build the model outside of it.")
    ensure_cache()
    made = torch.optim.Adam(parameters, lr=lr, fused=True) if optimizer is None else optimizer(parameters, lr=lr)
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(f"optimizer: expected a function that returns an optimizer, found {type(made).__name__}.")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer: expected one whose step needs no closure, found {type(made).__name__}, which evaluates the loss "
            "several times a step. Use Adam or SGD, say."
        )
    scheduler = None if schedule is None else schedule(made)
    if not (scheduler is None or (hasattr(scheduler, "step") and hasattr(scheduler, "state_dict"))):
        found = type(scheduler).__name__
        raise ValueError(f"schedule: expected a function that returns a torch.optim.lr_scheduler, found {found}.")
    return made, scheduler


def describe(thing: Any, settings: dict[str, Any]) -> str:
    """The class and those settings that are numbers, flags or strings, to compare with the ones in a checkpoint."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(is_plain, value))
        return isinstance(value, bool | int | float | str)

    how = ("fused", "foreach")  # implementations of the same arithmetic
    kept = {name: v for name, v in settings.items() if name not in how and not name.startswith("_") and is_plain(v)}
    return f"{type(thing).__name__}({', '.join(f'{name}={value}' for name, value in sorted(kept.items()))})"


@dataclass(frozen=True)
class Scheduler:
    """Steps a learning-rate scheduler after each optimiser step, epoch or record."""

    scheduler: Any
    unit: str

    def after(self, step: int, per_epoch: int) -> None:
        due = self.unit == "step" or step % per_epoch == 0
        if due and self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()

    def after_record(self, record: TrainingRecord) -> None:
        """Step ``ReduceLROnPlateau`` with the score of a record."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(record.score)
