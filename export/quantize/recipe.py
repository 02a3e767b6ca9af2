"""What every target's recipe has in common."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal

Calibrator = Literal["minmax", "percentile", "entropy", "mse"]


@dataclass(frozen=True)
class Recipe:
    """How a network becomes int8; a target's recipe adds what its arithmetic takes.

    calibrator: how a range follows from the values seen.
    keep_float: shell patterns on node names ("blocks.0.*", "*/attn.proj/*"): what matches stays float, in addition to
        what the target's recipe keeps by itself.
    only: where not empty, nothing but what matches one of these is quantised.
    equalize: move the spread of channels from activations into weights first, by exact algebra.
    """

    calibrator: Calibrator = "minmax"
    keep_float: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    equalize: bool = True

    @property
    def calibrated(self) -> bool:
        """Whether activations are quantised, so that their ranges have to be measured."""
        return True

    def quantizes(self, node: str) -> bool:
        """Whether the user's patterns let a node of this name be quantised."""
        wanted = not self.only or any(fnmatch.fnmatchcase(node, pattern) for pattern in self.only)
        return wanted and not any(fnmatch.fnmatchcase(node, pattern) for pattern in self.keep_float)
