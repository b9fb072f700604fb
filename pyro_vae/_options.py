"""Options: fields of dataclasses that carry all that a command line and a page of the documentation say of them.

An option is declared once, where its setting lives::

    @described
    @dataclass(frozen=True)
    class Settings:
        lr: float = option(1e-3, help="learning rate")

Then ``add_options(parser, Settings)`` adds ``--lr``, and ``flag_of(Settings, "lr")`` says how it is called there.
"""

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pyro_vae._checks import SettingError, one_of

__all__ = ["Option", "add_options", "check_choices", "described", "flag_of", "option"]

Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class Option:
    """What is said of a field.

    Args:
        help: what it is, in a line.
        choices: the words that it may be; empty: any value of its type.
        flag: on a command line; empty: made of the field's name; without dashes: given by its place.
        metavar: what a command line shows for its value.
        default_text: what happens without it, in words, where the default value does not say so itself.
    """

    help: str
    choices: tuple[str, ...] = ()
    flag: str = ""
    metavar: str | None = None
    default_text: str = ""


def option(default: Any = MISSING, **said: Any) -> Any:
    """A field of a dataclass, with what :class:`Option` says of it."""
    return field(default=default, metadata={"option": Option(**said)})


def _options(cls: type) -> list[tuple[Field[Any], Option]]:
    return [(each, each.metadata["option"]) for each in fields(cls) if "option" in each.metadata]


def described(cls: Class) -> Class:
    """The dataclass, its docstring completed by its options."""
    lines = []
    for each, said in _options(cls):
        words = f" One of {', '.join(said.choices)}." if said.choices else ""
        lines.append(f"    {each.name}: {said.help}.{words}")
    cls.__doc__ = inspect.cleandoc(cls.__doc__ or "") + "\n\nArgs:\n" + "\n".join(lines) + "\n"
    return cls


def check_choices(settings: Any) -> None:
    """Whether each option of a dataclass that has choices is one, or some, of them; or None, where that is its default.

    Raises:
        SettingError: one is not.
    """
    for each, said in _options(type(settings)):
        value = getattr(settings, each.name)
        if said.choices and not (value is None and each.default is None):
            if value == ():
                raise SettingError(each.name, f"expected one or more of {', '.join(said.choices)}, found none.")
            for word in value if isinstance(value, tuple) else (value,):
                one_of(each.name, word, said.choices)


def flag_of(cls: type, name: str) -> str:
    """What the option of that name is called on a command line; empty where there is none."""
    for each, said in _options(cls):
        if each.name == name:
            return said.flag or f"--{'no-' if each.default is True else ''}{name.replace('_', '-')}"
    return ""


def add_options(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    choices: Mapping[str, Sequence[str]] | None = None,
    defaults: Mapping[str, str] | None = None,
) -> None:
    """Add the options of a dataclass. What the parser returns holds those that were given, and no others.

    Args:
        parser: to add them to.
        cls: the dataclass. An option without a default is required; one that is true by default becomes ``--no-...``.
        choices: by name of the field, in place of those of the dataclass.
        defaults: by name of the field, what to tell of its default, for options whose defaults the dataclass does not know.
    """
    types = get_type_hints(cls)
    for each, said in _options(cls):
        known = None if defaults is None else defaults.get(each.name)
        flag, needed = flag_of(cls, each.name), each.default is MISSING and known is None
        texts = [said.default_text, str(each.default) if known is None and not said.default_text else known or ""]
        default = "required" if needed else f"default: {'; '.join(text for text in texts if text)}"
        arguments: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS}
        arguments["help"] = f"{said.help} ({default})".replace("%", "%%")  # argparse fills in by %
        if types[each.name] is bool:
            arguments["action"] = "store_false" if each.default else "store_true"
        elif not flag.startswith("-"):  # its choices are left to the dataclass: argparse looks for a missing one among them
            del arguments["dest"]
            arguments |= _value(types[each.name]) | {"metavar": flag}
        else:
            arguments |= _value(types[each.name]) | {"metavar": said.metavar, "required": needed}
            arguments["choices"] = (choices or {}).get(each.name) or said.choices or None
        parser.add_argument(flag if flag.startswith("-") else each.name, **arguments)


def _value(annotation: Any) -> dict[str, Any]:
    """How argparse reads a value of that type: ``int``, ``int | None``, ``tuple[int, ...]``."""
    if get_origin(annotation) is UnionType:
        (annotation,) = (part for part in get_args(annotation) if part is not NoneType)
    convert: Callable[[str], Any] = annotation
    if get_origin(annotation) is tuple:
        return {"type": get_args(annotation)[0], "nargs": "*"}
    return {"type": convert}
