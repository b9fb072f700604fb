"""Options: dataclass fields with the metadata of which their command-line option and documentation are generated.

An option is declared once, in the dataclass of its setting::

    @described
    @dataclass(frozen=True)
    class Settings:
        lr: float = option(1e-3, help="learning rate")

Then ``add_options(parser, Settings)`` adds ``--lr``, and ``flag_of(Settings, "lr")`` returns ``"--lr"``.
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
    """Metadata of a field.

    Args:
        help: description, in one line.
        choices: the valid words; empty: any value of its type.
        flag: of the command line; empty: derived from the field's name; without dashes: a positional argument.
        metavar: name of the value in the command line's help.
        default_text: description of the default, where the default value does not explain itself.
    """

    help: str
    choices: tuple[str, ...] = ()
    flag: str = ""
    metavar: str | None = None
    default_text: str = ""


def option(default: Any = MISSING, **metadata: Any) -> Any:
    """A field of a dataclass with the metadata of an :class:`Option`."""
    return field(default=default, metadata={"option": Option(**metadata)})


def _options(cls: type) -> list[tuple[Field[Any], Option]]:
    return [(each, each.metadata["option"]) for each in fields(cls) if "option" in each.metadata]


def described(cls: Class) -> Class:
    """Class decorator: appends the options to the docstring of a dataclass."""
    lines = []
    for each, said in _options(cls):
        words = f" One of {', '.join(said.choices)}." if said.choices else ""
        lines.append(f"    {each.name}: {said.help}.{words}")
    cls.__doc__ = inspect.cleandoc(cls.__doc__ or "") + "\n\nArgs:\n" + "\n".join(lines) + "\n"
    return cls


def check_choices(settings: Any) -> None:
    """Check each option that has choices: one of them, a tuple of them, or None where None is the default.

    Raises:
        SettingError: an option has another value.
    """
    for each, said in _options(type(settings)):
        value = getattr(settings, each.name)
        if said.choices and not (value is None and each.default is None):
            if value == ():
                raise SettingError(each.name, f"expected one or more of {', '.join(said.choices)}, found none.")
            for word in value if isinstance(value, tuple) else (value,):
                one_of(each.name, word, said.choices)


def flag_of(cls: type, name: str) -> str:
    """The command-line flag of a field; empty if the field is no option."""
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
    """Add the options of a dataclass to a parser. The parsed namespace has only those that were given.

    Args:
        parser: the parser.
        cls: the dataclass. An option without a default is required; one that is true by default becomes ``--no-...``.
        choices: by name of the field; they replace those of the dataclass.
        defaults: by name of the field, the description of a default that the dataclass does not know.
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
        elif not flag.startswith("-"):  # no choices: argparse would check the default of an absent argument against them
            del arguments["dest"]
            arguments |= _value(types[each.name]) | {"metavar": flag}
        else:
            arguments |= _value(types[each.name]) | {"metavar": said.metavar, "required": needed}
            arguments["choices"] = (choices or {}).get(each.name) or said.choices or None
        parser.add_argument(flag if flag.startswith("-") else each.name, **arguments)


def _value(annotation: Any) -> dict[str, Any]:
    """The arguments of ``add_argument`` for a value of type ``int``, ``int | None``, ``tuple[int, ...]``, ..."""
    if get_origin(annotation) is UnionType:
        (annotation,) = (part for part in get_args(annotation) if part is not NoneType)
    convert: Callable[[str], Any] = annotation
    if get_origin(annotation) is tuple:
        return {"type": get_args(annotation)[0], "nargs": "*"}
    return {"type": convert}
