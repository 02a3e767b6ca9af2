"""Every failure a user can cause or meet, with the exit code of each.

    EdgevitError                    exit 1: something failed
    |-- UsageError                  exit 2: the request itself is wrong
    |   `-- UnknownNameError        exit 2: no such model, target, runtime or option
    |-- MissingDependencyError      exit 1: an extra is not installed
    |-- CheckpointError             exit 1: weights that cannot be read or do not fit
    |-- ArtifactError               exit 1: an artifact that is missing, changed, or newer than this edgevit
    |-- OutputError                 exit 1: the place to write to refuses
    |-- InputError                  exit 1: a picture or array that cannot be read
    |-- RuntimeFailure              exit 1: a runtime refused a model, or its inputs did not fit
    |-- ExportError                 exit 1: capture, a rewrite or a graph pass broke its promise
    `-- ParityError                 exit 3: not equal to the reference

A message names the place, what came, what was expected and what to do. Exit codes 4 (regression) and 5 (inconclusive)
are verdicts of `edgevit gate`, not errors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgevitError(Exception):
    """Anything edgevit itself reports: one message for the user, never a traceback."""

    exit_code = 1


class UsageError(EdgevitError):
    """The request is wrong whatever the files hold: a bad size, batch, option or combination."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that no registry row bears; says what was asked, the nearest name, and what exists."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}; {hint}Known: {', '.join(names) or 'none'}")


class MissingDependencyError(EdgevitError):
    """A package that an optional part needs is not installed; says what to type."""


class CheckpointError(EdgevitError):
    """Weights that cannot be read safely or do not fit the network."""


class ArtifactError(EdgevitError):
    """An artifact directory that is missing, damaged, changed or of a newer schema."""


class OutputError(EdgevitError):
    """The output place exists already, is not writable, or is full."""


class InputError(EdgevitError):
    """A picture, label file or array that cannot be used."""


class RuntimeFailure(EdgevitError):
    """A runtime refused a model or an input."""


class ExportError(EdgevitError):
    """A step of the export broke what it promises; a bug or an unsupported network."""


class ParityError(EdgevitError):
    """The exported model does not compute what the reference computes."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """What an error says first, or its type where it says nothing; most libraries put their own sources below."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """What an error says last, or its type where it says nothing; some libraries put their own sources above."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    """The lines of an error's message that hold anything; at least one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines or [type(error).__name__]
