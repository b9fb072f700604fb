"""Checkpoints: the whole state of a training run in a file, written whole or not at all, verified when it is read.

A file is a zip as ``torch.save`` writes it, of tensors and plain values alone. It is written under another name in the same
folder, flushed to the disk, renamed, and the folder flushed. When it is read, the CRC-32 of every member is verified, which
torch does not do, and no code in it is run (``weights_only=True``).
"""

import os
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["CheckpointError", "Checkpoints", "DamagedCheckpointWarning", "read_tensors", "whole_file", "write_tensors"]

FORMAT = 1
_KEPT = 2
_NAME = re.compile(r"step-(\d+)\.pt")


class CheckpointError(ValueError):
    """A file or folder of a run that cannot be written or read; the message names it and what to do."""


class _NewerFormatError(CheckpointError):
    """A checkpoint of a later version of this package, which is no reason to go back to an earlier one."""


class DamagedCheckpointWarning(UserWarning):
    """A damaged checkpoint, in whose place an earlier one is used."""


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of ``path`` when all of it is written, and is gone where that fails.

    Args:
        path: of the file.
        durable: wait until it is on the disk, safe from a loss of power: some 20 ms.

    Raises:
        CheckpointError: it cannot be written; what stood at ``path`` still does.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        if durable and os.name == "posix":  # elsewhere a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's words for an error of the stream it writes to
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be written ({reason}). What stood there before still does. "
            "Make room, or mend the folder's rights."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Try whether files can be written to a folder, or where it is to be made; nothing stays behind.

    Raises:
        CheckpointError: they cannot.
    """
    place = folder
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            stream.write(b"0" * 4096)
            stream.flush()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to ({error.strerror}). Make room, or name another.") from error


def write_tensors(path: Path, content: dict[str, Any], *, durable: bool = True) -> None:
    """Write a dict of tensors and plain values by :func:`torch.save`, as a :func:`whole_file`."""
    with whole_file(path, durable=durable) as stream:
        torch.save(content, stream)


def read_tensors(path: Path, *, remedy: str = "") -> Any:
    """What :func:`write_tensors` has written, on the CPU.

    Raises:
        CheckpointError: missing, or damaged in whatever way; the message ends with the remedy.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path}: damaged (the CRC of {damaged} is wrong). {remedy}".strip())
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and torch.load answer damage with a dozen types of error
        if isinstance(error, OSError) and error.strerror:
            reason = f"cannot be read ({error.strerror})"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "holds more than tensors and plain values, and code in a file is not run"
        else:
            reason = f"damaged, or no file of torch.save ({type(error).__name__})"
        raise CheckpointError(f"{path}: {reason}. {remedy}".strip()) from error


class Checkpoints:
    """The checkpoints of a run in a folder: the last two, ``step-<number>.pt``, and ``best.pt``.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def paths(self) -> list[Path]:
        """Of the last ones, the newest first."""
        found = [(int(match[1]), path) for path in self.folder.glob("step-*.pt") if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Write the checkpoint of that step, and remove what is older than the last two, or of a later step (given up).

        Raises:
            CheckpointError: it cannot be written; earlier ones are still there.
        """
        path = self.folder / f"step-{step:09d}.pt"
        self._write(path, content)
        paths = self.paths()
        place = paths.index(path)
        for old in (*paths[:place], *paths[place + _KEPT :]):
            old.unlink(missing_ok=True)

    def save_best(self, content: dict[str, Any]) -> None:
        """Write ``best.pt``."""
        self._write(self.folder / "best.pt", content)

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be made ({error.strerror}). Name another folder.") from error
        write_tensors(path, {"format": FORMAT, **content})

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole; None if the folder holds none.

        Raises:
            CheckpointError: there are some, none of which can be read; or the newest is of a newer format.

        Warns:
            DamagedCheckpointWarning: the newest is damaged, and the one before it is used.
        """
        problems = []
        for path in self.paths():
            try:
                content = _content(path)
            except _NewerFormatError:
                raise
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if problems:
                warnings.warn(
                    f"{' '.join(problems)} Going on from the one before it, {path}, instead.",
                    DamagedCheckpointWarning,
                    stacklevel=2,
                )
            return content
        if problems:
            raise CheckpointError(
                f"{' '.join(problems)} No checkpoint in {self.folder} can be read: train again from the start."
            )
        return None


def _content(path: Path) -> dict[str, Any]:
    content = read_tensors(path)
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: no checkpoint of pyro_vae (it has no format).")
    if version > FORMAT:
        raise _NewerFormatError(
            f"{path}: written by a newer pyro_vae (format {version}; this one reads up to {FORMAT}). Install that version."
        )
    return content
