"""What a family, a target or a runtime takes beside, as a frozen dataclass: values or texts -> its fields."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgevit.errors import UnknownNameError, UsageError


def parse_options(kind: type[Any], owner: str, given: Mapping[str, Any]) -> Any:
    """The options dataclass `kind` of a model, target or runtime, from values or from the texts of a command line.

    Raises:
        UnknownNameError: the owner has no such option. UsageError: a value of the wrong type.
    """
    fields = option_names(kind)
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in given.items():
        if key not in fields:
            raise UnknownNameError(f"option of {owner}", key, fields)
        values[key] = _parse(hints[key], key, value)
    return kind(**values)


def option_names(kind: type[Any]) -> set[str]:
    """The names of the options in a dataclass."""
    return {field.name for field in dataclasses.fields(kind)}


def split_options(given: Mapping[str, Any], *owners: tuple[str, type[Any]]) -> list[dict[str, Any]]:
    """Share out options among owners, each (name, options dataclass), who have no option's name in common.

    Raises:
        UnknownNameError: none of them has such an option.
    """
    names = [option_names(kind) for _, kind in owners]
    known = set().union(*names)
    for key in given:
        if key not in known:
            asked = " or ".join(owner for (owner, _), has in zip(owners, names, strict=True) if has)
            raise UnknownNameError(f"option of {asked or owners[0][0]}", key, known)
    return [{key: value for key, value in given.items() if key in has} for has in names]


def as_json(options: Any) -> dict[str, Any]:
    """An options dataclass as JSON has it."""
    return {key: _plain(value) for key, value in dataclasses.asdict(options).items()}


def _plain(value: Any) -> Any:
    """A list for a tuple; of a file its name: where it lay is the exporting machine's affair."""
    return list(value) if isinstance(value, tuple) else value.name if isinstance(value, Path) else value


def _parse(kind: Any, key: str, value: Any) -> Any:
    """One option's value as its type: bool, int, str, a file, a choice of texts, or a tuple ("7,7", "sm86,sm89")."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # `... | None`: a default that depends on the owner
        return None if value is None else _parse(arguments[0], key, value)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise UsageError(f"option {key}={value}: expected {' or '.join(map(str, arguments))}")
    if origin is tuple:
        return _parse_tuple(arguments, key, value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind is int and isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        return int(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    wanted = {bool: "true or false", int: "a whole number"}.get(kind, kind.__name__)
    raise UsageError(f"option {key}={value}: expected {wanted}")


def _parse_tuple(arguments: tuple[Any, ...], key: str, value: Any) -> tuple[Any, ...]:
    """A tuple of fixed length, or of any length where its type ends in an ellipsis."""
    parts: Iterable[Any] = [p.strip() for p in value.split(",") if p.strip()] if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and arguments[-1] is Ellipsis:
        if isinstance(value, str) and not parts:
            raise UsageError(f"option {key}={value}: expected at least one value, e.g. {key}=A,B; or leave it out")
        return tuple(_parse(arguments[0], key, part) for part in parts)
    if isinstance(parts, list | tuple) and len(parts) == len(arguments):
        return tuple(_parse(kind, key, part) for kind, part in zip(arguments, parts, strict=True))
    raise UsageError(f"option {key}={value}: expected {len(arguments)} whole numbers, e.g. {key}=7,7,7,7")
