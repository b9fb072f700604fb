"""A run is a folder: config.json, metrics.jsonl (a line per epoch), metrics.json, checkpoints/, figures/.

JSON files and weights are written whole or not at all.
"""

import json
import os
import shutil
from dataclasses import MISSING, asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from pyro_vae.autoencoder import Autoencoder
from pyro_vae.checks import shape, usable_device
from pyro_vae.presets import Settings
from pyro_vae.vae import VAE

__all__ = [
    "CheckpointError",
    "append_jsonl",
    "load_run",
    "load_weights",
    "new_run",
    "save_weights",
    "write_config",
    "write_json",
]

_FORMAT = 1
_CONFIG = "config.json"
_WEIGHTS = Path("checkpoints", "weights.pt")
_PARTS = (_CONFIG, "metrics.jsonl", "metrics.json", "checkpoints", "figures")


class CheckpointError(ValueError):
    """A run folder that cannot be written or read; the message names the file and what to do."""


def new_run(folder: str | Path | None, *, name: str, overwrite: bool = False) -> Path:
    """Make the folder of a new run.

    Args:
        folder: where; default: ``runs/<name>-<date>-<time>`` under the working directory, never one that exists.
        name: of the run.
        overwrite: empty a folder that holds an earlier run; anything else in it stays.

    Raises:
        CheckpointError: the folder is not empty, or cannot be written.
    """
    try:
        if folder is None:
            stem = Path("runs", f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
            path, count = stem, 1
            while True:
                try:
                    path.mkdir(parents=True)
                    break
                except FileExistsError:
                    count += 1
                    path = stem.with_name(f"{stem.name}-{count}")
        else:
            path = Path(folder)
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                _clear(path, overwrite)
        for part in ("checkpoints", "figures"):
            (path / part).mkdir()
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: the run's folder cannot be made ({error.strerror}). Name another."
        ) from error
    return path


def _clear(path: Path, overwrite: bool) -> None:
    if not overwrite:
        raise CheckpointError(f"{path}: not empty. Name a new folder, or pass --overwrite to replace the run it holds.")
    if not (path / _CONFIG).is_file():
        raise CheckpointError(f"{path}: not empty, and no earlier run (no {_CONFIG}), so it is left alone. Name another.")
    for part in _PARTS:
        if (path / part).is_dir():
            shutil.rmtree(path / part)
        else:
            (path / part).unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def append_jsonl(path: Path, record: Any) -> None:
    """Add one line to a file of JSON lines."""
    with path.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def write_config(run: Path, settings: Settings, *, event_shape: tuple[int, ...], **provenance: Any) -> None:
    """Write ``config.json``: what :func:`load_run` needs to build the model again, and where it comes from."""
    config = {"format": _FORMAT, **asdict(settings), "event_shape": list(event_shape), **provenance}
    write_json(run / _CONFIG, config)


def save_weights(run: Path, model: VAE | Autoencoder, name: str = "weights") -> None:
    """Write the weights, in place of those of the same name: by default those that :func:`load_run` reads."""
    path = run / _WEIGHTS.with_stem(name)
    temporary = path.with_suffix(".tmp")
    torch.save(model.state_dict(), temporary)
    os.replace(temporary, path)


def load_weights(model: VAE | Autoencoder, path: Path, *, remedy: str = "Train again.") -> None:
    """Load weights that :func:`save_weights` has written into their model.

    Raises:
        CheckpointError: the file is damaged, or of another model; the message ends a damaged file's with the remedy.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load answers damage with half a dozen types of error
        raise CheckpointError(f"{path}: cannot be read as weights ({type(error).__name__}). {remedy}") from error
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not the weights of the model in {_CONFIG}: {reason}") from error


def load_run(folder: str | Path, *, device: torch.device | str = "cpu") -> VAE | Autoencoder:
    """The VAE, or the autoencoder, of a run folder, with the weights of its last finished epoch, in evaluation mode.

    Raises:
        CheckpointError: no run there, or a file of it that is damaged or does not fit the others.

    Example:
        >>> from pyro.infer import Predictive
        >>> vae = load_run("runs/demo")  # doctest: +SKIP
        >>> images = Predictive(vae.model, num_samples=16)(size=1)["x"]  # doctest: +SKIP
    """
    settings, event_shape = _read_config(Path(folder) / _CONFIG)
    path = Path(folder) / _WEIGHTS
    device = usable_device(device)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten: leave the caller's stream alone
        try:
            model = settings.build_model(event_shape)
        except (RuntimeError, ValueError) as error:  # RuntimeError: torch's answer to a model larger than the memory
            raise CheckpointError(f"{Path(folder) / _CONFIG}: the model cannot be built ({error}).") from error
    if not path.is_file():
        raise CheckpointError(f"{path}: missing: this run stopped before its first epoch ended. Train it again.")
    load_weights(model, path)
    return model.to(device).eval()


def _read_config(path: Path) -> tuple[Settings, tuple[int, ...]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing. A run folder is what scripts/svi_mnist.py leaves behind.")
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, found {type(config).__name__}")
        if config.get("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}, found {config.get('format')!r}")
        names = [field.name for field in fields(Settings) if field.name in config]
        needed = [field.name for field in fields(Settings) if field.default is MISSING]
        missing = [name for name in (*needed, "event_shape") if name not in config]
        if missing:
            raise ValueError(f"no entry {', '.join(missing)}")
        return Settings(**{name: config[name] for name in names}), shape("event_shape", config["event_shape"])
    except (OSError, ValueError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{path}: not the config of a run: {error}") from error
