"""What a module is, apart from the values of its tensors: its class, its plain attributes, and those of its parts."""

import functools
import inspect
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from torch import nn

from pyro_vae.models.programs import ProgramPair

__all__ = ["description", "differences"]

_LONG = 200  # characters, beyond which plain values are told by their checksum


def description(part: Any) -> dict[str, str]:
    """Classes and plain attributes of a module and all that it is built of, by their path; the same in every process.

    Numbers, words and flags are attributes of modules, dataclasses and other callable objects, arguments of a
    ``functools.partial``, and what a function holds in its closure or has as defaults. A function itself is its qualified
    name. Left out are tensors, names that begin with an underscore, and devices.

    Args:
        part: a module or a callable.

    Example:
        >>> from pyro_vae import NormalLikelihood
        >>> description(NormalLikelihood(variance=0.01))
        {'class': 'NormalLikelihood', 'variance': '0.01', 'mean': "'sigmoid'"}
    """
    return {path or "class": text for path, text in _described(part, "", ())}


def differences(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is not as it was saved, ``path: saved -> now`` each; a part of another class is named without its attributes."""
    changed: dict[str, str] = {}
    for path, text in saved.items():
        if now.get(path) != text and not any(path.startswith(f"{other}.") for other in changed):
            changed[path] = f"{path}: {text} -> {now.get(path, 'none')}"
    return list(changed.values())


def _described(part: Any, path: str, around: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Path and text of a part and of what it holds; ``around`` are the parts that it is held by."""
    if (text := _plain(part)) is not None:
        yield path, text
        return
    attributes = _attributes(part)
    if attributes is None or id(part) in around:
        return
    yield path, _name(part)
    for name, value in attributes.items():
        yield from _described(value, f"{path}.{name}" if path else str(name), (*around, id(part)))


def _plain(value: Any) -> str | None:
    """A number, word or flag, or several of them; None of anything else."""
    if isinstance(value, Enum):
        return str(value)
    if value is None or isinstance(value, bool | str):
        return repr(value)
    if isinstance(value, int | float):  # of NumPy too
        return repr(int(value) if isinstance(value, int) else float(value))
    if isinstance(value, list | tuple):
        texts = [_plain(each) for each in value]
        if any(text is None for text in texts):
            return None
        joined = f"({', '.join(map(str, texts))})"
        return joined if len(joined) <= _LONG else f"{len(value):,} values, CRC-32 {zlib.crc32(joined.encode()):08x}"
    return None


def _attributes(part: Any) -> dict[str, Any] | None:
    """What a part holds, by name; None of what is no part of a model."""
    if isinstance(part, type):
        return {}
    if isinstance(part, ProgramPair):
        return {**dict(zip(("model", "guide"), part.programs, strict=True)), **part._modules}
    if isinstance(part, nn.Module):
        return {**_public(part), **part._modules}
    if isinstance(part, functools.partial):
        return {"func": part.func, **{str(i): value for i, value in enumerate(part.args)}, **part.keywords}
    if isinstance(part, list | tuple):
        return {str(i): value for i, value in enumerate(part)}
    if isinstance(part, dict):
        return {str(name): value for name, value in part.items()}
    if inspect.ismethod(part):
        return {} if isinstance(part.__self__, nn.Module) else {"self": part.__self__}  # a module stands elsewhere
    if inspect.isroutine(part):
        return _of_function(part)
    if is_dataclass(part):
        return {each.name: getattr(part, each.name) for each in fields(part) if not each.name.startswith("_")}
    return _public(part) if callable(part) else None


def _public(part: Any) -> dict[str, Any]:
    kept = getattr(part, "__dict__", {})
    return {name: value for name, value in kept.items() if not name.startswith("_") and name != "training"}


def _of_function(function: Any) -> dict[str, Any]:
    """Defaults, and what it holds of the function around it; lists and dicts there are often records of what happened."""
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    defaults = function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    held = dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True)) | (function.__kwdefaults__ or {})
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return {name: value for name, value in held.items() if not isinstance(value, list | dict)}


def _name(part: Any) -> str:
    if isinstance(part, type):
        return part.__name__
    if inspect.isroutine(part):
        return str(getattr(part, "__qualname__", None) or getattr(part, "__name__", type(part).__name__))
    kind = type(part).__name__
    return f"{kind} of {len(part)}" if isinstance(part, list | tuple | dict | nn.Sequential | nn.ModuleList) else kind
