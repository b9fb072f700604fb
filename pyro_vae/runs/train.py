"""A complete run: training with checkpoints, evaluation and figures, written to a run folder."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae import _processes as processes
from pyro_vae._checks import usable_device, whole_number
from pyro_vae.analysis import latent
from pyro_vae.analysis.coder import UndefinedError
from pyro_vae.analysis.gallery import SHOWN, run_figures
from pyro_vae.data.dataset import Data
from pyro_vae.data.own import DataLike, as_data
from pyro_vae.estimates.evaluate import evaluate
from pyro_vae.estimates.log_weights import NoDensityError
from pyro_vae.estimates.records import Estimate
from pyro_vae.models.likelihoods import NormalLikelihood
from pyro_vae.runs.describe import described, further, model_of, name_of, parts_of, prepared, provenance
from pyro_vae.runs.folder import (
    CONFIG,
    append_jsonl,
    is_run,
    new_run,
    reopen_run,
    save_figure,
    save_weights,
    withdraw_run,
    write_config,
    write_json,
    write_jsonl,
)
from pyro_vae.runs.loggers import TensorBoard
from pyro_vae.runs.presets import Settings
from pyro_vae.runs.signals import Signals
from pyro_vae.training.checkpoint import Checkpoints
from pyro_vae.training.fit import NonFiniteError, fit
from pyro_vae.training.objective import Objective
from pyro_vae.training.optimizers import learning_rate
from pyro_vae.training.records import TrainingRecord
from pyro_vae.training.state import TrainingStoppedError, progress_of

__all__ = ["RunStoppedError", "train_run"]


class RunStoppedError(KeyboardInterrupt):
    """A signal ended the training of the run in ``folder``, after a checkpoint was written."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@dataclass(frozen=True)
class _Run:
    """A run whose folder is open."""

    folder: Path
    objective: Objective
    model: Any  # what is measured and drawn; None where the objective has no model
    train: Data
    test: Data | None
    held: nn.Module  # whose state_dict is kept
    settings: Settings | None
    options: Mapping[str, Any]  # of fit
    about: Mapping[str, Any]  # config.json, but for the settings
    name: str
    say: Callable[..., None]

    @property
    def held_out(self) -> Data:
        """What is shown: the test data, or training data where there are none."""
        return self.train if self.test is None else self.test

    @property
    def title(self) -> str:
        return f"{self.name} on {self.train.name}"


