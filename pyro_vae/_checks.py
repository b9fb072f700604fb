"""Validation of plain arguments: each function returns a valid value, and raises a :class:`SettingError` for any other."""

import math
import operator
import re
import sys
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch

__all__ = [
    "SettingError",
    "compile_choice",
    "few_values",
    "level_of_user",
    "number",
    "one_of",
    "shape",
    "usable_device",
    "whole_number",
]


class SettingError(ValueError):
    """An invalid value of a setting; the text of the error is ``name: message``.

    Attributes:
        name: of the setting, as in Python; the command line translates it to its own option.
        message: what was expected and what was found.
    """

    def __init__(self, name: str, message: str | None = None) -> None:
        # Both, so that it can be pickled. One alone is the whole text: so Pyro raises an error of a program again.
        super().__init__(name, message)
        self.name, self.message = ("", name) if message is None else (name, message)

    def __str__(self) -> str:
        return f"{self.name}: {self.message}" if self.name else self.message


def whole_number(name: str, value: Any, *, minimum: int = 1) -> int:
    """An int >= ``minimum``. NumPy's integers are accepted; bool and float are not."""
    try:
        number = operator.index(value)
    except TypeError:
        number = minimum - 1
    if isinstance(value, bool) or number < minimum:
        raise SettingError(name, f"expected a whole number >= {minimum}, found {value!r}.")
    if number >= 2**63:
        raise SettingError(name, f"expected a whole number below 2^63, found {number:.3g}.")
    return number


def number(name: str, value: Any, *, least: float = 0.0) -> float:
    """A positive, finite float >= ``least``. NumPy's numbers are accepted; bool is not."""
    try:
        result = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int too large for a float
        raise SettingError(name, f"expected a number below 1e308, found one of {len(str(value))} digits.") from None
    if not (0 < result < math.inf and result >= least):
        expected = f"finite number from {least:g} on" if least else "positive number"
        raise SettingError(name, f"expected a {expected}, found {value!r}.")
    return result


def shape(name: str, value: Any, *, empty: bool = False) -> tuple[int, ...]:
    """A tuple of whole numbers >= 1, from any iterable; an empty one only if ``empty``."""
    try:
        if not isinstance(value, Iterable) or isinstance(value, str):
            raise ValueError
        sizes = tuple(whole_number(name, size) for size in value)
        if not (sizes or empty):
            raise ValueError
    except ValueError:
        raise SettingError(name, f"expected whole numbers >= 1, such as (400, 200), found {value!r}.") from None
    return sizes


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless the value is one of the choices."""
    if value not in choices:
        raise SettingError(name, f"expected one of {', '.join(choices)}, found {value!r}.")


def compile_choice(value: Any, device: torch.device, processes: int = 1) -> bool | None:
    """True, False, or None for the default; True only on a CPU and in a single process."""
    if not isinstance(value, bool | None):
        raise SettingError("compile", f"expected True, False or None, found {value!r}.")
    if value and device.type != "cpu":
        raise SettingError("compile", f"expected device cpu, found {device}. Leave compile out to run there eagerly.")
    if value and processes > 1:
        raise SettingError("compile", f"expected None or False in a group of processes, found {value!r}.")
    return value


def usable_device(device: torch.device | str) -> torch.device:
    """The device, after a tensor was allocated on it."""
    try:
        result = torch.device(device)
        torch.empty(0, device=result)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise SettingError(
            "device", f"expected one that torch can use here, such as 'cpu', found {device!r} ({reason})."
        ) from error
    return result


def few_values(text: str) -> str:
    """An error message with each tensor in it, which torch prints in full, shortened to its first three numbers."""

    def cut(match: re.Match[str]) -> str:
        numbers = re.findall(r"[-+.\w]+", match[1])
        return match[0] if len(numbers) <= 4 else f"tensor({', '.join(numbers[:3])}, ...)"

    return re.sub(r"tensor\(([^()]*(?:\([^()]*\)[^()]*)*)\)", cut, text)


def level_of_user() -> int:
    """How many frames above the caller the first one stands that is not of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pyro_vae."):
        frame, level = frame.f_back, level + 1
    return level
