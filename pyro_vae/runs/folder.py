"""A run is a folder: config.json, metrics.jsonl (a line per record), metrics.json, latents.json, checkpoints/, figures/.

JSON files and weights are written whole or not at all. One process at a time writes to a folder.
"""

import json
import platform
import shutil
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from pyro_vae._checks import shape, usable_device
from pyro_vae._files import CheckpointError, check_writable, read_tensors, whole_file, write_tensors
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.vae import VAE
from pyro_vae.runs.presets import Settings
from pyro_vae.training.records import TrainingRecord

__all__ = [
    "append_jsonl",
    "check_new_run",
    "load_run",
    "load_weights",
    "lock_run",
    "new_run",
    "processor",
    "read_config",
    "read_records",
    "reopen_run",
    "save_weights",
    "write_config",
    "write_json",
    "write_jsonl",
]

_FORMAT = 1
_CONFIG = "config.json"
_WEIGHTS = Path("checkpoints", "weights.pt")
_PARTS = (_CONFIG, "metrics.jsonl", "metrics.json", "latents.json", "checkpoints", "figures", "tensorboard", "report.html")


_LOCK = ".lock"


def lock_run(folder: Path) -> None:
    """Keep other processes from writing to a folder, for as long as this one lives.

    Raises:
        CheckpointError: another process does, or the folder cannot be written.
    """
    lock = _LOCKS.setdefault(folder.resolve(), FileLock(folder / _LOCK))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(
            f"{folder}: another process is writing to it. Wait until it has ended, or name another folder."
        ) from error
    except (OSError, NotImplementedError) as error:
        raise CheckpointError(f"{folder}: cannot be locked ({error}). Name a folder on another disk.") from error


_LOCKS: dict[Path, FileLock] = {}  # held to the end of the process


def reopen_run(folder: Path) -> None:
    """Lock the folder of a run that goes on, and make what is missing of its folders, before anything is written.

    Raises:
        CheckpointError: another process writes to it, or it cannot be written.
    """
    lock_run(folder)
    for part in ("checkpoints", "figures"):
        try:
            (folder / part).mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder / part}: cannot be made ({error.strerror}). Move away what is there.") from error
    check_writable(folder / "checkpoints")


def check_new_run(folder: str | Path | None, *, overwrite: bool = False) -> None:
    """Raise what :func:`new_run` would, before anything is loaded or computed, and try whether files can be written."""
    path = Path("runs" if folder is None else folder)
    if folder is not None and path.is_dir():
        _check_empty(path, overwrite)
    check_writable(path)


def new_run(folder: str | Path | None, *, name: str, overwrite: bool = False) -> Path:
    """Make the folder of a new run, and lock it (see :func:`lock_run`).

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
        lock_run(path)
        _check_empty(path, overwrite)
        _clear(path)
        for part in ("checkpoints", "figures"):
            (path / part).mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: the run's folder cannot be made ({error.strerror}). Name another."
        ) from error
    return path


def _check_empty(path: Path, overwrite: bool) -> None:
    if all(_is_left_by_a_start(part) for part in path.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{path}: not empty. Name a new folder, or pass --overwrite to replace the run it holds.")
    if not (path / _CONFIG).is_file():
        raise CheckpointError(f"{path}: not empty, and no earlier run (no {_CONFIG}), so it is left alone. Name another.")


def _is_left_by_a_start(part: Path) -> bool:
    """Whether it is no more than what a run that was killed before its config was written leaves behind."""
    if part.is_dir():
        return part.name in ("checkpoints", "figures") and not any(part.iterdir())
    return part.name in (_LOCK, f".{_CONFIG}.tmp")


def _clear(path: Path) -> None:
    for part in _PARTS:
        if (path / part).is_dir():
            shutil.rmtree(path / part)
        else:
            (path / part).unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write a file of JSON lines, whole or not at all."""
    with whole_file(path) as stream:
        stream.writelines((json.dumps(record) + "\n").encode() for record in records)


def append_jsonl(path: Path, record: Any) -> None:
    """Add one line to a file of JSON lines."""
    try:
        with path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}). Make room, or mend the file's rights."
        ) from error


def read_records(path: Path) -> list[TrainingRecord]:
    """The records of a metrics.jsonl, of an earlier version's too; none where there is no such file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    if not path.exists():
        return []
    try:
        lines = [*map(json.loads, path.read_text().splitlines())]
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, no JSON ({error}). Put it back, or train again.") from error
    try:
        return [*map(TrainingRecord.from_json, lines)]
    except ValueError as error:
        raise CheckpointError(f"{path}: no records of a run ({error}) Put it back, or train again.") from error


def processor() -> str:
    """The processor's name: figures differ in their last digits, and seconds in their first, from one to another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_config(run: Path, settings: Settings, *, event_shape: tuple[int, ...], **provenance: Any) -> None:
    """Write ``config.json``: what :func:`load_run` needs to build the model again, and where it comes from."""
    config = {"format": _FORMAT, **asdict(settings), "event_shape": list(event_shape), **provenance}
    write_json(run / _CONFIG, config)


def save_weights(run: Path, model: VAE | Autoencoder, name: str = "weights", *, durable: bool = True) -> None:
    """Write the weights, in place of those of the same name: by default those that :func:`load_run` reads.

    Args:
        durable: wait until they are on the disk, safe from a loss of power.
    """
    write_tensors(run / _WEIGHTS.with_stem(name), model.state_dict(), durable=durable)


def load_weights(model: VAE | Autoencoder, path: Path, *, remedy: str = "Train again.") -> None:
    """Load weights that :func:`save_weights` has written into their model.

    Raises:
        CheckpointError: the file is damaged, or of another model; the message ends a damaged file's with the remedy.
    """
    weights = read_tensors(path, remedy=remedy)
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
    settings, event_shape, _ = read_config(Path(folder))
    path = Path(folder) / _WEIGHTS
    device = usable_device(device)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten: leave the caller's stream alone
        try:
            model = settings.build_model(event_shape)
        except (RuntimeError, ValueError) as error:  # RuntimeError: torch's answer to a model larger than the memory
            raise CheckpointError(f"{Path(folder) / _CONFIG}: the model cannot be built ({error}).") from error
    if not path.is_file():
        raise CheckpointError(f"{path}: missing: this run was stopped before its first epoch ended. Go on with --resume.")
    load_weights(model, path)
    return model.to(device).eval()


def read_config(folder: Path) -> tuple[Settings, tuple[int, ...], dict[str, Any]]:
    """What :func:`write_config` has written: the settings, the shape of an observation, and all of it as it stands there.

    Raises:
        CheckpointError: missing, damaged, or no settings that a model can be built with.
    """
    path = folder / _CONFIG
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
        if missing := [name for name in (*needed, "event_shape") if name not in config]:
            raise ValueError(f"no entry {', '.join(missing)}")
        settings = Settings(**{name: config[name] for name in names})
        return settings, shape("event_shape", config["event_shape"]), config
    except (OSError, ValueError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{path}: not the config of a run: {error}") from error
