"""The state of a training run: progress, checkpoints of it, and their restoration."""

import copy
import math
import platform
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae import _processes as processes
from pyro_vae._files import CheckpointError
from pyro_vae.data.dataset import Data
from pyro_vae.models.description import differences
from pyro_vae.training.checkpoint import Checkpoints
from pyro_vae.training.objective import Objective
from pyro_vae.training.records import TrainingRecord

if TYPE_CHECKING:
    from pyro_vae.training.step import EagerStep

__all__ = [
    "Keeper",
    "Progress",
    "ReproducibilityWarning",
    "TrainingStoppedError",
    "identity",
    "processor",
    "progress_of",
    "restore",
    "set_noise",
]


class TrainingStoppedError(Exception):
    """``stop`` returned True after step ``step``; a checkpoint was written and training ended."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step:,}")
        self.step = step


class ReproducibilityWarning(UserWarning):
    """A run is resumed under other conditions, so that its results will differ by rounding from an uninterrupted run's."""


@dataclass
class Progress:
    """The progress of a run."""

    step: int = 0
    totals: dict[str, float] = field(default_factory=dict)  # since the last record: terms summed over observations
    seen: int = 0  # observations
    seconds: float = 0.0  # of training
    compile_seconds: float = 0.0
    history: list[TrainingRecord] = field(default_factory=list)
    best: float = math.inf  # score of a record
    since_best: int = 0  # records

    def add(self, terms: dict[str, float], size: int) -> None:
        """Count a step on ``size`` observations."""
        for name, value in terms.items():
            self.totals[name] = self.totals.get(name, 0.0) + value * size
        self.seen += size
        self.step += 1

    def record(self, epoch: int) -> TrainingRecord:
        """The record of the steps since the last one; resets the totals."""
        train = {name: total / self.seen for name, total in self.totals.items()}
        timing = {"seconds": self.seconds, "observations_per_second": self.seen / self.seconds}
        timing["compile_seconds"] = self.compile_seconds
        self.totals, self.seen, self.seconds, self.compile_seconds = {}, 0, 0.0, 0.0
        return TrainingRecord(epoch, self.step, train, timing=timing)

    def note(self, record: TrainingRecord) -> None:
        """Add a record to the history."""
        self.history.append(record)
        self.since_best += 1
        if record.score < self.best:
            self.best, self.since_best = record.score, 0

    def has_stalled(self, patience: int | None) -> bool:
        """Whether there have been ``patience`` records since the best one."""
        return patience is not None and self.since_best >= patience


class Keeper:
    """Writes checkpoints when they are due, and stops training on request; called after each step."""

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        every: int | None,
        stop: Callable[[], bool] | None,
        settings: dict[str, Any],
        step: "EagerStep",
        scheduler: Any,
        progress: Progress,
    ) -> None:
        self._checkpoints, self._every, self._stop = checkpoints, every, stop
        self._settings, self._step, self._scheduler, self._progress = settings, step, scheduler, progress
        self._best: dict[str, Any] | None = None  # not written yet
        self._written, self._took = time.monotonic(), 0.0

    def look(self, *, last: bool = False) -> None:
        """Write a checkpoint if one is due or this is the last step; end training if ``stop`` returns True."""
        if self._checkpoints is None and self._stop is None:
            return
        flags = (self._stop is not None and self._stop(), self._checkpoints is not None and self._is_due())
        stopping, due = processes.any_rank(flags, self._step.data.x.device)
        if self._checkpoints is not None and (stopping or due or last):
            self._step.end()
            self._write(self._checkpoints)
        if stopping and not last:
            raise TrainingStoppedError(self._progress.step)

    def recorded(self) -> None:
        """Snapshot the state after a record, if it is the best so far."""
        if self._checkpoints is not None and self._progress.since_best == 0:
            self._best = copy.deepcopy(self._content())

    def _is_due(self) -> bool:
        if self._every is not None:
            return self._progress.step % self._every == 0
        return time.monotonic() - self._written >= max(10.0, 50 * self._took)

    def _content(self) -> dict[str, Any]:
        return {
            "settings": self._settings,
            "conditions": _conditions(self._step.data.x.device),
            "tensors": _tensors(self._step.objective),
            "optimizer": self._step.optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "noise": processes.gather_objects(_noise(self._step.data.x.device)),
            "not_compiled": self._step.not_compiled,
            "progress": asdict(self._progress),
        }

    def _write(self, checkpoints: Checkpoints) -> None:
        start = time.monotonic()
        content = self._content()

        def save() -> None:
            checkpoints.save(self._progress.step, content)
            if self._best is not None:
                checkpoints.save_best(self._best)

        processes.on_rank_zero(save)  # the other ranks wait, and raise the same error
        self._best = None
        self._written = time.monotonic()
        self._took = self._written - start


