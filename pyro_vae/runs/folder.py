"""A run is a folder: config.json, metrics.jsonl (a line per record), metrics.json, latents.json, checkpoints/, figures/.

JSON files and parameters are written atomically. Only one process at a time writes to a folder.
"""

import io
import json
import shutil
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from torch import nn

from pyro_vae._checks import shape
from pyro_vae._files import CheckpointError, atomic_write, check_writable, write_tensors
from pyro_vae.runs.presets import Settings
from pyro_vae.training.records import TrainingRecord
from pyro_vae.training.state import processor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "append_jsonl",
    "check_new_run",
    "is_run",
    "lock_run",
    "new_run",
    "processor",
    "read_config",
    "read_records",
    "read_settings",
    "reopen_run",
    "save_figure",
    "save_weights",
    "withdraw_run",
    "write_config",
    "write_json",
    "write_jsonl",
]

_FORMAT = 1
CONFIG = "config.json"
WEIGHTS = Path("checkpoints", "weights.pt")
_PARTS = (CONFIG, "metrics.jsonl", "metrics.json", "latents.json", "checkpoints", "figures", "tensorboard", "report.html")


_LOCK = ".lock"


def lock_run(folder: Path) -> None:
    """Lock a folder against other processes until the end of this one.

    Raises:
        CheckpointError: another process has locked it, or it cannot be written.
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
    """Lock the folder of a run to resume, and create missing subfolders, before anything is written.

    Raises:
        CheckpointError: another process has locked it, or it cannot be written.
    """
    lock_run(folder)
    for part in ("checkpoints", "figures"):
        try:
            (folder / part).mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder / part}: cannot be made ({error.strerror}). Move away what is there.") from error
    check_writable(folder / "checkpoints")


def check_new_run(folder: str | Path | None, *, overwrite: bool = False) -> None:
    """Raise the errors of :func:`new_run` before anything is loaded or computed, and check that files can be written."""
    path = Path("runs" if folder is None else folder)
    if folder is not None and path.is_dir():
        _check_empty(path, overwrite)
    check_writable(path)


def new_run(folder: str | Path | None, *, name: str, overwrite: bool = False) -> Path:
    """Create the folder of a new run, and lock it (see :func:`lock_run`).

    Args:
        folder: default: a new ``runs/<name>-<date>-<time>`` in the working directory.
        name: of the run.
        overwrite: delete the files of an earlier run in the folder; other files are not deleted.

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
        raise CheckpointError(
            f"{path}: not empty. Name a new folder, or pass --overwrite (in Python overwrite=True) to replace the run it "
            "holds."
        )
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path}: not empty, and no earlier run (no {CONFIG}), so it is left alone. Name another.")


def _is_left_by_a_start(part: Path) -> bool:
    """Whether a file or folder may be left by a run that was killed before its config was written."""
    if part.is_dir():
        return part.name in ("checkpoints", "figures") and not any(part.iterdir())
    return part.name in (_LOCK, f".{CONFIG}.tmp")


def _clear(path: Path) -> None:
    for part in _PARTS:
        if (path / part).is_dir():
            shutil.rmtree(path / part)
        else:
            (path / part).unlink(missing_ok=True)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, finished or not."""
    return (folder / CONFIG).is_file()


def withdraw_run(folder: Path, earlier: bytes | None) -> None:
    """Restore the folder of a run that failed before its first step.

    Args:
        folder: of the run.
        earlier: the previous config of a run to resume, which is restored; None: a new run, whose folder can then be used
            again.
    """
    records = folder / "metrics.jsonl"
    if earlier is not None:
        with atomic_write(folder / CONFIG) as stream:
            stream.write(earlier)
    elif not any((folder / "checkpoints").iterdir()) and not (records.is_file() and records.stat().st_size):
        for part in (folder / CONFIG, records):
            part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write a file of JSON lines atomically."""
    with atomic_write(path) as stream:
        stream.writelines((json.dumps(record) + "\n").encode() for record in records)


def append_jsonl(path: Path, record: Any) -> None:
    """Append a line to a file of JSON lines."""
    try:
        with path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}). Make room, or mend the file's rights."
        ) from error


def read_records(path: Path) -> list[TrainingRecord]:
    """The records of a metrics.jsonl, also in the format of earlier versions; none if the file does not exist.

    Raises:
        CheckpointError: the file cannot be read, or its lines are no records.
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


def write_config(run: Path, settings: Settings | None, *, event_shape: tuple[int, ...], **provenance: Any) -> None:
    """Write ``config.json``: the settings from which ``load_run`` rebuilds the model, and the provenance of the run.

    Args:
        run: folder.
        settings: of the model; None for a model without settings, for which ``provenance`` has ``model``, a description, and
            ``batch``, shape and dtype of its arguments by name.
        event_shape: shape of one observation.
        provenance: further entries, plain values.
    """
    described = {} if settings is None else asdict(settings)
    write_json(run / CONFIG, {"format": _FORMAT, **described, "event_shape": list(event_shape), **provenance})


def save_weights(run: Path, model: nn.Module, name: str = "weights", *, durable: bool = True) -> None:
    """Write the parameters and buffers, replacing a file of the same name; ``load_run`` reads that of the default name.

    Args:
        durable: wait until they are on the disk, so that they survive a power failure.
    """
    write_tensors(run / WEIGHTS.with_stem(name), model.state_dict(), durable=durable)


def save_figure(run: Path, name: str, figure: "Figure") -> None:
    """Write a figure to ``figures/``, atomically."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with atomic_write(run / "figures" / f"{name}.png", durable=False) as stream:
        stream.write(picture.getbuffer())


def read_settings(folder: Path, *, remedy: str) -> tuple[Settings, tuple[int, ...], dict[str, Any]]:
    """:func:`read_config` of a run with settings.

    Raises:
        CheckpointError: see :func:`read_config`; or the run has no settings (the message ends with the remedy).
    """
    settings, event_shape, config = read_config(folder)
    if settings is None:
        raise CheckpointError(f"{folder}: the model of this run ({config['model']}) is not described by settings. {remedy}")
    return settings, event_shape, config


def read_config(folder: Path) -> tuple[Settings | None, tuple[int, ...], dict[str, Any]]:
    """Read a file of :func:`write_config`: the settings, the shape of an observation, and the whole content.

    Raises:
        CheckpointError: the file is missing or damaged, or its settings are invalid.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path}: missing. A run folder is what scripts/svi_mnist.py or train_run leaves behind.")
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, found {type(config).__name__}")
        if config.get("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}, found {config.get('format')!r}")
        described = "model" not in config  # by settings
        names = [field.name for field in fields(Settings) if field.name in config]
        needed = [field.name for field in fields(Settings) if field.default is MISSING and described]
        if missing := [name for name in (*needed, "event_shape") if name not in config]:
            raise ValueError(f"no entry {', '.join(missing)}")
        settings = Settings(**{name: config[name] for name in names}) if described else None
        return settings, shape("event_shape", config["event_shape"]), config
    except (OSError, ValueError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{path}: not the config of a run: {error}") from error