def train_run(
    folder: str | Path | None,
    objective: Objective,
    data: DataLike,
    *,
    test: DataLike | None = None,
    model: Any = None,
    settings: Settings | None = None,
    importance_samples: int = 100,
    figures: bool = True,
    tensorboard: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
    signals: Signals | None = None,
    **options: Any,
) -> Path:
    """Train any objective on any data, evaluate its model, draw figures, and write a run folder; progress is on stdout.

    The folder has ``config.json``, ``metrics.jsonl`` (a line per record), ``checkpoints/`` with the parameters at the last
    record, ``metrics.json`` (final metrics on the test data), ``latents.json`` and ``figures/``. It contains no code: for a
    model of your own, ``config.json`` has a description, and ``load_run(folder, model=...)`` loads its parameters into a
    model that you build.

    Args:
        folder: of the run; None: a new one, ``runs/NAME-DATA-DATE-TIME`` under the working directory.
        objective: to minimise; trained in place.
        data: training data.
        test: held-out data. Without them there are no final metrics, and figures show training data.
        model: to evaluate: a module with model and guide, a pair of these, or an autoencoder. None: that of the objective,
            found among its modules. An objective without a model is trained, and its own parameters are saved.
        settings: those from which the model was built, and from which ``load_run(folder)`` rebuilds it; they also provide
            arguments of ``fit``. None: the model is one of your own.
        importance_samples: draws per test observation for log p(x); 0: log p(x) is not estimated.
        figures: whether to draw figures.
        tensorboard: whether to write ``tensorboard/`` too.
        resume: resume the run in the folder from its last checkpoint, or start it if there is none yet.
        overwrite: replace an earlier run in the folder.
        about: further entries of ``config.json``: plain values.
        signals: an entered context; the first signal during training ends it after the current step, with a checkpoint.
        options: arguments of :func:`~pyro_vae.training.fit.fit`, except ``checkpoints``.

    Returns:
        The folder.

    Raises:
        ValueError: options are invalid, or data are invalid for the objective; a new folder can then be used again.
        CheckpointError: the folder has other content, or cannot be written; or a checkpoint cannot be read.
        NonFiniteError: loss or gradient became NaN or infinite.
        TrainingStoppedError: ``stop`` returned True.
        RunStoppedError: a signal was received during training.

    Example:
        >>> train_run("runs/mine", NegativeELBO(vae), train, test=test, epochs=20, resume=True)  # doctest: +SKIP
        >>> vae = load_run("runs/mine", model=my_vae())  # doctest: +SKIP
    """
    options = _checked(objective, settings, options)
    if whole_number("importance_samples", importance_samples, minimum=0) == 1:
        raise ValueError("importance_samples: expected 0 or a whole number >= 2, found 1.")
    model = model_of(objective) if model is None else model
    train, held_out = _on_device(objective, data, test, options.get("device"))
    held, batch = prepared(objective, model, train, whole_number("batch_size", options.get("batch_size", 128)))
    about = provenance(train, held_out, options) | further(about or {})
    if settings is None:
        defaults = {
            "batch_size": inspect.signature(fit).parameters["batch_size"].default,
            "lr": learning_rate(options.get("lr"), options.get("optimizer")),
        }
        about = described(objective, model, train, batch, defaults | {**options, "lr": defaults["lr"]}) | about
    name = settings.preset if settings is not None else name_of(objective if model is None else model)
    path, checkpoint = _open(folder, f"{name}-{train.name}", resume, overwrite)
    is_first = processes.rank() == 0
    say = print if is_first and options.get("verbose", True) else lambda *_, **__: None
    run = _Run(path, objective, model, train, held_out, held, settings, options, about, name, say)
    board = TensorBoard(path / "tensorboard") if tensorboard and is_first else None
    earlier = None if checkpoint is None else (path / CONFIG).read_bytes()
    if is_first:
        _begin(run, checkpoint, resume)
    history = _fit(run, checkpoint, earlier, board, signals)
    objective.eval()
    found = _evaluated(run, importance_samples)
    if is_first:
        means = _test_means(run)
        _write_metrics(run, history, found, means)
        _write_figures(run, history, means, board, figures)
        say(f"trained in {_seconds(history):.0f} s; everything is in {path}")
    return path


