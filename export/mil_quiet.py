"""coremltools without its talk: what it logs, warns of and draws stays inside, its errors are kept."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


class _Remarks(logging.Handler):
    """Keeps which operator coremltools says that it failed on."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += [line.strip()[:120] for line in record.getMessage().splitlines() if "converting" in line]


@contextlib.contextmanager
def silent() -> Iterator[list[str]]:
    """coremltools logs, warns and draws progress bars; stdout belongs to the caller's JSON. Yields its errors."""
    logger, remarks = logging.getLogger("coremltools"), _Remarks()
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [remarks], False
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield remarks.lines
    finally:
        logger.handlers, logger.propagate = before
