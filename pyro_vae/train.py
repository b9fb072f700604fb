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

from pyro_vae.checks import number, usable_device, whole_number
from pyro_vae.data import Data, as_data
from pyro_vae.objectives import Objective
from pyro_vae.step import CompiledStep, EagerStep, NonFiniteStepError
from pyro_vae.vae import VAE

__all__ = ["PRECISIONS", "NonFiniteError", "fit", "format_epoch"]

PRECISIONS = ("highest", "high", "medium")


class NonFiniteError(FloatingPointError):
    """Loss or gradient became NaN or infinite; the weights are those of the last good step."""


def fit(
    objective: Objective,
    data: "Data | Tensor | np.ndarray[Any, Any]",
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
    test: "Data | Tensor | np.ndarray[Any, Any] | None" = None,
    device: torch.device | str | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    verbose: bool = True,
) -> list[dict[str, Any]]:
    """Minimise ``objective(batch)["loss"]`` over the parameters of the objective by Adam.

    Data order and noise are functions of (seed, epoch), and do not depend on when records are made; torch's global random
    state is left as found. Parameters that do not require a gradient stay fixed.

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
        test: held-out data; the objective is evaluated on all of it for each record, with the same noise every time.
        device: where to train; default: where the objective's parameters are.
        on_epoch: called with each record as soon as it exists.
        verbose: print a line per record on stdout and, on a terminal, a progress bar on stderr.

    Returns:
        One record per epoch, or per ``record_every`` steps: ``epoch``; ``step`` where steps or record_every were given; the
        objective's terms averaged over the observations since the last record (nats per observation, made while the weights
        move); ``test``, the same terms on the held-out data; ``seconds`` and ``images_per_second`` of training, and
        ``compile_seconds`` before them where something was compiled.

    Raises:
        ValueError: unusable settings, or data that do not suit the objective.
        NonFiniteError: loss or gradient became NaN or infinite; raised before the optimiser steps.
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
    device = parameters[0].device if device is None else usable_device(device)
    data = as_data(data).to(device, parameters[0].dtype)
    held_out = None if test is None else as_data(test).to(device, parameters[0].dtype)
    for part in (data, held_out):
        if part is not None and part.x.is_floating_point():  # uint8 is scaled into [0, 1], which suits every likelihood
            objective.check(part.x)
    objective.to(device)
    if not isinstance(compile, bool | None):
        raise ValueError(f"compile: expected True, False or None, found {compile!r}.")
    if compile and device.type != "cpu":
        raise ValueError(f"compile: expected device cpu, found {device}. Leave compile out to train there eagerly.")
    optimizer = torch.optim.Adam(parameters, lr=lr, eps=eps, fused=True)

    per_epoch = math.ceil(len(data) / batch_size)
    last = whole_number("steps", steps) if epochs is None else whole_number("epochs", epochs) * per_epoch
    by_steps = steps is not None or record_every is not None
    every = per_epoch if record_every is None else whole_number("record_every", record_every)
    step = EagerStep(objective, data, optimizer)
    sizes = None if compile else _worth_compiling(len(data), batch_size, last)
    if compile or (compile is None and device.type == "cpu" and sizes):
        say = tqdm.write if verbose else None
        step = CompiledStep(objective, data, optimizer, sizes=sizes, say=say)

    history: list[dict[str, Any]] = []
    was_training = objective.training
    was_precision = torch.get_float32_matmul_precision()
    cuda = [device] if device.type == "cuda" else []
    try:
        # The data have been checked as a whole, so Pyro need not check them in every step.
        with torch.random.fork_rng(devices=cuda), pyro.validation_enabled(False):
            torch.set_float32_matmul_precision(precision)
            batches = _batches(len(data), batch_size, seed, device)
            for first in range(0, last, every):
                record = _train(step, batches, min(every, last - first), first, per_epoch, verbose)
                if by_steps:
                    record = {"epoch": record.pop("epoch"), "step": min(first + every, last), **record}
                with torch.random.fork_rng(devices=cuda):  # the noise of training goes on as if nothing had been drawn here
                    if held_out is not None:
                        torch.manual_seed(_streams(seed, 0)[1])
                        record["test"] = _mean_terms(objective, held_out, batch_size=1024)
                    history.append(record)
                    if on_epoch is not None:  # before the line, so that an epoch that was announced has been kept
                        on_epoch(record)
                if verbose:
                    tqdm.write(format_epoch(record), file=sys.stdout)
                    sys.stdout.flush()
    finally:
        torch.set_float32_matmul_precision(was_precision)
        objective.train(was_training)
    return history


# Steps of one batch size for which compiling pays by default: it takes 8 to 15 seconds and then saves some 5 ms a step.
_PAYS = 4000


def _worth_compiling(observations: int, batch_size: int, steps: int) -> set[int]:
    """Batch sizes that come up often enough in so many steps. A rule, not a measurement: the same run does the same."""
    per_epoch, rest = math.ceil(observations / batch_size), observations % batch_size
    short = steps // per_epoch if rest else 0  # one at the end of each epoch
    counts = {min(batch_size, observations): steps - short, rest: short}
    return {size for size, count in counts.items() if count >= _PAYS}


def _batches(size: int, batch_size: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Indices of the batches of all epochs, without end; seeds torch's noise at the start of each epoch."""
    for epoch in itertools.count(1):
        # Two streams: the order of the data must not depend on how much noise the objective draws.
        order_seed, noise_seed = _streams(seed, epoch)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(order_seed)).to(device)
        torch.manual_seed(noise_seed)
        yield from order.split(batch_size)


