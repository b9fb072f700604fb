"""SIGINT and SIGTERM: the first lets a step be finished and saved, the second ends the process at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["SignalledError", "Signals"]


class SignalledError(KeyboardInterrupt):
    """A SIGINT or SIGTERM that came when there was nothing to be finished."""


class Signals:
    """Handles SIGINT and SIGTERM while it is entered; then the handlers from before are back.

    Attributes:
        number: of the first signal that came; None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._awaited = False

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)  # the second: whatever hangs may hang
        self.number = number
        if not self._awaited:
            raise SignalledError

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within, a signal does nothing but make :meth:`came` true."""
        self._awaited = True
        try:
            yield
        finally:
            self._awaited = False

    def came(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number is not None else ""