def _checked(objective: Any, settings: Settings | None, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of fit, including those from the settings."""
    if not isinstance(objective, Objective):
        hint = "NegativeELBO(vae)" if hasattr(objective, "guide") else "a subclass of pyro_vae.Objective"
        raise ValueError(f"train_run: expected an objective, found {type(objective).__name__}. Use {hint}.")
    known = inspect.signature(fit).parameters.keys() - {"objective", "data", "test", "checkpoints", "resume"}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"train_run: no argument {', '.join(unknown)}; beside its own it takes {', '.join(sorted(known))}.")
    for name in ("on_record", "stop"):
        if options.get(name) is not None and not callable(options[name]):
            raise ValueError(f"{name}: expected a function, found {type(options[name]).__name__}.")
    training = {} if settings is None else settings.training()
    if differ := [name for name, value in training.items() if name in options and options[name] != value]:
        text = ", ".join(f"{name} {training[name]} in settings, {options[name]} beside them" for name in differ)
        raise ValueError(f"train_run: found {text}. Change the settings: dataclasses.replace(settings, ...).")
    options = {**training, **options}
    epochs, steps = options.get("epochs"), options.get("steps")
    if (epochs is None) == (steps is None):
        raise ValueError(f"train_run: expected either epochs or steps, found epochs={epochs}, steps={steps}.")
    learning_rate(options.get("lr"), options.get("optimizer"))
    return options


def _on_device(objective: Objective, data: DataLike, test: DataLike | None, device: Any) -> tuple[Data, Data | None]:
    """The data in the dtype and on the device of the objective."""
    train, held_out = as_data(data), None if test is None else as_data(test)
    example = objective.example()
    place = usable_device(device) if device is not None else (train.x if example is None else example).device
    if example is not None:
        objective.to(place)
    dtype = None if example is None else example.dtype
    return train.to(place, dtype), None if held_out is None else held_out.to(place, dtype)


def _open(folder: str | Path | None, name: str, resume: bool, overwrite: bool) -> tuple[Path, dict[str, Any] | None]:
    """A new folder, or that of the run to resume with its last checkpoint."""
    path = None if folder is None or not resume else Path(folder)
    if path is None or not processes.on_rank_zero(lambda: is_run(path)):
        return processes.on_rank_zero(lambda: new_run(folder, name=name, overwrite=overwrite)), None
    processes.on_rank_zero(lambda: reopen_run(path))
    checkpoint = Checkpoints(path / "checkpoints").load()
    if checkpoint is None and processes.rank() == 0 and (path / "metrics.jsonl").is_file():
        message = f"{path}: there is no checkpoint, so the run begins anew, with the same settings."
        warnings.warn(message, stacklevel=3)
    return path, checkpoint


def _begin(run: _Run, checkpoint: dict[str, Any] | None, resume: bool) -> None:
    """Write the config and print a summary before training."""
    train, say = run.train, run.say
    progress = None if checkpoint is None else progress_of(checkpoint)
    parts = parts_of(run.objective if run.model is None else run.model)
    write_config(run.folder, run.settings, event_shape=tuple(train.event_shape), parts=parts, **run.about)
    write_jsonl(run.folder / "metrics.jsonl", [record.to_json() for record in progress.history] if progress else [])
    size = sum(p.numel() for p in run.held.parameters())
    held_out = "" if run.test is None else f" and {len(run.test):,} test"
    say(f"{run.title}: {len(train):,} training{held_out} {train.kind}", end=" ")
    say(f"of shape {tuple(train.event_shape)}, binarization {train.binarization}", end="; ")
    say(f"{size:,} parameters; {train.x.device.type}, {torch.get_num_threads()} threads", end="")
    say(f" in each of {processes.world_size()} processes" if processes.world_size() > 1 else "")
    if columns := run.about.get("discrete_columns"):
        say(f"caution: {columns}")
    if isinstance(likelihood := getattr(run.model, "likelihood", None), NormalLikelihood):
        constant = likelihood.constant(train.event_shape)
        say(f"rec and -ELBO include the normal density's constant {constant:.2f}; squared error + kl leaves it out")
    say(f"run folder: {run.folder}", end="")
    if resume:
        step = f"resumed after step {progress.step:,}" if progress else "without a checkpoint yet"
        say(f", {step}", end="")
    say(flush=True)


def _fit(
    run: _Run,
    checkpoint: dict[str, Any] | None,
    earlier: bytes | None,
    board: TensorBoard | None,
    signals: Signals | None,
) -> list[TrainingRecord]:
    """Train; at each record, append a line to metrics.jsonl and save the parameters."""
    options = dict(run.options)
    also, stop, has_begun = options.pop("on_record", None), options.pop("stop", None), False

    def on_record(record: TrainingRecord) -> None:
        if board is not None:
            board.record(record)
        if processes.rank() == 0:
            append_jsonl(run.folder / "metrics.jsonl", record.to_json())
            save_weights(run.folder, run.held, durable=False)
        if also is not None:
            also(record)

    def stopping() -> bool:
        nonlocal has_begun
        has_begun = True
        return came() or (stop is not None and stop())

    came = signals.came if signals is not None else lambda: False
    options |= {"test": run.test, "on_record": on_record, "resume": checkpoint, "stop": stopping}
    try:
        with signals.awaited() if signals is not None else nullcontext():
            history = fit(run.objective, run.train, checkpoints=Checkpoints(run.folder / "checkpoints"), **options)
    except NonFiniteError:
        if processes.rank() == 0:
            save_weights(run.folder, run.held)
        raise
    except ValueError:
        if processes.rank() == 0 and not has_begun:
            withdraw_run(run.folder, earlier)
        raise
    except TrainingStoppedError as stopped:
        if came():
            raise RunStoppedError(str(stopped), run.folder) from None
        raise
    if came():
        raise RunStoppedError("stopped after the last step", run.folder)
    return history


def _evaluated(run: _Run, importance_samples: int) -> dict[str, Estimate]:
    """Metrics on the test data; none if there are no test data or no model."""
    if run.test is None or run.model is None:
        return {}
    try:
        return evaluate(run.model, run.test, importance_samples=importance_samples, seed=run.options.get("seed", 0))
    except NoDensityError as error:
        run.say(f"no metrics on the test data: {error}")
        return {}
    except ValueError as error:
        raise ValueError(
            f"{error} The run in {run.folder} is trained: call again with resume=True, and with importance_samples=0 where "
            "log p(x) is not defined."
        ) from error


def _seconds(history: list[TrainingRecord]) -> float:
    return sum(record.timing["seconds"] + record.timing.get("compile_seconds", 0) for record in history)


def _test_means(run: _Run) -> Tensor | None:
    """Posterior means of as many test observations as are shown, once for all that shows them; None if there are none."""
    if run.model is None:
        return None
    try:
        return latent.latent_means(run.model, run.held_out.subset(slice(SHOWN)))
    except UndefinedError:
        return None


def _write_metrics(run: _Run, history: list[TrainingRecord], metrics: Mapping[str, Estimate], means: Tensor | None) -> None:
    """The final weights, metrics.json and latents.json."""
    for name, estimate in metrics.items():  # before anything is written, where the disk may be full
        run.say(f"test {name:15s} {estimate.value:9.3f} ± {estimate.standard_error:.3f} nats", flush=True)
    save_weights(run.folder, run.held)
    content = {
        **({} if run.settings is None else {"preset": run.settings.preset}),
        "binarization": run.train.binarization,
        **run.about,
        "seconds": _seconds(history),
        "images_per_second": sum(record.timing["observations_per_second"] for record in history) / len(history),
        "train": history[-1].train,
        "test": {name: asdict(estimate) for name, estimate in metrics.items()},
    }
    write_json(run.folder / "metrics.json", content)
    if run.model is not None:
        try:
            record = latent.latent_record(run.model, run.held_out, means=means)
            write_json(run.folder / "latents.json", record)
        except UndefinedError as error:
            run.say(f"no latents.json: {error}")


def _write_figures(
    run: _Run, history: list[TrainingRecord], means: Tensor | None, board: TensorBoard | None, wanted: bool
) -> None:
    """To figures/, and to TensorBoard if it is asked for."""
    if wanted:
        torch.manual_seed(run.options.get("seed", 0))
        drawn = run_figures(
            run.model,
            run.train,
            run.held_out,
            history,
            title=run.title,
            test_means=means,
            tsne_of_training=run.name == "bernoulli-z10",  # as its reference has it
            left_out=lambda reason: run.say(f"some figures are left out: {reason}"),
        )
        for name, figure in drawn:
            save_figure(run.folder, name, figure)
            if board is not None:
                board.figure(name, figure)
    if board is not None:
        if run.model is not None:
            try:
                board.embedding(run.model, run.held_out, means=means)
            except UndefinedError as error:
                run.say(f"no embedding for TensorBoard: {error}")
        board.close()