def _tensors(objective: Objective) -> dict[str, Tensor]:
    """Parameters and buffers, including the non-persistent ones."""
    return {name: tensor.detach() for name, tensor in (*objective.named_parameters(), *objective.named_buffers())}


def identity(data: Data) -> str:
    """A description of a data set by shape, binarisation and checksums, to compare with that in a checkpoint."""
    x, *others = data.held
    text = f"{len(data):,} of shape {tuple(data.event_shape)}, binarization {data.binarization}, CRC-32 {_digest(x)}"
    if x.dtype == torch.uint8 and not data.scaled:
        text += ", not scaled"
    for name, tensor in zip(data.inputs[1:], others, strict=True):
        text += f"; {name} of shape {tuple(tensor.shape[1:])}, CRC-32 {_digest(tensor)}"
    return text


def _digest(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data):08x}"


def processor() -> str:
    """The processor's name: results differ by rounding between processors, and timings differ substantially."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _conditions(device: torch.device) -> dict[str, Any]:
    """What may differ from one part of a run to the next, at the price of the last digits."""
    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "processes": processes.world_size(),
        "torch": str(torch.__version__),
        "machine": platform.machine(),
    }


def restore(
    resume: dict[str, Any],
    settings: dict[str, Any],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
) -> Progress:
    """Parameters, buffers, optimiser and schedule from a checkpoint of the same settings; how far it had come."""
    with _parts_of_a_checkpoint():
        progress = progress_of(resume)
        saved, conditions, tensors = resume["settings"], resume["conditions"], resume["tensors"]
        resume["noise"][0]["cpu"], resume["not_compiled"], resume["optimizer"], resume["scheduler"]
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        asked = {name: value for name, value in settings.items() if name != "parts"}
        changed = [f"{name}: {saved.get(name)} -> {value}" for name, value in asked.items() if saved.get(name) != value]
        changed += differences(saved.get("parts", {}), settings["parts"])  # earlier versions kept none
        conditions = dict(conditions)
    expected = _tensors(objective)
    for name in {**found, **expected}:
        now = tuple(expected[name].shape) if name in expected else None
        if found.get(name) != now:
            changed.append(f"shape of {name}: {found.get(name)} -> {now}")
    if changed:
        raise CheckpointError(
            f"resume: the checkpoint is of a run with other settings (saved -> requested): {'; '.join(changed)}. Use the "
            "same settings, or start a new run in another folder."
        )
    here = _conditions(next(iter(expected.values())).device)
    known = [name for name in here if name in conditions]  # fewer of them in a checkpoint of an earlier version
    if others := [f"{name}: {conditions[name]} -> {here[name]}" for name in known if conditions[name] != here[name]]:
        warnings.warn(
            f"resume: the conditions have changed ({'; '.join(others)}), so that results will differ by rounding from those "
            "of an uninterrupted run.",
            ReproducibilityWarning,
            stacklevel=3,
        )
    with _parts_of_a_checkpoint():
        optimizer.load_state_dict(resume["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(resume["scheduler"])
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
    return progress


def progress_of(checkpoint: dict[str, Any]) -> Progress:
    """How far the run had come.

    Raises:
        CheckpointError: the checkpoint does not say.
    """
    with _parts_of_a_checkpoint():
        progress = Progress(**checkpoint["progress"])
        progress.history = [TrainingRecord(**record) for record in checkpoint["progress"]["history"]]
        if type(progress.step) is not int:
            raise ValueError(f"step {progress.step!r}")
    return progress


@contextmanager
def _parts_of_a_checkpoint() -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"resume: not a checkpoint of fit ({reason}). Remove it to resume from the previous one."
        ) from error


def _noise(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_noise(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
