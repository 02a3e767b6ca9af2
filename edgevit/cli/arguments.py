"""The texts of a command line as values."""

from __future__ import annotations

import re

from edgevit.errors import UsageError
from edgevit.specs import Size

SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})", re.IGNORECASE)


def parse_size(text: str | None) -> Size | None:
    """Read "256x320" as (256, 320).

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    found = SIZE.fullmatch(text)
    if found is None:
        raise UsageError(f"--image-size {text!r}: expected HEIGHTxWIDTH in pixels, e.g. 224x224")
    return int(found[1]), int(found[2])


def parse_sizes(text: str | None) -> tuple[Size, ...] | None:
    """Read "224x224,256x320" as ((224, 224), (256, 320)).

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    found = [SIZE.fullmatch(part.strip()) for part in text.split(",")]
    if None in found:
        raise UsageError(
            f"--image-size {text!r}: expected HEIGHTxWIDTH in pixels, e.g. 224x224, or several: 224x224,256x320"
        )
    return tuple((int(size[1]), int(size[2])) for size in found if size)


def parse_batch(text: str) -> int | str:
    """Read "4" as 4; "dynamic" stays.

    Raises:
        UsageError: anything else.
    """
    if text == "dynamic":
        return text
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise UsageError(f"--batch {text!r}: expected a whole number of pictures, or 'dynamic'")
    return int(text)


def parse_options(pairs: list[str] | None) -> dict[str, str]:
    """What `--option` was given: ["a=b"] -> {"a": "b"}.

    Raises:
        UsageError: a pair without "=".
    """
    return _pairs(pairs, "--option", "spatial_dynamic_relu=true")


def parse_runtime_options(pairs: list[str] | None) -> dict[str, str]:
    """What `--runtime-option` was given.

    Raises:
        UsageError: a pair without "=".
    """
    return _pairs(pairs, "--runtime-option", "device=GPU")


def _pairs(pairs: list[str] | None, flag: str, example: str) -> dict[str, str]:
    """["a=b"] -> {"a": "b"}."""
    for pair in pairs or []:
        if "=" not in pair:
            raise UsageError(f"{flag} {pair!r}: expected KEY=VALUE, e.g. {example}")
    keys = [pair.split("=", 1)[0] for pair in pairs or []]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise UsageError(f"{flag} {twice}: given {keys.count(twice)} times; give it once, several values as A,B")
    return dict(pair.split("=", 1) for pair in pairs or [])
