"""A run from beginning to end: data, model, training with its checkpoints, figures, pictures; all of it in a run folder."""

import platform
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch

import pyro_vae
from pyro_vae import _processes as processes
from pyro_vae._checks import SettingError
from pyro_vae.analysis import latent
from pyro_vae.analysis.gallery import run_figures
from pyro_vae.data.columns import caution_of_columns
from pyro_vae.data.dataset import Data, DataError
from pyro_vae.estimates.evaluate import evaluate
from pyro_vae.estimates.records import Estimate
from pyro_vae.models.likelihoods import NormalLikelihood
from pyro_vae.models.vae import VAE
from pyro_vae.runs.folder import (
    append_jsonl,
    check_new_run,
    new_run,
    processor,
    reopen_run,
    save_weights,
    write_config,
    write_json,
    write_jsonl,
)
from pyro_vae.runs.loggers import TensorBoard
from pyro_vae.runs.presets import Settings, fitting_likelihood
from pyro_vae.runs.settings import COMPILE, Job
from pyro_vae.runs.signals import Signals
from pyro_vae.runs.splits import load_splits, set_threads
from pyro_vae.training.checkpoint import Checkpoints
from pyro_vae.training.fit import NonFiniteError, fit
from pyro_vae.training.records import TrainingRecord
from pyro_vae.training.state import TrainingStoppedError, identity

__all__ = ["RunStoppedError", "train_run"]

FEWEST_STEPS = 2000  # on your own data, by default: fewer leave the pictures blurred


