"""The one training loop."""

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
    """Loss or gradient became NaN or infinite; the weights are those of the last good step."""


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

    Data order and noise are functions of (seed, epoch), and do not depend on when records are made; torch's global random
    state is left as found. Parameters that do not require a gradient stay fixed.

    With ``checkpoints``, the same call goes on where an earlier one was stopped or killed, from its last checkpoint, and
    ends with the same weights, bit for bit, as if it had never stopped::

        checkpoints = Checkpoints("runs/mine")
        fit(objective, data, epochs=40, checkpoints=checkpoints, resume=checkpoints.load())

    Under ``torchrun``, in a process group, each process trains on its share of every batch, and all have the same weights;
    see :class:`~pyro_vae.training.distributed.DistributedStep`. Then call it on every process alike.

    Args:
        objective: what is minimised; moved to ``device`` and trained in place.
        data: training data; batches are made in the type of the objective's parameters. Each epoch visits every
            observation once, in a new random order.
        epochs: passes over the data.
        steps: steps of the optimiser, in place of epochs: the last pass may be cut short.
        record_every: steps from record to record; default: a record at the end of each epoch. The last record, at the end,
            may hold fewer.
        batch_size: observations per step; the last batch of an epoch holds what is left.
        lr: learning rate. None: that of ``functools.partial(optimizer, lr=...)``, or else 1e-3.
        optimizer: called as ``optimizer(parameters, lr=lr)``: a class of :mod:`torch.optim`, or one with arguments,
            ``functools.partial(torch.optim.SGD, momentum=0.9)``. None: Adam, which is the fastest when compiled.
        schedule: called with the optimiser: a class of :mod:`torch.optim.lr_scheduler` with its arguments,
            ``functools.partial(CosineAnnealingLR, T_max=40)``. None: the learning rate stays.
        schedule_by: ``"epoch"``: the schedule takes a step at the end of each epoch (``ReduceLROnPlateau`` at each record,
            with its test loss, of the training loss without ``test``); ``"step"``: after each step of the optimiser.
        patience: stop after so many records without a lower test loss (``neg_elbo`` where there is one) than the best, the
            weights being those of the last step. None: never.
        compile: trace each step once per batch size, Pyro's handlers included, and run it as one compiled graph: the same
            values, gradients and noise at two to four times the speed, after some seconds of compiling. None: on the CPU,
            for batch sizes of which there are at least 4,000 steps to make. What cannot be compiled is trained eagerly,
            with a :class:`~pyro_vae.engine.tracing.NotCompiledWarning`. Needs a C++ compiler.
        precision: of matrix products in float32, for the time of training: ``"highest"``, or ``"high"`` or ``"medium"``, see
            :func:`torch.set_float32_matmul_precision`: faster where the hardware has units for it.
        seed: of data order and noise, a whole number >= 0; not of the initial weights, which are drawn
            where the model is built.
        clip_grad_norm: scale the gradient down to this norm, over all parameters together, where it is longer. None: never.
        test: held-out data; the objective is evaluated on all of it for each record, with the same noise every time.
        device: where to train; default: where the objective's parameters are.
        on_record: called with each record as soon as it exists.
        checkpoints: where to keep the state of the run: its last two, and as ``best.pt`` that after the record of the lowest
            test loss (``neg_elbo`` where there is one; of the training loss without ``test``).
        checkpoint_every: steps from checkpoint to checkpoint; None: about every 10 seconds, and for no more than 2 % of the
            time. There is always one at the end.
        resume: a checkpoint of the same settings, to go on from; None: start anew. Only epochs, steps, device and what is
            said or called may change. What ``on_record`` changes other than parameters and buffers is not in it.
        stop: asked after each step; when it answers True, a checkpoint is written and training ends.
        verbose: print a line per record on stdout and, on a terminal, a progress bar on stderr.

    Returns:
        One :class:`~pyro_vae.training.records.TrainingRecord` per epoch, or per ``record_every`` steps. Those made before
        ``resume`` come first.

    Raises:
        ValueError: unusable settings, or data that do not suit the objective.
        NonFiniteError: loss or gradient became NaN or infinite; raised before the optimiser steps.
        CheckpointError: a checkpoint cannot be written, or ``resume`` is of another run; or ``checkpoints`` holds some that
            are not resumed.
        TrainingStoppedError: ``stop`` answered True.

    Warns:
        NotTheSameWarning: ``resume`` was made with another number of threads or processes, or version of torch.
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
    compile = compile_choice(compile, data.x.device, processes.count())
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
            with _apart(data.x.device):  # the noise of training goes on as if nothing had been drawn here
                if held_out is not None:
                    torch.manual_seed(streams(seed, 0)[1])
                    record = replace(record, test=_mean_terms(objective, held_out, batch_size=1024))
                schedules.after_record(record)
                progress.note(record)
                if on_record is not None:  # before the line, so that a record that was announced has been kept
                    on_record(record)
            keeper.recorded()
            keeper.look(last=progress.step == length.last or progress.has_stalled(patience))
            if verbose:
                print(format_record(record, by_steps=length.by_steps), flush=True)
    return progress.history


