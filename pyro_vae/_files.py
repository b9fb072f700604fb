"""Files that are whole or not there.

A file is written under another name in the same folder, flushed to the disk, renamed, and the folder flushed. A file of
tensors is a zip as ``torch.save`` writes it, of tensors and plain values alone. When it is read, the CRC-32 of every member
is verified, which torch does not do, and no code in it is run (``weights_only=True``).
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

__all__ = ["CheckpointError", "check_writable", "read_json", "read_tensors", "whole_file", "write_tensors"]


class CheckpointError(ValueError):
    """A file or folder of a run that cannot be written or read; the message names it and what to do."""


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of ``path`` when all of it is written, and is gone where that fails.

    Args:
        path: of the file.
        durable: wait until it is on the disk, safe from a loss of power: some 20 ms.

    Raises:
        CheckpointError: it cannot be written; what stood at ``path`` still does.
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
            "Make room, mend the folder's rights, or name another."
        ) from error
    finally:
        with suppress(OSError):  # on a disk that cannot be written even a file that is not there cannot be removed
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


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        CheckpointError: missing, or damaged.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Put it back, or train again.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, no JSON ({error}). Put it back, or train again.") from error


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