class RunStoppedError(KeyboardInterrupt):
    """A signal ended the training of the run in ``folder``, after a step that its last checkpoint holds."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@dataclass(frozen=True)
class _Run:
    """A run whose folder is open."""

    job: Job
    settings: Settings  # fitted to the data
    vae: VAE
    train: Data
    test: Data
    device: str
    folder: Path
    checkpoint: dict[str, Any] | None  # to go on from


def train_run(job: Job, signals: Signals) -> Path:
    """Train, evaluate and draw what the job says, or go on with it, and tell of it on stdout.

    Args:
        job: see :func:`~pyro_vae.runs.settings.make_job`.
        signals: entered; the first one that comes in training ends it after a step, whose checkpoint is written.

    Returns:
        The run folder.

    Raises:
        SettingError, DataError: settings that do not suit one another or the data; or data that are missing or damaged.
        CheckpointError: the folder holds something else, or cannot be written; or a checkpoint cannot be read.
        NonFiniteError: loss or gradient became NaN or infinite.
        RunStoppedError: a signal came in training.
    """
    with processes.group(job.options.place) as device:
        if job.run.compile == "always" and (device != "cpu" or processes.count() > 1):
            raise SettingError("compile", "always is only for one process on the CPU. Use auto.")
        _check_folder(job)
        train, test, warning = load_splits(job.run, job.settings, job.options.data_dir)
        _warn_loudly(warning)
        set_threads(train)
        settings, vae = _build(job, train, device)
        train, test = (_as_taken(job, part, vae) for part in (train, test))
        run = _open(job, settings, vae, train, test, device)
        provenance = _provenance(run)
        board = TensorBoard(run.folder / "tensorboard") if job.options.tensorboard and _is_first() else None
        if _is_first():
            _begin(run, provenance)
        history = _fit(run, board, signals)
        vae.eval()
        figures = evaluate(vae, test, importance_samples=job.options.importance_samples, seed=job.run.seed)
        if _is_first():
            _write_figures(run, history, figures, provenance)
            _write_pictures(run, history, board)
            _warn_loudly(warning)
            print(f"trained in {_seconds(history):.0f} s; everything is in {run.folder}")
        return run.folder


def _is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return processes.rank() == 0


def _check_folder(job: Job) -> None:
    """Before anything is loaded or computed."""
    out, resume = job.options.out, job.options.resume
    if resume is None:
        processes.first(lambda: check_new_run(out, overwrite=job.options.overwrite))
    else:
        processes.first(lambda: reopen_run(resume))


def _warn_loudly(message: str) -> None:
    if message and _is_first():
        line = "!" * 100
        print(f"{line}\n{message}\n{line}", file=sys.stderr, flush=True)


def _build(job: Job, train: Data, device: str) -> tuple[Settings, VAE]:
    """The settings, fitted to the data, and a new VAE that takes them."""
    settings = job.settings
    torch.manual_seed(job.run.seed)
    try:
        if job.run.data is not None and job.options.resume is None:
            settings, choice = _fitted(job, train)
            if _is_first():
                print(f"{job.run.data}: {choice}", flush=True)
        moments = train.moments() if settings.likelihood in ("learned-normal", "poisson") else None
        vae = settings.build_vae(train.event_shape, moments=moments).to(device)
    except RuntimeError as error:  # torch's answer to a model larger than the memory
        raise DataError(
            f"the model cannot be built ({str(error).strip()}). Choose smaller --hidden or --latent-dim."
        ) from error
    except SettingError:
        raise
    except ValueError as error:
        raise DataError(f"the model cannot be built: {error}") from error
    return settings, vae


def _as_taken(job: Job, data: Data, vae: VAE) -> Data:
    """The data with batches of the type that the VAE takes, once its likelihood is found to be defined for them."""
    data = data.to("cpu", vae.example().dtype)
    try:
        data.check(vae.check)
    except ValueError as error:
        raise DataError(f"{job.run.data or data.name}: {error}") from error
    return data


def _fitted(job: Job, train: Data) -> tuple[Settings, str]:
    """Settings that suit your own data where nothing else was asked for, and what they are."""
    settings, asked = job.settings, job.asked
    changes: dict[str, Any] = {}
    reason = "as asked for"
    if not {"likelihood", "preset"} & asked:
        changes["likelihood"], reason = fitting_likelihood(train)
    if "latent_dim" not in asked and settings.net != "conv":
        changes["latent_dim"] = min(settings.latent_dim, max(2, train.event_shape.numel() // 2))
    if settings.epochs is not None and "epochs" not in asked:
        changes["epochs"] = max(settings.epochs, FEWEST_STEPS * settings.batch_size // len(train))
    settings = replace(settings, **changes)
    if "preset" not in asked:
        settings = replace(settings, preset=f"{settings.likelihood}-z{settings.latent_dim}")
    length = f"{settings.steps:,} steps" if settings.epochs is None else f"{settings.epochs:,} epochs"
    latents = f"{settings.latent_dim} latent dimensions"
    return settings, f"{train.note}; likelihood {settings.likelihood} ({reason}); {latents}; {length}"


def _of_columns(settings: Settings, train: Data) -> str:
    """What to say of the columns of a table that the density of these settings does not suit."""
    normal = settings.likelihood in ("normal", "learned-normal") and len(train.event_shape) == 1
    return caution_of_columns(train.x, train.columns) if normal else ""


def _open(job: Job, settings: Settings, vae: VAE, train: Data, test: Data, device: str) -> _Run:
    """A new folder, or that of the run to go on with and its last checkpoint."""
    options, name = job.options, f"{settings.preset}-{train.name}"
    if options.resume is None:
        folder = processes.first(lambda: new_run(options.out, name=name, overwrite=options.overwrite))
        return _Run(job, settings, vae, train, test, device, folder, None)
    checkpoint = Checkpoints(options.resume / "checkpoints").load()
    if checkpoint is None and _is_first() and (options.resume / "metrics.jsonl").is_file():
        message = f"{options.resume}: there is no checkpoint, so the run begins anew, with the same settings."
        warnings.warn(message, stacklevel=1)
    return _Run(job, settings, vae, train, test, device, options.resume, checkpoint)


def _provenance(run: _Run) -> dict[str, Any]:
    """Where the figures come from."""
    job = run.job
    return {
        **asdict(job.run),
        "dataset": run.train.name,
        "requested_dataset": job.requested_dataset,
        "data_note": run.train.note,
        "columns": list(run.train.columns),
        "binary": run.train.is_binary,
        "discrete_columns": _of_columns(run.settings, run.train),
        "test_identity": None if job.run.data is None else identity(run.test),
        "device": run.device,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "versions": {
            "pyro_vae": pyro_vae.__version__,
            "pyro-ppl": pyro.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _begin(run: _Run, provenance: Mapping[str, Any]) -> None:
    """Write what is known before training, and say it."""
    settings, train, folder, checkpoint = run.settings, run.train, run.folder, run.checkpoint
    write_config(folder, settings, event_shape=tuple(train.event_shape), **provenance)
    write_jsonl(folder / "metrics.jsonl", checkpoint["progress"]["history"] if checkpoint else [])
    size = sum(p.numel() for p in run.vae.parameters())
    print(f"{settings.preset} on {train.name}: {len(train):,} training and {len(run.test):,} test {train.kind}", end=" ")
    print(f"of shape {tuple(train.event_shape)}, binarization {settings.binarization}", end="; ")
    print(f"{size:,} parameters; {run.device}, {torch.get_num_threads()} threads", end="")
    print(f" in each of {processes.count()} processes" if processes.count() > 1 else "")
    if columns := provenance["discrete_columns"]:
        print(f"caution: {columns}")
    if isinstance(run.vae.likelihood, NormalLikelihood):
        constant = run.vae.likelihood.constant(train.event_shape)
        print(f"rec and -ELBO include the normal density's constant {constant:.2f}; squared error + kl leaves it out")
    print(f"run folder: {folder}", end="")
    if run.job.options.resume is not None:
        step = f"going on after step {checkpoint['progress']['step']:,}" if checkpoint else "without a checkpoint yet"
        print(f", {step}", end="")
    print(flush=True)


def _fit(run: _Run, board: TensorBoard | None, signals: Signals) -> list[TrainingRecord]:
    """The training; each record is a line of metrics.jsonl, and what the model has learned until then is kept."""
    job, folder = run.job, run.folder

    def on_record(record: TrainingRecord) -> None:
        if board is not None:
            board.record(record)
        if _is_first():
            append_jsonl(folder / "metrics.jsonl", record.to_json())
            save_weights(folder, run.vae, durable=False)

    try:
        with signals.awaited():
            history = fit(
                run.settings.build_objective(run.vae),
                run.train,
                seed=job.run.seed,
                test=run.test,
                on_record=on_record,
                compile=COMPILE[job.run.compile],
                precision=job.run.precision,
                clip_grad_norm=job.run.clip_grad_norm,
                checkpoints=Checkpoints(folder / "checkpoints"),
                checkpoint_every=job.options.checkpoint_every,
                resume=run.checkpoint,
                stop=signals.came,
                **run.settings.training(),
            )
    except NonFiniteError:
        if _is_first():
            save_weights(folder, run.vae)
        raise
    except TrainingStoppedError as stopped:
        raise RunStoppedError(str(stopped), folder) from None
    if signals.came():
        raise RunStoppedError("stopped after the last step", folder)
    return history


def _seconds(history: list[TrainingRecord]) -> float:
    return sum(record.timing["seconds"] + record.timing.get("compile_seconds", 0) for record in history)


def _write_figures(
    run: _Run, history: list[TrainingRecord], figures: Mapping[str, Estimate], provenance: Mapping[str, Any]
) -> None:
    """The final weights, metrics.json and latents.json."""
    save_weights(run.folder, run.vae)
    metrics = {
        "preset": run.settings.preset,
        "binarization": run.settings.binarization,
        **provenance,
        "seconds": _seconds(history),
        "images_per_second": sum(record.timing["observations_per_second"] for record in history) / len(history),
        "train": history[-1].train,
        "test": {name: asdict(estimate) for name, estimate in figures.items()},
    }
    write_json(run.folder / "metrics.json", metrics)
    write_json(run.folder / "latents.json", latent.latent_record(run.vae, run.test.to(run.device)))
    for name, estimate in figures.items():
        print(f"test {name:15s} {estimate.value:9.3f} ± {estimate.standard_error:.3f} nats")


def _write_pictures(run: _Run, history: list[TrainingRecord], board: TensorBoard | None) -> None:
    """To figures/, and to TensorBoard if it is asked for."""
    train, test = run.train.to(run.device), run.test.to(run.device)
    if run.job.options.figures:
        torch.manual_seed(run.job.run.seed)
        for name, figure in run_figures(run.vae, train, test, history, run.settings):
            figure.savefig(run.folder / "figures" / f"{name}.png")
            if board is not None:
                board.figure(name, figure)
    if board is not None:
        board.embedding(run.vae, test)
        board.close()