def _train(
    step: EagerStep, batches: Iterator[Tensor], steps: int, done: int, per_epoch: int, verbose: bool
) -> dict[str, Any]:
    """So many steps after those done: the terms averaged over the observations seen, and the time it took."""
    step.objective.train()
    step.begin()
    totals: dict[str, float] = {}
    seen = 0
    compiled = step.compile_seconds
    start = time.perf_counter()
    with tqdm(total=steps, desc=f"step {done:,}", unit="step", leave=False, disable=None if verbose else True) as bar:
        try:
            for number, index in enumerate(itertools.islice(batches, steps), start=1):
                terms = step(index)
                size = index.shape[0]
                for name, value in terms.items():
                    totals[name] = totals.get(name, 0.0) + value * size
                seen += size
                if number % 20 == 0 or number == steps:
                    bar.set_postfix(epoch=math.ceil((done + number) / per_epoch), loss=f"{terms['loss']:.2f}", refresh=False)
                    bar.update(number - bar.n)
            step.end()
        except NonFiniteStepError as error:
            failed = done + number - error.ago
            x = step.data.batch(error.index)
            raise NonFiniteError(_describe(step.objective, x, math.ceil(failed / per_epoch), failed, error.loss)) from None
    compiled = step.compile_seconds - compiled
    seconds = time.perf_counter() - start - compiled
    record = {"epoch": math.ceil((done + steps) / per_epoch)} | {name: total / seen for name, total in totals.items()}
    record |= {"seconds": seconds, "images_per_second": seen / seconds}
    return record | ({"compile_seconds": compiled} if compiled else {})


def _streams(seed: int, epoch: int) -> tuple[int, int]:
    """Independent seeds of data order and noise for an epoch; epoch 0 stands for the evaluations."""
    order, noise = np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64)
    return int(order), int(noise)


def _describe(objective: Objective, x: Tensor, epoch: int, step: int, loss: float) -> str:
    what = "the loss" if not np.isfinite(loss) else "the gradient"
    first = step == 1
    advice = "No step was taken yet: look at the nets and the data." if first else "Lower the learning rate."
    return (
        f"{what} is not finite in epoch {epoch}, step {step}: loss {loss:g}, {objective.diagnose(x)}. The weights are "
        f"those before this batch. {advice}"
    )


def _mean_terms(objective: Objective, data: Data, *, batch_size: int) -> dict[str, float]:
    """The objective's terms averaged over all observations, in evaluation mode; a short last batch weighs what it holds."""
    objective.eval()
    totals: dict[str, float] = {}
    with torch.no_grad():
        for index in torch.arange(len(data), device=data.x.device).split(batch_size):
            for name, value in objective(data.batch(index)).items():
                totals[name] = totals.get(name, 0.0) + value.item() * len(index)
    return {name: total / len(data) for name, total in totals.items()}


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
