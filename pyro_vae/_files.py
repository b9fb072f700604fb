"""Atomic writes: a file is either complete or absent.

A file is written under a temporary name in the same folder, flushed to the disk (fsync) and renamed; then the folder is
flushed. A file of tensors is the zip archive that ``torch.save`` writes, with tensors and plain values alone. On reading,
the CRC-32 of every member is verified, which torch does not do, and no code in it is run (``weights_only=True``).
"""

import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["CheckpointError", "atomic_write", "check_writable", "read_json", "read_tensors", "write_tensors"]


class CheckpointError(ValueError):
    """A file or folder of a run that cannot be written or read; the message names it and the remedy."""


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Write a file atomically: a temporary file replaces ``path`` at the end, or is deleted if an error occurs.

    Args:
        path: of the file.
        durable: wait until the file is on the disk, so that it survives a power failure; takes about 20 ms.

    Raises:
        CheckpointError: the file cannot be written. A previous file at ``path`` is unchanged.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder. Name a file.")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        if durable and os.name == "posix":  # Windows cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: raised by torch when the stream that it writes to fails
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be written ({reason}). What stood there before still does. "
            "Make room, mend the folder's rights, or name another."
        ) from error
    finally:
        with suppress(OSError):  # on a disk that cannot be written even a file that is not there cannot be removed
            temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, or to its nearest existing parent, by a temporary file.

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
        raise CheckpointError(
            f"{folder}: cannot be written to ({error.strerror}). Free some disk space, or name another folder."
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Restore it, or train again.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, not JSON ({error}). Restore it, or train again.") from error


def write_tensors(path: Path, content: dict[str, Any], *, durable: bool = True) -> None:
    """Write a dict of tensors and plain values by :func:`torch.save`, as a :func:`atomic_write`."""
    with atomic_write(path, durable=durable) as stream:
        torch.save(content, stream)


def read_tensors(path: Path, *, remedy: str = "") -> Any:
    """Load a file of :func:`write_tensors`, its tensors on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged; the message ends with the remedy.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path}: damaged (the CRC of {damaged} is wrong). {remedy}".strip())
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and torch.load raise a dozen types of error for damaged files
        if isinstance(error, OSError) and error.strerror:
            reason = f"cannot be read ({error.strerror})"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "contains objects other than tensors and plain values, and code in a file is not run"
        else:
            reason = f"damaged, or not a file of torch.save ({type(error).__name__})"
        raise CheckpointError(f"{path}: {reason}. {remedy}".strip()) from error