def _check_parts(objective: Any, checkpoints: Any, **functions: Any) -> None:
    """Each is of the kind that it should be."""
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
    patience = whole_number("patience", patience)
    if test is None:
        raise ValueError("patience: expected test data, whose loss tells when to stop, found none. Pass test=...")
    return patience


@dataclass(frozen=True)
class _Length:
    """How long a run is."""

    per_epoch: int  # steps
    last: int  # step
    every: int  # steps from record to record
    batch_size: int
    observations: int
    by_steps: bool  # whether it is measured in them


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
    """Data as the objective takes them, checked; the objective on their device, with all of its parameters."""
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
    """How far the run has come: not at all, or as the checkpoint says."""
    if checkpoints is not None and resume is None and checkpoints.paths():
        raise CheckpointError(
            f"{checkpoints.folder}: holds the checkpoints of an earlier run, which a new one would replace. Name another "
            "folder, or go on from them with resume=checkpoints.load()."
        )
    if checkpoints is not None:
        folder = checkpoints.folder
        processes.first(lambda: check_writable(folder))
    progress = Progress() if resume is None else restore(resume, settings, *parts)
    if progress.step > length.last:
        raise CheckpointError(
            f"resume: {progress.step:,} steps were made, and only {length.last:,} are asked for. Ask for more."
        )
    if len(found := set(processes.gather_objects(progress.step))) > 1:
        raise CheckpointError(f"resume: the processes go on after different steps, {sorted(found)}. Give all one folder.")
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
    if processes.count() > 1:
        return DistributedStep(objective, data, optimizer, **options)
    sizes = None if compile else _worth_compiling(length.observations, length.batch_size, length.last)
    if compile or (compile is None and data.x.device.type == "cpu" and sizes):
        return CompiledStep(objective, data, optimizer, sizes=sizes, say=say, **options)
    return EagerStep(objective, data, optimizer, **options)


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """With torch's random state put back at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _training(objective: Objective, device: torch.device, precision: str) -> Iterator[None]:
    """Training mode, precision and random state; all as found afterwards."""
    was_training, was_precision = objective.training, torch.get_float32_matmul_precision()
    try:
        # The data have been checked as a whole, so Pyro need not check them in every step.
        with _apart(device), pyro.validation_enabled(False):
            torch.set_float32_matmul_precision(precision)
            yield
    finally:
        torch.set_float32_matmul_precision(was_precision)
        objective.train(was_training)


# Steps of one batch size for which compiling pays by default: it takes 8 to 15 seconds and then saves some 5 ms a step.
_PAYS = 4000


def _worth_compiling(observations: int, batch_size: int, steps: int) -> set[int]:
    """Batch sizes that come up often enough in so many steps. A rule, not a measurement: the same run does the same."""
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
    # A loss that is not finite is NaN or infinite by the order of sums, so which of them is not told.
    what, value = ("the gradient", f"loss {loss:g}, ") if np.isfinite(loss) else ("the loss", "")
    first = step == 1
    advice = "No step was taken yet: look at the nets and the data." if first else "Lower the learning rate."
    return (
        f"{what} is not finite in epoch {epoch}, step {step}: {value}{objective.diagnose(*batch)}. The weights are "
        f"those before this batch. {advice}"
    )


def _mean_terms(objective: Objective, data: Data, *, batch_size: int) -> dict[str, float]:
    """The objective's terms averaged over all observations, in evaluation mode; a short last batch weighs what it holds."""
    objective.eval()
    totals: dict[str, float] = {}
    with torch.no_grad():
        for index in processes.share(torch.arange(len(data), device=data.x.device)).split(batch_size):
            if len(index):  # a process may have no share
                for name, value in objective(*data.batch(index)).items():
                    totals[name] = totals.get(name, 0.0) + value.item() * len(index)
    shares = processes.gather_objects(totals)  # the first process has a share
    return {name: sum(share.get(name, 0.0) for share in shares) / len(data) for name in shares[0]}
