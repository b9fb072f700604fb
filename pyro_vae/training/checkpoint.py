"""Checkpoints: the state of a training run, written atomically and verified when read."""

import re
import warnings
from pathlib import Path
from typing import Any

from pyro_vae._files import CheckpointError, read_tensors, write_tensors

__all__ = ["Checkpoints", "DamagedCheckpointWarning"]

FORMAT = 1
_KEPT = 2
_NAME = re.compile(r"step-(\d+)\.pt")


class _NewerFormatError(CheckpointError):
    """A checkpoint of a later version of this package; falling back to an earlier checkpoint would lose steps."""


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint is damaged, and the previous one is used instead."""


class Checkpoints:
    """The checkpoints of a run in a folder: the last two, ``step-<number>.pt``, and ``best.pt``.

    Args:
        folder: created if it does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def paths(self) -> list[Path]:
        """Paths of the ``step-*.pt`` files, newest first."""
        found = [(int(match[1]), path) for path in self.folder.glob("step-*.pt") if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Write the checkpoint of a step; then delete all but the last two, and those of later steps (an abandoned run).

        Raises:
            CheckpointError: the checkpoint cannot be written; earlier ones are unchanged.
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
        """The newest intact checkpoint; None if the folder has none.

        Raises:
            CheckpointError: none of the checkpoints can be read, or the newest has a newer format.

        Warns:
            DamagedCheckpointWarning: the newest is damaged, and the previous one is used.
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
                    f"{' '.join(problems)} Resuming from the previous one, {path}, instead.",
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
