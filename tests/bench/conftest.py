"""A clock that moves only when a scripted contestant runs, so that every figure and text is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat

import pytest

from edgevit.bench.timing import Contestant


class Stage:
    """The fake clock, the contestants that move it, and the log of who ran."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now_s

    def contestant(self, name: str, times_ms: float | Iterable[float]) -> Contestant:
        """A contestant whose runs take `times_ms`, one after the other or always the same."""
        script = iter(repeat(times_ms) if isinstance(times_ms, float | int) else times_ms)

        def run() -> None:
            self.log.append(name)
            self.now_s += next(script) / 1000

        return Contestant(name, run)


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def make_stage() -> Callable[[], Stage]:
    """For tests that need several stages."""
    return Stage
