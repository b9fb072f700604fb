"""SIGINT and SIGTERM: after the first the current step is completed and saved, the second ends the process immediately."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["SignalledError", "Signals"]


class SignalledError(KeyboardInterrupt):
    """A SIGINT or SIGTERM outside of training, where there is no step to complete."""


class Signals:
    """A context manager that handles SIGINT and SIGTERM, and restores the previous handlers at the end.

    Attributes:
        number: of the first signal received; None before.
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
            os._exit(128 + number)  # the second: immediately, even if something hangs
        self.number = number
        if not self._awaited:
            raise SignalledError

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within this context a signal only makes :meth:`came` true."""
        self._awaited = True
        try:
            yield
        finally:
            self._awaited = False

    def came(self) -> bool:
        """Whether a signal was received."""
        return self.number is not None

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number is not None else ""
