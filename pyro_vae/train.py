"""The one training loop."""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae import processes
from pyro_vae.checkpoint import CheckpointError, Checkpoints, check_writable
from pyro_vae.checks import compile_choice, number, usable_device, whole_number
from pyro_vae.data import Data
from pyro_vae.distributed import DistributedStep
from pyro_vae.objectives import Objective
from pyro_vae.own_data import DataLike, as_data
from pyro_vae.progress import Keeper, Progress, identity, restore, set_noise
from pyro_vae.step import CompiledStep, EagerStep, NonFiniteStepError
from pyro_vae.vae import VAE

__all__ = ["PRECISIONS", "NonFiniteError", "fit", "format_epoch"]

PRECISIONS = ("highest", "high", "medium")


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
    lr: float = 1e-3,
    eps: float = 1e-8,
    seed: int = 0,
    compile: bool | None = None,
    precision: str = "highest",
    clip_grad_norm: float | None = None,
    test: DataLike | None = None,
    device: torch.device | str | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    resume: dict[str, Any] | None = None,
    stop: Callable[[], bool] | None = None,
    verbose: bool = True,
) -> list[dict[str, Any]]:
    """Minimise ``objective(batch)["loss"]`` over the parameters of the objective by Adam.

    Data order and noise are functions of (seed, epoch), and do not depend on when records are made; torch's global random
    state is left as found. Parameters that do not require a gradient stay fixed.

    With ``checkpoints``, the same call goes on where an earlier one was stopped or killed, from its last checkpoint, and
    ends with the same weights, bit for bit, as if it had never stopped::

        checkpoints = Checkpoints("runs/mine")
        fit(objective, data, epochs=40, checkpoints=checkpoints, resume=checkpoints.load())

    Under ``torchrun``, in a process group, each process trains on its share of every batch, and all have the same weights;
    see :class:`~pyro_vae.distributed.DistributedStep`. Then call it on every process alike.

    Args:
        objective: what is minimised; moved to ``device`` and trained in place.
        data: training data; batches are made in the type of the objective's parameters. Each epoch visits every
            observation once, in a new random order.
        epochs: passes over the data.
        steps: steps of the optimiser, in place of epochs: the last pass may be cut short.
        record_every: steps from record to record; default: a record at the end of each epoch. The last record, at the end,
            may hold fewer.
        batch_size: observations per step; the last batch of an epoch holds what is left.
        lr: Adam's learning rate.
        eps: added to the root of Adam's second moment.
        compile: trace each step once per batch size, Pyro's handlers included, and run it as one compiled graph: the same
            values, gradients and noise at two to four times the speed, after some seconds of compiling. None: on the CPU,
            for batch sizes of which there are at least 4,000 steps to make. What cannot be compiled is trained eagerly,
            with a :class:`~pyro_vae.compiling.NotCompiledWarning`. Needs a C++ compiler.
        precision: of matrix products in float32, for the time of training: ``"highest"``, or ``"high"`` or ``"medium"``, see
            :func:`torch.set_float32_matmul_precision`: faster where the hardware has units for it.
        seed: of data order and noise, a whole number >= 0; not of the initial weights, which are drawn
            where the model is built.
        clip_grad_norm: scale the gradient down to this norm, over all parameters together, where it is longer. None: never.
        test: held-out data; the objective is evaluated on all of it for each record, with the same noise every time.
        device: where to train; default: where the objective's parameters are.
        on_epoch: called with each record as soon as it exists.
        checkpoints: where to keep the state of the run: its last two, and as ``best.pt`` that after the record of the lowest
            test loss (``neg_elbo`` where there is one; of the training loss without ``test``).
        checkpoint_every: steps from checkpoint to checkpoint; None: about every 10 seconds, and for no more than 2 % of the
            time. There is always one at the end.
        resume: a checkpoint of the same settings, to go on from; None: start anew. Only epochs, steps, device and what is
            said or called may change. What ``on_epoch`` changes other than parameters and buffers is not in it.
        stop: asked after each step; when it answers True, a checkpoint is written and training ends.
        verbose: print a line per record on stdout and, on a terminal, a progress bar on stderr.

    Returns:
        One record per epoch, or per ``record_every`` steps: ``epoch``; ``step`` where steps or record_every were given; the
        objective's terms averaged over the observations since the last record (nats per observation, made while the weights
        move); ``test``, the same terms on the held-out data; ``seconds`` and ``images_per_second`` of training, and
        ``compile_seconds`` before them where something was compiled. Those made before ``resume`` come first.

    Raises:
        ValueError: unusable settings, or data that do not suit the objective.
        NonFiniteError: loss or gradient became NaN or infinite; raised before the optimiser steps.
        CheckpointError: a checkpoint cannot be written, or ``resume`` is of another run; or ``checkpoints`` holds some that
            are not resumed.
        TrainingStoppedError: ``stop`` answered True.

    Warns:
        NotTheSameWarning: ``resume`` was made with another number of threads or processes, or version of torch.
    """
    if not isinstance(objective, Objective):
        hint = "NegativeELBO(vae)" if isinstance(objective, VAE) else "a subclass of pyro_vae.Objective"
        raise ValueError(f"fit: expected an objective, found {type(objective).__name__}. Use {hint}.")
    if (epochs is None) == (steps is None):
        raise ValueError(f"fit: expected either epochs or steps, found epochs={epochs}, steps={steps}.")
    batch_size = whole_number("batch_size", batch_size)
    lr, eps, seed = number("lr", lr), number("eps", eps), whole_number("seed", seed, minimum=0)
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, found {precision!r}.")
    parameters = [p for p in objective.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("fit: the objective has no parameter that requires a gradient; nothing to train.")
    for name, function in (("stop", stop), ("on_epoch", on_epoch)):
        if function is not None and not callable(function):
            raise ValueError(f"{name}: expected a function, found {function!r}.")
    if not isinstance(checkpoints, Checkpoints | None):
        raise ValueError(f"checkpoints: expected Checkpoints(folder), found {checkpoints!r}.")
    device = parameters[0].device if device is None else usable_device(device)
    data = as_data(data).to(device, parameters[0].dtype)
    held_out = None if test is None else as_data(test).to(device, parameters[0].dtype)
    for part in (data, held_out):
        if part is not None and part.x.is_floating_point():  # uint8 is scaled into [0, 1], which suits every likelihood
            objective.check(part.x)
    if held_out is not None and held_out.event_shape != data.event_shape:
        raise ValueError(
            f"test: expected observations of shape {tuple(data.event_shape)} like those of the training data, found "
            f"{tuple(held_out.event_shape)}. Reshape one of the two."
        )
    objective.to(device)
    compile = compile_choice(compile, device)
    if compile and processes.count() > 1:
        raise ValueError(f"compile: expected None or False in a group of processes, found {compile!r}.")
    clip_grad_norm = None if clip_grad_norm is None else number("clip_grad_norm", clip_grad_norm)
    checkpoint_every = None if checkpoint_every is None else whole_number("checkpoint_every", checkpoint_every)
    optimizer = torch.optim.Adam(parameters, lr=lr, eps=eps, fused=True)

    per_epoch = math.ceil(len(data) / batch_size)
    last = whole_number("steps", steps) if epochs is None else whole_number("epochs", epochs) * per_epoch
    by_steps = steps is not None or record_every is not None
    every = per_epoch if record_every is None else whole_number("record_every", record_every)
    verbose = verbose and processes.rank() == 0

    settings = {
        "objective": type(objective).__name__,
        "data": identity(data) if checkpoints or resume else "",
        "test": identity(held_out) if held_out is not None and (checkpoints or resume) else "",
        "batch_size": batch_size,
        "record_every": record_every,
        "lr": lr,
        "eps": eps,
        "clip_grad_norm": clip_grad_norm,
        "seed": seed,
        "precision": precision,
        "compile": compile,
    }
    if checkpoints is not None and resume is None and checkpoints.paths():
        raise CheckpointError(
            f"{checkpoints.folder}: holds the checkpoints of an earlier run, which a new one would replace. Name another "
            "folder, or go on from them with resume=checkpoints.load()."
        )
    if checkpoints is not None:
        folder = checkpoints.folder
        processes.first(lambda: check_writable(folder))
    progress = Progress() if resume is None else restore(resume, settings, objective, optimizer)
    if progress.step > last:
        raise CheckpointError(f"resume: {progress.step:,} steps were made, and only {last:,} are asked for. Ask for more.")

    if len(found := set(processes.gather_objects(progress.step))) > 1:
        raise CheckpointError(f"resume: the processes go on after different steps, {sorted(found)}. Give all one folder.")

    options: dict[str, Any] = {"clip_grad_norm": clip_grad_norm, "done": progress.step}
    sizes = None if compile else _worth_compiling(len(data), batch_size, last)
    step: EagerStep
    if processes.count() > 1:
        step = DistributedStep(objective, data, optimizer, **options)
    elif compile or (compile is None and device.type == "cpu" and sizes):
        say = tqdm.write if verbose else None
        step = CompiledStep(objective, data, optimizer, sizes=sizes, say=say, **options)
    else:
        step = EagerStep(objective, data, optimizer, **options)
    step.not_compiled = "" if resume is None else resume["not_compiled"]
    keeper = Keeper(checkpoints, checkpoint_every, stop, settings, step, progress)

    was_training = objective.training
    was_precision = torch.get_float32_matmul_precision()
    cuda = [device] if device.type == "cuda" else []
    try:
        # The data have been checked as a whole, so Pyro need not check them in every step.
        with torch.random.fork_rng(devices=cuda), pyro.validation_enabled(False):
            torch.set_float32_matmul_precision(precision)
            noise = None if resume is None else resume["noise"]
            batches = _batches(len(data), batch_size, seed, device, progress.step, noise)
            while progress.step < last:
                done = min(last, (progress.step // every + 1) * every)  # when the next record is made
                record = _train(step, batches, done - progress.step, progress, keeper, per_epoch, verbose)
                if by_steps:
                    record = {"epoch": record.pop("epoch"), "step": done, **record}
                with torch.random.fork_rng(devices=cuda):  # the noise of training goes on as if nothing had been drawn here
                    if held_out is not None:
                        torch.manual_seed(_streams(seed, 0)[1])
                        record["test"] = _mean_terms(objective, held_out, batch_size=1024)
                    progress.history.append(record)
                    if on_epoch is not None:  # before the line, so that an epoch that was announced has been kept
                        on_epoch(record)
                keeper.recorded(record)
                keeper.look(last=done == last)
                if verbose:
                    tqdm.write(format_epoch(record), file=sys.stdout)
                    sys.stdout.flush()
    finally:
        torch.set_float32_matmul_precision(was_precision)
        objective.train(was_training)
    return progress.history


# Steps of one batch size for which compiling pays by default: it takes 8 to 15 seconds and then saves some 5 ms a step.
_PAYS = 4000


def _worth_compiling(observations: int, batch_size: int, steps: int) -> set[int]:
    """Batch sizes that come up often enough in so many steps. A rule, not a measurement: the same run does the same."""
    per_epoch, rest = math.ceil(observations / batch_size), observations % batch_size
    short = steps // per_epoch if rest else 0  # one at the end of each epoch
    counts = {min(batch_size, observations): steps - short, rest: short}
    return {size for size, count in counts.items() if count >= _PAYS}


def _batches(
    size: int, batch_size: int, seed: int, device: torch.device, done: int, noise: list[dict[str, Tensor]] | None
) -> Iterator[Tensor]:
    """Indices of the batches after those done, without end. Seeds torch's noise at the start of each epoch; in the middle of
    one, the noise goes on from the state that is given, of each process."""
    epochs_done, batches_done = divmod(done, math.ceil(size / batch_size))
    for epoch in itertools.count(epochs_done + 1):
        # Two streams: the order of the data must not depend on how much noise the objective draws.
        order_seed, noise_seed = _streams(seed, epoch)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(order_seed)).to(device)
        torch.manual_seed(noise_seed)
        if batches_done and noise is not None and processes.rank() < len(noise):  # else there were fewer processes
            set_noise(noise[processes.rank()], device)
        yield from order.split(batch_size)[batches_done:]
        batches_done = 0


def _train(
    step: EagerStep,
    batches: Iterator[Tensor],
    steps: int,
    progress: Progress,
    keeper: Keeper,
    per_epoch: int,
    verbose: bool,
) -> dict[str, Any]:
    """So many steps: the terms averaged over the observations seen since the last record, and the time it took."""
    step.objective.train()
    step.begin()
    first = progress.step
    start = time.perf_counter() - progress.seconds - progress.compile_seconds
    compiled = step.compile_seconds - progress.compile_seconds

    def look_at_the_clock() -> None:
        progress.compile_seconds = step.compile_seconds - compiled
        progress.seconds = time.perf_counter() - start - progress.compile_seconds

    with tqdm(total=steps, desc=f"step {first:,}", unit="step", leave=False, disable=None if verbose else True) as bar:
        try:
            for number, index in enumerate(itertools.islice(batches, steps), start=1):
                terms = step(index)
                size = index.shape[0]
                for name, value in terms.items():
                    progress.totals[name] = progress.totals.get(name, 0.0) + value * size
                progress.seen += size
                progress.step += 1
                if number % 20 == 0 or number == steps:
                    bar.set_postfix(epoch=math.ceil(progress.step / per_epoch), loss=f"{terms['loss']:.2f}", refresh=False)
                    bar.update(number - bar.n)
                if number < steps:
                    look_at_the_clock()
                    keeper.look()
            step.end()
        except NonFiniteStepError as error:
            failed = first + number - error.ago
            x = step.data.batch(error.index)
            raise NonFiniteError(_describe(step.objective, x, math.ceil(failed / per_epoch), failed, error.loss)) from None
    look_at_the_clock()
    record: dict[str, Any] = {"epoch": math.ceil(progress.step / per_epoch)}
    record |= {name: total / progress.seen for name, total in progress.totals.items()}
    record |= {"seconds": progress.seconds, "images_per_second": progress.seen / progress.seconds}
    record |= {"compile_seconds": progress.compile_seconds} if progress.compile_seconds else {}
    progress.totals, progress.seen, progress.seconds, progress.compile_seconds = {}, 0, 0.0, 0.0
    return record


def _streams(seed: int, epoch: int) -> tuple[int, int]:
    """Independent seeds of data order and noise for an epoch; epoch 0 stands for the evaluations.

    The noise is another one on each process, the order the same.
    """
    order, noise = np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64)
    if rank := processes.rank():
        (noise,) = np.random.SeedSequence((seed, epoch, rank)).generate_state(1, np.uint64)
    return int(order), int(noise)


def _describe(objective: Objective, x: Tensor, epoch: int, step: int, loss: float) -> str:
    # A loss that is not finite is NaN or infinite by the order of sums, so which of them is not told.
    what, value = ("the gradient", f"loss {loss:g}, ") if np.isfinite(loss) else ("the loss", "")
    first = step == 1
    advice = "No step was taken yet: look at the nets and the data." if first else "Lower the learning rate."
    return (
        f"{what} is not finite in epoch {epoch}, step {step}: {value}{objective.diagnose(x)}. The weights are "
        f"those before this batch. {advice}"
    )


def _mean_terms(objective: Objective, data: Data, *, batch_size: int) -> dict[str, float]:
    """The objective's terms averaged over all observations, in evaluation mode; a short last batch weighs what it holds."""
    objective.eval()
    totals: dict[str, float] = {}
    with torch.no_grad():
        for index in processes.share(torch.arange(len(data), device=data.x.device)).split(batch_size):
            if len(index):  # a process may have no share
                for name, value in objective(data.batch(index)).items():
                    totals[name] = totals.get(name, 0.0) + value.item() * len(index)
    shares = processes.gather_objects(totals)  # the first process has a share
    return {name: sum(share.get(name, 0.0) for share in shares) / len(data) for name in shares[0]}


_LABELS = {"reconstruction": "rec", "kl": "kl", "neg_elbo": "-ELBO", "squared_error": "squared error"}


def format_epoch(record: dict[str, Any]) -> str:
    """One line for people: ``epoch  1  rec=150.72  kl=14.92  -ELBO=165.64  test -ELBO=...``; by steps, ``step   250  ...``.

    ``loss`` is shown where it is not the negative ELBO already shown.
    """
    names: list[str] = [name for name in ("reconstruction", "squared_error", "kl", "neg_elbo") if name in record]
    if "neg_elbo" not in record or abs(record["loss"] - record["neg_elbo"]) > 1e-6 * abs(record["loss"]):
        names.append("loss")
    when = f"step {record['step']:5d}" if "step" in record else f"epoch {record['epoch']:2d}"
    parts = [when, *(f"{_LABELS.get(name, name)}={_figure(name, record[name])}" for name in names)]
    if "test" in record:
        name = "neg_elbo" if "neg_elbo" in record["test"] else "loss"
        parts.append(f"test {_LABELS.get(name, name)}={_figure(name, record['test'][name])}")
    return "  ".join(parts)


def _figure(name: str, value: float) -> str:
    return f"{value:.5f}" if name == "loss" and abs(value) < 0.1 else f"{value:.2f}"  # a mean per pixel is small
