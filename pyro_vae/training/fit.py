"""The training loop."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae import _processes as processes
from pyro_vae._checks import compile_choice, number, one_of, usable_device, whole_number
from pyro_vae._files import CheckpointError, check_writable
from pyro_vae.data.dataset import Data
from pyro_vae.data.own import DataLike, as_data
from pyro_vae.models.description import description
from pyro_vae.training.batches import batches_of, streams
from pyro_vae.training.checkpoint import Checkpoints
from pyro_vae.training.compiled_step import CompiledStep
from pyro_vae.training.distributed import DistributedStep
from pyro_vae.training.objective import Objective
from pyro_vae.training.optimizers import Scheduler, describe, learning_rate, make_optimizer
from pyro_vae.training.records import TrainingRecord, format_record
from pyro_vae.training.state import Keeper, Progress, identity, restore
from pyro_vae.training.step import EagerStep, NonFiniteStepError

__all__ = ["PRECISIONS", "NonFiniteError", "fit"]

PRECISIONS = ("highest", "high", "medium")
SCHEDULE_UNITS = ("epoch", "step")


class NonFiniteError(FloatingPointError):
    """Loss or gradient became NaN or infinite; the parameters are those after the last finite step."""


def fit(
    objective: Objective,
    data: DataLike,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    record_every: int | None = None,
    batch_size: int = 128,
    lr: float | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    schedule_by: str = "epoch",
    patience: int | None = None,
    seed: int = 0,
    compile: bool | None = None,
    precision: str = "highest",
    clip_grad_norm: float | None = None,
    test: DataLike | None = None,
    device: torch.device | str | None = None,
    on_record: Callable[[TrainingRecord], None] | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    resume: dict[str, Any] | None = None,
    stop: Callable[[], bool] | None = None,
    verbose: bool = True,
) -> list[TrainingRecord]:
    """Minimise ``objective(*batch)["loss"]`` over the parameters of the objective, by Adam or another optimiser.

    Shuffling and noise are functions of (seed, epoch), and do not depend on when records are made; torch's global random
    state is restored. Parameters that do not require a gradient are not changed.

    With ``checkpoints``, the same call resumes a run that was stopped or killed from its last checkpoint, and ends with the
    same parameters, bit for bit, as an uninterrupted run::

        checkpoints = Checkpoints("runs/mine")
        fit(objective, data, epochs=40, checkpoints=checkpoints, resume=checkpoints.load())

    In a process group (``torchrun``), every rank must make the same call. Each trains on its shard of every batch, and all
    have the same parameters; see :class:`~pyro_vae.training.distributed.DistributedStep`.

    Args:
        objective: to minimise; moved to ``device`` and trained in place.
        data: training data; batches are converted to the dtype of the objective's parameters. The data are shuffled in each
            epoch.
        epochs: passes over the data.
        steps: steps of the optimiser, in place of epochs: the last pass may be cut short.
        record_every: steps from record to record; default: a record at the end of each epoch. The last record, at the end,
            may hold fewer.
        batch_size: observations per step; the last batch of an epoch holds what is left.
        lr: learning rate. None: that of ``functools.partial(optimizer, lr=...)``, or else 1e-3.
        optimizer: called as ``optimizer(parameters, lr=lr)``: a class of :mod:`torch.optim`, or one with arguments,
            ``functools.partial(torch.optim.SGD, momentum=0.9)``. None: Adam, which is the fastest when compiled.
        schedule: called with the optimiser: a class of :mod:`torch.optim.lr_scheduler` with its arguments,
            ``functools.partial(CosineAnnealingLR, T_max=40)``. None: a constant learning rate.
        schedule_by: ``"epoch"``: the scheduler steps at the end of each epoch (``ReduceLROnPlateau`` at each record, on the
            test loss, or on the training loss without ``test``); ``"step"``: after each optimiser step.
        patience: early stopping: stop after this many records without an improvement of the test loss (``neg_elbo`` if it
            exists). The parameters are those of the last step. None: no early stopping.
        compile: trace each step once per batch size, Pyro's handlers included, and run it as one compiled graph: the same
            values, gradients and noise, two to four times as fast, after some seconds of compilation. None: on the CPU, for
            batch sizes with at least 4,000 steps to make. Falls back to eager execution, with a
            :class:`~pyro_vae.engine.tracing.NotCompiledWarning`, if the objective cannot be compiled. Needs a C++ compiler.
        precision: of float32 matrix products during training: ``"highest"``, ``"high"`` or ``"medium"``, see
            :func:`torch.set_float32_matmul_precision`; the lower ones are faster on hardware that supports them.
        seed: of shuffling and noise, a whole number >= 0; not of the initial parameters, which are drawn when the model is
            constructed.
        clip_grad_norm: maximum norm of the gradient of all parameters, to which a longer one is scaled down. None: no limit.
        test: held-out data, on all of which the objective is evaluated for each record, always with the same noise.
        device: to train on; default: that of the objective's parameters.
        on_record: called with each record as soon as it is made.
        checkpoints: for the state of the run: the last two checkpoints, and ``best.pt``, the state at the record with the
            lowest test loss (``neg_elbo`` if it exists; the training loss without ``test``).
        checkpoint_every: steps between checkpoints; None: about every 10 seconds, and for no more than 2 % of the time. The
            last step always writes one.
        resume: a checkpoint of the same settings to resume from; None: start a new run. Only epochs, steps, device, verbose
            and the callbacks may change. A checkpoint has the parameters and buffers, but no other state that ``on_record``
            may change.
        stop: called after each step; if it returns True, a checkpoint is written and training ends.
        verbose: print a line per record on stdout and, on a terminal, a progress bar on stderr.

    Returns:
        One :class:`~pyro_vae.training.records.TrainingRecord` per epoch, or per ``record_every`` steps, including those
        before ``resume``.

    Raises:
        ValueError: a setting is invalid, or the data are invalid for the objective.
        NonFiniteError: loss or gradient became NaN or infinite; raised before the optimiser step.
        CheckpointError: a checkpoint cannot be written; ``resume`` is a checkpoint of another run; or ``checkpoints`` has
            some, and ``resume`` is None.
        TrainingStoppedError: ``stop`` returned True.

    Warns:
        ReproducibilityWarning: ``resume`` is of another processor, number of threads or processes, or version of torch.
    """
    _check_parts(objective, checkpoints, stop=stop, on_record=on_record, schedule=schedule)
    lr, batch_size = learning_rate(lr, optimizer), whole_number("batch_size", batch_size)
    seed = whole_number("seed", seed, minimum=0)
    clip_grad_norm = None if clip_grad_norm is None else number("clip_grad_norm", clip_grad_norm)
    checkpoint_every = None if checkpoint_every is None else whole_number("checkpoint_every", checkpoint_every)
    patience = None if patience is None else _patience(patience, test)
    one_of("precision", precision, PRECISIONS)
    one_of("schedule_by", schedule_by, SCHEDULE_UNITS)
    data, held_out = _prepare(objective, data, test, device, batch_size)
    length = _length(len(data), batch_size, epochs, steps, record_every)
    compile = compile_choice(compile, data.x.device, processes.world_size())
    adam, scheduler = make_optimizer(objective, lr, optimizer, schedule)
    schedules = Scheduler(scheduler, schedule_by)
    settings = {
        "objective": objective.identity(),
        "parts": description(objective),
        "data": identity(data) if checkpoints or resume else "",
        "test": identity(held_out) if held_out is not None and (checkpoints or resume) else "",
        "batch_size": batch_size,
        "record_every": record_every,
        "lr": lr,
        "optimizer": describe(adam, adam.defaults),
        "schedule": "" if scheduler is None else f"{describe(scheduler, vars(scheduler))}, by {schedule_by}",
        "clip_grad_norm": clip_grad_norm,
        "seed": seed,
        "precision": precision,
        "compile": compile,
        "patience": patience,
    }
    progress = _progress(checkpoints, resume, settings, length, objective, adam, scheduler)
    verbose = verbose and processes.rank() == 0
    say = tqdm.write if verbose else None
    step = _make_step(objective, data, adam, compile, length, say, done=progress.step, clip_grad_norm=clip_grad_norm)
    step.not_compiled = "" if resume is None else resume["not_compiled"]
    keeper = Keeper(checkpoints, checkpoint_every, stop, settings, step, scheduler, progress)
    noise = None if resume is None else resume["noise"]
    batches = batches_of(len(data), batch_size, seed, data.x.device, progress.step, noise)

    with _training(objective, data.x.device, precision):
        while progress.step < length.last and not progress.has_stalled(patience):
            record = _train(step, batches, length, progress, keeper, schedules, verbose)
            with _apart(data.x.device):  # so that the noise of training does not depend on draws made here
                if held_out is not None:
                    torch.manual_seed(streams(seed, 0)[1])
                    record = replace(record, test=_mean_terms(objective, held_out, batch_size=1024))
                schedules.after_record(record)
                progress.note(record)
                if on_record is not None:  # before it is printed, so that a printed record has been saved
                    on_record(record)
            keeper.recorded()
            keeper.look(last=progress.step == length.last or progress.has_stalled(patience))
            if verbose:
                print(format_record(record, by_steps=length.by_steps), flush=True)
    return progress.history


def _check_parts(objective: Any, checkpoints: Any, **functions: Any) -> None:
    """Check the types of the arguments."""
    if not isinstance(objective, Objective):
        hint = "NegativeELBO(vae)" if hasattr(objective, "guide") else "a subclass of pyro_vae.Objective"
        raise ValueError(f"fit: expected an objective, found {type(objective).__name__}. Use {hint}.")
    if not isinstance(checkpoints, Checkpoints | None):
        raise ValueError(f"checkpoints: expected Checkpoints(folder), found {checkpoints!r}.")
    for name, function in functions.items():
        if function is not None and not callable(function):
            found = repr(function) if len(repr(function)) < 40 else f"an object of {type(function).__name__}"
            raise ValueError(f"{name}: expected a function, found {found}.")


def _patience(patience: int, test: DataLike | None) -> int:
    if whole_number("patience", patience) and test is None:
        raise ValueError("patience: expected test data, on whose loss early stopping depends, found none. Pass test=...")
    return int(patience)


@dataclass(frozen=True)
class _Length:
    """The length of a run."""

    per_epoch: int  # steps
    last: int  # step
    every: int  # steps from record to record
    batch_size: int
    observations: int
    by_steps: bool  # whether steps rather than epochs are shown


def _length(size: int, batch_size: int, epochs: int | None, steps: int | None, record_every: int | None) -> _Length:
    if (epochs is None) == (steps is None):
        raise ValueError(f"fit: expected either epochs or steps, found epochs={epochs}, steps={steps}.")
    per_epoch = math.ceil(size / batch_size)
    last = whole_number("steps", steps) if epochs is None else whole_number("epochs", epochs) * per_epoch
    every = per_epoch if record_every is None else whole_number("record_every", record_every)
    return _Length(per_epoch, last, every, batch_size, size, steps is not None or record_every is not None)


def _prepare(
    objective: Objective, data: DataLike, test: DataLike | None, device: torch.device | str | None, batch_size: int
) -> tuple[Data, Data | None]:
    """Convert and check the data; move the objective to their device, and initialise all of its parameters."""
    like, train = objective.example(), as_data(data)
    dtype = None if like is None else like.dtype
    place = (train.x if like is None else like).device if device is None else usable_device(device)
    train = train.to(place, dtype)
    held_out = None if test is None else as_data(test).to(place, dtype)
    if held_out is not None and held_out.event_shape != train.event_shape:
        raise ValueError(
            f"test: expected observations of shape {tuple(train.event_shape)} like those of the training data, found "
            f"{tuple(held_out.event_shape)}. Reshape one of the two."
        )
    if held_out is not None and held_out.inputs != train.inputs:
        raise ValueError(
            f"test: expected batches of {', '.join(train.inputs)} like those of the training data, found "
            f"{', '.join(held_out.inputs)}. Give both the same inputs."
        )
    objective.to(place)
    for part in (train, held_out):
        if part is not None:
            part.check(objective.check, objective.forward)
    with pyro.validation_enabled(False):
        objective.prepare(*train.batch(torch.arange(min(batch_size, len(train)), device=place)))
    return train, held_out


def _progress(
    checkpoints: Checkpoints | None, resume: dict[str, Any] | None, settings: dict[str, Any], length: _Length, *parts: Any
) -> Progress:
    """The progress at the start: none, or that of the checkpoint, whose state is restored."""
    if checkpoints is not None and resume is None and checkpoints.paths():
        raise CheckpointError(
            f"{checkpoints.folder}: has checkpoints of an earlier run, which a new one would overwrite. Name another "
            "folder, or resume that run with resume=checkpoints.load()."
        )
    if checkpoints is not None:
        folder = checkpoints.folder
        processes.on_rank_zero(lambda: check_writable(folder))
    progress = Progress() if resume is None else restore(resume, settings, *parts)
    if progress.step > length.last:
        raise CheckpointError(
            f"resume: {progress.step:,} steps were made, and only {length.last:,} are requested. Request more."
        )
    if len(found := set(processes.gather_objects(progress.step))) > 1:
        raise CheckpointError(f"resume: the ranks resume from different steps, {sorted(found)}. Give all the same folder.")
    return progress


def _make_step(
    objective: Objective,
    data: Data,
    optimizer: torch.optim.Optimizer,
    compile: bool | None,
    length: _Length,
    say: Callable[[str], None] | None,
    **options: Any,
) -> EagerStep:
    options["steps"] = length.last
    if processes.world_size() > 1:
        return DistributedStep(objective, data, optimizer, **options)
    sizes = None if compile else _worth_compiling(length.observations, length.batch_size, length.last)
    if compile or (compile is None and data.x.device.type == "cpu" and sizes):
        return CompiledStep(objective, data, optimizer, sizes=sizes, say=say, **options)
    return EagerStep(objective, data, optimizer, **options)


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Restores torch's random state at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _training(objective: Objective, device: torch.device, precision: str) -> Iterator[None]:
    """Training mode, precision and random state; all are restored at the end."""
    was_training, was_precision = objective.training, torch.get_float32_matmul_precision()
    try:
        # The data have been checked as a whole, so Pyro need not check them in every step.
        # Gradients are what it is about, even where the caller has no use for them.
        with torch.inference_mode(False), torch.enable_grad(), _apart(device), pyro.validation_enabled(False):
            torch.set_float32_matmul_precision(precision)
            yield
    finally:
        torch.set_float32_matmul_precision(was_precision)
        objective.train(was_training)


# The number of steps of one batch size from which compilation pays: it takes 8 to 15 seconds and saves some 5 ms a step.
_PAYS = 4000


def _worth_compiling(observations: int, batch_size: int, steps: int) -> set[int]:
    """Batch sizes with enough steps to compile for. A fixed rule rather than a measurement, for reproducibility."""
    per_epoch, rest = math.ceil(observations / batch_size), observations % batch_size
    short = steps // per_epoch if rest else 0  # one at the end of each epoch
    counts = {min(batch_size, observations): steps - short, rest: short}
    return {size for size, count in counts.items() if count >= _PAYS}


def _train(
    step: EagerStep,
    batches: Iterator[Tensor],
    length: _Length,
    progress: Progress,
    keeper: Keeper,
    schedule: Scheduler,
    verbose: bool,
) -> TrainingRecord:
    """The steps up to the next record."""
    step.objective.train()
    step.begin()
    first = progress.step
    steps = min(length.last, (first // length.every + 1) * length.every) - first
    start = time.perf_counter() - progress.seconds - progress.compile_seconds
    compiled = step.compile_seconds - progress.compile_seconds

    def look_at_the_clock() -> None:
        progress.compile_seconds = step.compile_seconds - compiled
        progress.seconds = time.perf_counter() - start - progress.compile_seconds

    with tqdm(total=steps, desc=f"step {first:,}", unit="step", leave=False, disable=None if verbose else True) as bar:
        try:
            for number, index in enumerate(itertools.islice(batches, steps), start=1):
                terms = step(index)
                progress.add(terms, len(index))
                schedule.after(progress.step, length.per_epoch)
                if number % 20 == 0 or number == steps:
                    epoch = math.ceil(progress.step / length.per_epoch)
                    bar.set_postfix(epoch=epoch, loss=f"{terms['loss']:.2f}", refresh=False)
                    bar.update(number - bar.n)
                if number < steps:
                    look_at_the_clock()
                    keeper.look()
            step.end()
        except NonFiniteStepError as error:
            failed = first + number - error.ago
            batch = step.data.batch(error.index)
            message = _describe(step.objective, batch, math.ceil(failed / length.per_epoch), failed, error.loss)
            raise NonFiniteError(message) from None
    look_at_the_clock()
    return progress.record(math.ceil(progress.step / length.per_epoch))


def _describe(objective: Objective, batch: tuple[Tensor, ...], epoch: int, step: int, loss: float) -> str:
    # Whether such a loss is NaN or infinite depends on the order of sums, so the message does not say which.
    what, value = ("the gradient", f"loss {loss:g}, ") if np.isfinite(loss) else ("the loss", "")
    first = step == 1
    advice = "No step was made yet: check the nets and the data." if first else "Lower the learning rate."
    return (
        f"{what} is not finite in epoch {epoch}, step {step}: {value}{objective.diagnose(*batch)}. The parameters are "
        f"those before this step. {advice}"
    )


def _mean_terms(objective: Objective, data: Data, *, batch_size: int) -> dict[str, float]:
    """The objective's terms averaged over all observations, in evaluation mode; batches are weighted by their size."""
    objective.eval()
    totals: dict[str, float] = {}
    with torch.no_grad():
        for index in processes.shard(torch.arange(len(data), device=data.x.device)).split(batch_size):
            if len(index):  # a shard may be empty
                for name, value in objective(*data.batch(index)).items():
                    totals[name] = totals.get(name, 0.0) + value.item() * len(index)
    shares = processes.gather_objects(totals)  # that of rank 0 is never empty
    return {name: sum(share.get(name, 0.0) for share in shares) / len(data) for name in shares[0]}
