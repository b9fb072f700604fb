"""Evaluation of an existing run, on its own test set or on other data."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pyro_vae._checks import whole_number
from pyro_vae._files import CheckpointError
from pyro_vae._options import described, option
from pyro_vae.data.dataset import Data, DataError
from pyro_vae.data.own import read_data
from pyro_vae.estimates.evaluate import evaluate
from pyro_vae.estimates.records import Estimate
from pyro_vae.runs.folder import lock_run, read_settings, write_json
from pyro_vae.runs.load import load_run
from pyro_vae.runs.presets import Settings
from pyro_vae.runs.settings import MeasureOptions, RunSettings
from pyro_vae.runs.splits import PIXELS, load_splits, set_threads
from pyro_vae.training.state import identity

__all__ = ["EvaluateOptions", "evaluate_run", "keep_metrics"]


@described
@dataclass(frozen=True)
class EvaluateOptions(MeasureOptions):
    """What is measured, and by how many draws."""

    num_samples: int = option(10, help="draws per observation for -ELBO and its terms, at least 2")
    images: int | None = option(None, help="only the first so many observations", default_text="all")
    data: str | None = option(
        None,
        help="other data, of the shape of the run's: a folder of images, a .npy, .npz or .csv file",
        metavar="PATH",
        default_text="the run's test set",
    )
    seed: int | None = option(None, help="of the draws", default_text="the run's")

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("num_samples", self.num_samples, minimum=2)
        if self.images is not None:
            whole_number("images", self.images)
        if self.seed is not None:
            whole_number("seed", self.seed, minimum=0)


def evaluate_run(folder: Path, options: EvaluateOptions) -> tuple[str, dict[str, Estimate]]:
    """Evaluate a run; :func:`keep_metrics` writes what it returns. The run's folder is locked.

    Returns:
        What the metrics are of, ``"test"`` for those of the whole test set; and the metrics by name.

    Raises:
        CheckpointError: no run there, a damaged one, or one that another process writes to.
        DataError: data that are missing, do not suit the model, or are no longer those of the run.
    """
    again = f"Measure it from Python: evaluate(load_run({str(folder)!r}, model=...), data)."
    settings, _, config = read_settings(folder, remedy=again)
    run = RunSettings.of_config(folder, config)
    lock_run(folder)
    model = load_run(folder, device=options.place)
    if options.data is None:
        _, data, _ = load_splits(run, settings, options.data_dir)
        what, expected = "test", config.get("test_identity")
        if expected is not None and identity(data) != expected:
            raise DataError(
                f"{run.data or data.name}: the test data are no longer those of {folder}. Name what to measure by --data."
            )
    else:
        data, what = _other_data(options.data, run, settings, config), str(Path(options.data).expanduser().resolve())
    if options.images is not None and options.images < len(data):
        data = data.subset(slice(options.images))
        what = f"the first {options.images:,} of {what}"
    set_threads(data)
    seed = run.seed if options.seed is None else options.seed
    try:
        metrics = evaluate(
            model, data, num_samples=options.num_samples, importance_samples=options.importance_samples, seed=seed
        )
    except ValueError as error:
        raise DataError(f"{options.data or data.name}: {error}") from error
    return what, metrics


def _other_data(path: str, run: RunSettings, settings: Settings, config: Mapping[str, Any]) -> Data:
    """All observations of a file or folder, read in the same way as the data of the run."""
    size, event_shape = settings.image_size, config["event_shape"]
    if size is None and Path(path).expanduser().is_dir() and event_shape[-1] == event_shape[-2:][0]:
        size = event_shape[-1]
    data = read_data(path, image_size=size, pixels=PIXELS[run.pixels])
    if (names := config.get("columns")) and data.columns and list(data.columns) != names:
        raise DataError(
            f"{path}: expected the columns of the run, {', '.join(names)}, in this order, found {', '.join(data.columns)}."
        )
    return replace(data, binarization=settings.binarization)


def keep_metrics(folder: Path, what: str, metrics: dict[str, Estimate]) -> bool:
    """Add metrics of :func:`evaluate_run` to the run's ``metrics.json``; False if it has none.

    Those of the whole test set go to ``"test"``, in place of those of the same name; others to ``"evaluations"``, by what
    they are of. Nothing else is changed. An unfinished run has no ``metrics.json``, and none is written.

    Raises:
        CheckpointError: the file is damaged, or cannot be written.

    Warns:
        UserWarning: the run is unfinished.
    """
    path = folder / "metrics.json"
    if not path.exists():
        warnings.warn(f"{folder}: this run is unfinished, so no metrics are written. Resume it with --resume.", stacklevel=2)
        return False
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        kept = content if what == "test" else content.setdefault("evaluations", {})
        kept[what] = {**kept.get(what, {}), **{name: asdict(metric) for name, metric in metrics.items()}}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged, no metrics of a run ({error}). Move it away, or train again.") from error
    write_json(path, content)
    return True
