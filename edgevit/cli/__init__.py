"""The command line: arguments -> one api call -> lines or one JSON document; exit codes; progress. Nothing else.

Exit codes: 0 done, 1 failed, 2 usage, 3 not equal to the reference, 4 regression, 5 inconclusive, 128 + n signal n.
"""

from __future__ import annotations

import io
import json
import signal
import sys

from typer.exceptions import TyperException

from edgevit.errors import EdgevitError

from . import accuracy, benching, catalog, checking, exporting, gating, quantizing, running  # noqa: F401  # importing them registers their verbs, in the order of --help
from .shell import app, err, plain

__all__ = ["main"]


def main() -> None:
    """Run the command line; a failure is one message and an exit code, never a traceback without --debug."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no failure
    try:
        sys.exit(app(standalone_mode=False))
    except EdgevitError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except _Interrupted as interrupt:
        _fail("interrupted; nothing half written was left behind", 128 + interrupt.number)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of stdout went away; Python would complain about it on exit
        sys.exit(1)
    except TyperException as error:  # the parser's: it shows the usage beside its message, on stderr
        if "--json" in sys.argv:
            _print_error(error.format_message(), error.exit_code)
        if hasattr(error, "show"):
            error.show()
        sys.exit(error.exit_code)
    except Exception as error:  # a bug of edgevit: the user gets one line and a way to see more
        if debug:
            raise
        _fail(f"internal error: {type(error).__name__}: {error}; run again with --debug and report what it prints", 1)


class _Interrupted(BaseException):
    """Ctrl-C or a termination request; not an Exception, so that every `finally` runs and no handler swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupt(number: int, frame: object) -> None:
    for repeated in (signal.SIGINT, signal.SIGTERM):
        signal.signal(repeated, signal.SIG_IGN)  # a second Ctrl-C must not stop the cleaning up
    raise _Interrupted(number)


def _fail(message: str, code: int) -> None:
    if "--json" in sys.argv:
        _print_error(message, code)
    err.print(f"edgevit: {plain(message)}", soft_wrap=True)
    sys.exit(code)


def _print_error(message: str, code: int) -> None:
    print(json.dumps({"error": {"message": message, "exit_code": code}}, indent=2))
