"""From settings to a run: its data, its model and its objective, which ``train_run`` trains."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pyro_vae import _processes as processes
from pyro_vae._checks import SettingError
from pyro_vae._files import CheckpointError
from pyro_vae.data.columns import caution_of_columns
from pyro_vae.data.dataset import Data, DataError
from pyro_vae.models.vae import VAE
from pyro_vae.runs.folder import check_new_run, read_config, reopen_run
from pyro_vae.runs.presets import Settings, fitting_likelihood
from pyro_vae.runs.settings import COMPILE, Job
from pyro_vae.runs.signals import Signals
from pyro_vae.runs.splits import load_splits, set_threads
from pyro_vae.runs.train import train_run
from pyro_vae.training.state import identity

__all__ = ["train_job"]

FEWEST_STEPS = 2000  # on your own data, by default: fewer leave the pictures blurred


def train_job(job: Job, signals: Signals) -> Path:
    """Load the data, build model and objective of the job, and train or resume the run.

    Args:
        job: see :func:`~pyro_vae.runs.settings.make_job`.
        signals: see :func:`~pyro_vae.runs.train.train_run`.

    Returns:
        The run folder.

    Raises:
        SettingError, DataError: settings do not match each other or the data; or the data are missing or damaged.
        CheckpointError, NonFiniteError, RunStoppedError: see :func:`~pyro_vae.runs.train.train_run`.
    """
    options = job.options
    with processes.group(options.place) as device:
        if job.run.compile == "always" and (device != "cpu" or processes.world_size() > 1):
            raise SettingError("compile", "always is only for one process on the CPU. Use auto.")
        _check_folder(job)
        train, test, warning = load_splits(job.run, job.settings, options.data_dir)
        _warn_loudly(warning)
        set_threads(train)
        settings, vae = _build(job, train, device)
        train, test = (_as_taken(job, part, vae) for part in (train, test))
        _check_same(job, test)
        about = {
            **asdict(job.run),
            "dataset": train.name,
            "requested_dataset": job.requested_dataset,
            "columns": list(train.columns),
            "binary": train.is_binary,
            "discrete_columns": _of_columns(settings, train),
            "test_identity": None if job.run.data is None else identity(test),
        }
        folder = train_run(
            options.out if options.resume is None else options.resume,
            settings.build_objective(vae),
            train,
            test=test,
            settings=settings,
            importance_samples=options.importance_samples,
            figures=options.figures,
            tensorboard=options.tensorboard,
            resume=options.resume is not None,
            overwrite=options.overwrite,
            about=about,
            signals=signals,
            seed=job.run.seed,
            compile=COMPILE[job.run.compile],
            precision=job.run.precision,
            clip_grad_norm=job.run.clip_grad_norm,
            checkpoint_every=options.checkpoint_every,
            device=device,
        )
        _warn_loudly(warning)
        return folder


def _check_folder(job: Job) -> None:
    """Check the run folder before anything is loaded or computed."""
    out, resume = job.options.out, job.options.resume
    if resume is None:
        processes.on_rank_zero(lambda: check_new_run(out, overwrite=job.options.overwrite))
    else:
        processes.on_rank_zero(lambda: reopen_run(resume))


def _warn_loudly(message: str) -> None:
    if message and processes.rank() == 0:
        line = "!" * 100
        print(f"{line}\n{message}\n{line}", file=sys.stderr, flush=True)


def _build(job: Job, train: Data, device: str) -> tuple[Settings, VAE]:
    """The settings, adapted to the data, and a new VAE."""
    settings = job.settings
    torch.manual_seed(job.run.seed)
    try:
        if job.run.data is not None and job.options.resume is None:
            settings, choice = _fitted(job, train)
            if processes.rank() == 0:
                print(f"{job.run.data}: {choice}", flush=True)
        moments = train.moments() if settings.uses_moments else None
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
    """The data with batches of the VAE's dtype, after a check that its likelihood is defined for them."""
    data = data.to("cpu", vae.example().dtype)
    try:
        data.check(vae.check)
    except ValueError as error:
        raise DataError(f"{job.run.data or data.name}: {error}") from error
    return data


def _check_same(job: Job, test: Data) -> None:
    """Whether the test data of a resumed run are unchanged: without a checkpoint nothing else is compared."""
    if job.options.resume is None or job.run.data is None:
        return
    _, _, config = read_config(job.options.resume)
    if (expected := config.get("test_identity")) not in (None, found := identity(test)):
        raise CheckpointError(
            f"{job.run.data}: not the data of {job.options.resume}: expected test data of {expected}, found {found}. Name "
            "where they are now by --data, or start a new run in another folder."
        )


def _fitted(job: Job, train: Data) -> tuple[Settings, str]:
    """Settings for your own data, chosen by the data unless given, and a description of them."""
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
    """A caution about columns of a table that have no density; empty if there are none."""
    normal = settings.likelihood in ("normal", "learned-normal") and len(train.event_shape) == 1
    return caution_of_columns(train.x, train.columns) if normal else ""
