"""Settings of a run: of its model, of its data and training, and options of its execution."""

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from pyro_vae._checks import SettingError, number, whole_number
from pyro_vae._files import CheckpointError
from pyro_vae._options import check_choices, described, option
from pyro_vae.data.builtin import DATASETS
from pyro_vae.runs.folder import read_settings
from pyro_vae.runs.presets import PRESETS, Settings, load_preset
from pyro_vae.training.fit import PRECISIONS

__all__ = [
    "COMPILE",
    "VAES",
    "DataOptions",
    "FolderOptions",
    "Job",
    "MeasureOptions",
    "RunSettings",
    "TrainOptions",
    "make_job",
]

COMPILE = {"auto": None, "always": True, "never": False}
VAES = {name: settings for name, settings in PRESETS.items() if settings.likelihood != "none"}
_DEFAULT = "bernoulli-z20"
_MAY_GROW = ("epochs", "steps")


@described
@dataclass(frozen=True)
class RunSettings:
    """Settings of a run other than those of its model, saved in ``config.json`` and unchanged when the run is resumed.

    An invalid value raises a :class:`~pyro_vae._checks.SettingError` that names it.
    """

    dataset: str = option("auto", help="auto: mnist if available, else digits", choices=DATASETS)
    data: str | None = option(
        None,
        help="your own data, in place of --dataset: a folder of images, or of such folders for each label; a .npy, .npz or "
        ".csv file",
        metavar="PATH",
        default_text="--dataset",
    )
    test_data: str | None = option(
        None,
        help="your own test data",
        metavar="PATH",
        default_text="train/ and test/ in --data, x_test in a .npz file, else a tenth is held out",
    )
    pixels: str | None = option(
        None,
        help="whether uint8 in --data that is not an image is pixels; yes: scaled by 1/255; no: whole numbers, unscaled",
        choices=("yes", "no"),
        default_text="refuse to guess",
    )
    compile: str = option(
        "auto",
        help="trace and compile the training step; auto: if the run is long enough to pay for it",
        choices=tuple(COMPILE),
    )
    precision: str = option("highest", help="float32 precision of matrix products in training", choices=PRECISIONS)
    seed: int = option(0, help="seed of initial weights, data order and noise")
    clip_grad_norm: float | None = option(
        None,
        help="largest norm of the gradient, over all parameters together; a longer one is scaled down",
        default_text="no limit",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        whole_number("seed", self.seed, minimum=0)
        if self.clip_grad_norm is not None:
            number("clip_grad_norm", self.clip_grad_norm)
        for name in ("data", "test_data"):  # absolute, for a run that is resumed from another working directory
            if (path := getattr(self, name)) is not None:
                if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
                    raise SettingError(name, f"expected a path, found {path!r}.")
                try:
                    object.__setattr__(self, name, str(Path(path).expanduser().resolve()))
                except RuntimeError as error:  # of "~someone"
                    raise SettingError(name, f"expected a path, found {path!r} ({error})") from error

    @staticmethod
    def of_config(folder: Path, config: Mapping[str, Any]) -> "RunSettings":
        """The settings in a ``config.json``.

        Raises:
            CheckpointError: one is missing, or has a value that it cannot have; or train_run has written them, for data that
                only the program has that called it.
        """
        if not config.keys() & {"compile", "precision", "pixels"}:
            raise CheckpointError(
                f"{folder}: this run was made from Python by train_run, on data that its config does not describe. Measure "
                f"it there: evaluate(load_run({str(folder)!r}), data); or resume it: train_run({str(folder)!r}, "
                "objective, data, settings=settings, resume=True)."
            )
        own = config.get("data") is not None  # then the dataset's name there is that of the data
        names = [each.name for each in fields(RunSettings) if not (own and each.name == "dataset")]
        values: dict[str, Any] = {name: config.get(name) for name in names}
        try:
            return RunSettings(**values)
        except SettingError as error:
            raise CheckpointError(f"{folder / 'config.json'}: not the config of a run: {error}") from error


@described
@dataclass(frozen=True)
class DataOptions:
    """Where the data are."""

    data_dir: str | None = option(
        None, help="folder that holds MNIST/raw", default_text="$PYRO_VAE_DATA, else ~/.cache/pyro_vae"
    )


@described
@dataclass(frozen=True)
class FolderOptions:
    """The folder of a run, and its content."""

    out: Path | None = option(None, help="run folder", default_text="a new one, runs/NAME-DATE-TIME")
    overwrite: bool = option(False, help="replace the earlier run that --out holds", default_text="refuse")
    figures: bool = option(True, help="draw no figures", default_text="draw them")

    def to_json(self) -> dict[str, Any]:
        """As ``config.json`` keeps them."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


@described
@dataclass(frozen=True)
class MeasureOptions(DataOptions):
    """Device and number of draws of an evaluation."""

    device: str = option("auto", help="auto: cuda if available", choices=("auto", "cpu", "cuda"))
    importance_samples: int = option(100, help="draws per test image for log p(x) by importance sampling; 0: omit it")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SettingError("device", "torch sees no CUDA device here; use cpu, or install torch with CUDA.")
        if whole_number("importance_samples", self.importance_samples, minimum=0) == 1:
            raise SettingError("importance_samples", "expected 0 or at least 2, found 1.")

    @property
    def place(self) -> str:
        """The device."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device


@described
@dataclass(frozen=True)
class TrainOptions(FolderOptions, MeasureOptions):
    """Options of the execution of a run, which may change when it is resumed."""

    resume: Path | None = option(
        None,
        help="resume this run, with its settings; --epochs or --steps may be larger, and --data may give the new "
        "place of its data",
        metavar="FOLDER",
        default_text="a new run",
    )
    checkpoint_every: int | None = option(
        None,
        help="steps between checkpoints",
        metavar="STEPS",
        default_text="about every 10 seconds, for no more than 2 % of the time",
    )
    tensorboard: bool = option(
        False,
        help="write scalars, figures and the latent embedding to RUN/tensorboard; needs pip install tensorboard",
        default_text="do not",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_every is not None:
            whole_number("checkpoint_every", self.checkpoint_every)
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise SettingError("tensorboard", "the package is not installed; pip install tensorboard.")


@dataclass(frozen=True)
class Job:
    """A new run, or one to resume.

    Args:
        settings: of the model and its training.
        run: all other settings of the run.
        options: of its execution.
        asked: names of the settings that were given; with your own data, the others are chosen by the data.
        requested_dataset: the data set requested for the new run; None with your own data.
    """

    settings: Settings
    run: RunSettings
    options: TrainOptions
    asked: frozenset[str] = field(default_factory=frozenset)
    requested_dataset: str | None = None


def make_job(given: Mapping[str, Any]) -> Job:
    """The job of these options, by name, of :class:`Settings`, :class:`RunSettings` and :class:`TrainOptions`.

    Raises:
        SettingError: a value is invalid.
        CheckpointError: the folder to resume is not that of a run, or the run has other settings.

    Example:
        >>> job = make_job({"epochs": 3, "dataset": "digits"})
        >>> job.settings.epochs, job.run.seed
        (3, 0)
    """
    changes, run, options = (
        {each.name: given[each.name] for each in fields(cls) if each.name in given}
        for cls in (Settings, RunSettings, TrainOptions)
    )
    if "hidden" in changes:
        changes["hidden"] = tuple(changes["hidden"])
    run_settings, train_options = RunSettings(**run), TrainOptions(**options)
    asked = frozenset(changes)
    if train_options.resume is not None:
        asked_for = {**changes, **{name: getattr(run_settings, name) for name in run}}
        return _resumed(train_options.resume, asked_for, train_options)
    settings = load_preset(changes.pop("preset", _DEFAULT), **changes)
    dataset = run_settings.dataset if run_settings.data is None else None
    return Job(settings, run_settings, train_options, asked, dataset)


def _resumed(folder: Path, asked_for: Mapping[str, Any], options: TrainOptions) -> Job:
    """The run to resume; only its length and the place of its data may have changed. The data are compared later."""
    again = f"Resume it from Python: train_run({str(folder)!r}, objective, data, resume=True)."
    settings, _, config = read_settings(folder, remedy=again)
    differ, changes = [], {}
    moved = {name: asked_for[name] for name in ("data", "test_data") if name in asked_for and config.get("data") is not None}
    for name, asked in asked_for.items():
        saved = getattr(settings, name) if hasattr(settings, name) else config.get(name)
        if asked == saved or name in moved or (name == "dataset" and asked == config.get("requested_dataset")):
            continue
        if name in _MAY_GROW and saved is not None and asked > saved:
            changes[name] = asked
        else:
            differ.append(f"{name}: {saved} -> {asked}")
    if differ:
        raise CheckpointError(
            f"{folder}: this run has other settings (saved -> requested): {'; '.join(differ)}. Omit these options "
            "(--epochs or --steps may be larger), or start a new run in another folder."
        )
    run = replace(RunSettings.of_config(folder, config), **moved)
    return Job(replace(settings, **changes), run, options, frozenset(asked_for), config.get("requested_dataset"))
