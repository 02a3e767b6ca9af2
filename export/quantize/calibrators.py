"""How a range follows from the values seen: `Observer` takes them array by array, `Observer.range` clips.

Four calibrators. minmax: everything seen. percentile: all but the outermost 0.01 % at either end. entropy: the clip
after which the int8 histogram tells least apart from the float one (Kullback-Leibler), as TensorRT 8 calibrated
(S. Migacz, 8-bit Inference with TensorRT, GTC 2017). mse: the clip with the smallest squared error of int8.

The histogram's ends are powers of two, and it grows by joining 2^k neighbours into one. So nothing has to be
interpolated, and the result depends on neither the order of the pictures nor how they are cut into arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevit.errors import ExportError, UnknownNameError

CALIBRATORS = ("minmax", "percentile", "entropy", "mse")
MOVED = 0.1  # share of the width: what the design calls an unstable range
TAIL = 1e-4  # share of the values that "percentile" may cut at either end: its habitual 99.99 %
SIDE = 8192  # bins on either side of 0; the widest magnitude lies in the upper half of them, 32 for each int8 level
COARSE = 4  # bins joined for the entropy: 1024 to 2048 are left, TensorRT has 2048
STRIDE = 8  # coarse bins between two clips that are tried: 0.4 to 0.8 % of the range
CLIPS = 128  # tried for "mse": steps of 0.8 % of the range
STEPS = 255  # between the 256 values of int8
MIN_EXPONENT = -100  # values below 2^-100 count as 0: the bins of a smaller range would overflow float32


@dataclass(frozen=True)
class Range:
    """What a tensor's values are taken to lie in, `low` <= 0 <= `high`: int8 has to hold 0 exactly."""

    low: float
    high: float

    def moved(self, other: Range) -> bool:
        """Whether an end of `other` lies more than 10 % of this range's width away from this one's."""
        farthest = max(abs(other.low - self.low), abs(other.high - self.high))
        return farthest > MOVED * (self.high - self.low)


class Observer:
    """Sees the values of one tensor, array by array; `name` is what messages call it.

    Raises:
        UnknownNameError: no such calibrator.
    """

    def __init__(self, calibrator: str, name: str = "a tensor") -> None:
        if calibrator not in CALIBRATORS:
            raise UnknownNameError("calibrator", calibrator, CALIBRATORS)
        self.calibrator = calibrator
        self.name = name
        self.low, self.high = math.inf, -math.inf
        self._exponent = MIN_EXPONENT  # the histogram reaches from -2^exponent to 2^exponent
        self._counts = np.zeros(0 if calibrator == "minmax" else 2 * SIDE, np.int64)

    def update(self, array: NDArray[Any]) -> None:
        """Take in an array of any shape; an empty one says nothing.

        Raises:
            ExportError: NaN or infinity in it.
        """
        values = np.asarray(array, np.float32).ravel()
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())  # NaN anywhere makes both NaN
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ExportError(
                f"{self.name}: NaN or infinity in its values on the calibration pictures, expected finite ones; "
                "check the weights, and that the float32 export verifies"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.calibrator != "minmax":
            self._count(values, math.frexp(max(-low, high))[1])

    def range(self) -> Range:
        """What follows from everything seen so far; more may be seen afterwards.

        Raises:
            ExportError: nothing was seen.
        """
        if self.low > self.high:
            raise ExportError(f"{self.name}: no value seen, expected at least one calibration picture; give some")
        if self.calibrator == "minmax":
            return self._clipped(math.inf)
        if self.calibrator == "percentile":
            return self._percentile()
        return self._clipped(self._entropy_clip() if self.calibrator == "entropy" else self._mse_clip())

    def _count(self, values: NDArray[np.float32], exponent: int) -> None:
        """Add values below 2^exponent in magnitude to the histogram, which first grows to hold them."""
        if exponent > self._exponent:
            joined = (np.arange(-SIDE, SIDE) >> min(exponent - self._exponent, 31)) + SIDE  # 31: all bits of an index
            counts = np.zeros_like(self._counts)
            np.add.at(counts, joined, self._counts)
            self._counts, self._exponent = counts, exponent
        scale = np.float32(SIDE * math.ldexp(1.0, -self._exponent))  # a power of two: the products are exact
        bins = np.floor(values * scale).astype(np.int32)
        bins += SIDE
        self._counts += np.bincount(bins, minlength=2 * SIDE)

    def _clipped(self, clip: float) -> Range:
        """Everything seen, 0, and nothing beyond `clip` in magnitude."""
        return Range(max(min(self.low, 0.0), -clip), min(max(self.high, 0.0), clip))

    def _percentile(self) -> Range:
        """The values that 0.01 % lie below and above, linear within a bin."""
        edges = np.arange(-SIDE, SIDE + 1) * (math.ldexp(1.0, self._exponent) / SIDE)
        below = np.concatenate([[0], np.cumsum(self._counts)]) / self._counts.sum()
        low = float(np.interp(TAIL, below, edges)) if self.low < 0 else 0.0
        high = float(np.interp(1 - TAIL, below, edges)) if self.high > 0 else 0.0
        seen = self._clipped(math.inf)
        return Range(min(max(low, seen.low), 0.0), max(min(high, seen.high), 0.0))

    def _magnitudes(self) -> tuple[NDArray[np.int64], float]:
        """The histogram of magnitudes up to the largest one, and the width of its bins."""
        counts = self._counts[SIDE:] + self._counts[:SIDE][::-1]
        return counts[: int(np.flatnonzero(counts)[-1]) + 1], math.ldexp(1.0, self._exponent) / SIDE

    def _entropy_clip(self) -> float:
        """The magnitude at which the clipped histogram and its int8 version differ least."""
        fine, width = self._magnitudes()
        counts = np.add.reduceat(fine, np.arange(0, len(fine), COARSE)).astype(np.float64)
        counts[0] = counts[min(1, len(counts) - 1)]  # exact zeros (ReLU, padding) are free and would drown the rest
        levels = 128 if self.low < 0 < self.high else 256  # values of int8 for one sign, or for the only one
        tried = [*range(levels, len(counts), STRIDE), len(counts)]
        best: int = min(reversed(tried), key=lambda kept: _divergence(counts, kept, levels))
        return best * COARSE * width

    def _mse_clip(self) -> float:
        """The magnitude beyond which clipping costs as much as finer steps save, by the histogram's bin centres."""
        counts, width = self._counts, math.ldexp(1.0, self._exponent) / SIDE
        filled = np.flatnonzero(counts)
        weights, values = counts[filled].astype(np.float64), (filled - SIDE + 0.5) * width
        top = max(-self.low, self.high)
        errors = []
        for part in range(1, CLIPS + 1):
            kept = self._clipped(top * part / CLIPS)
            step = (kept.high - kept.low) / STEPS
            rounded = np.rint(np.clip(values, kept.low, kept.high) / step) * step if step else values
            errors.append(float(weights @ (values - rounded) ** 2))
        return top * (int(np.argmin(errors)) + 1) / CLIPS


def _divergence(counts: NDArray[np.float64], kept: int, levels: int) -> float:
    """Kullback-Leibler divergence of the first `kept` bins, the rest clipped into the last, from `levels` of them.

    An empty last bin counts as half a value: clipping into a gap costs something, but not infinitely much.
    """
    inside = counts[:kept]
    clipped = inside.copy()
    clipped[-1] += counts[kept:].sum()
    level = np.arange(kept) * levels // kept
    filled = inside > 0
    per_level = np.bincount(level[filled], minlength=levels)
    mean = np.bincount(level, weights=inside, minlength=levels) / np.maximum(per_level, 1)
    spread = np.where(filled, mean[level], 0.0)
    here = clipped > 0
    if not here.any():
        return 0.0
    spread[-1] = max(spread[-1], 0.5)
    p, q = clipped[here] / clipped.sum(), spread[here] / clipped.sum()  # q lacks what was clipped, which tells
    return float(p @ np.log(p / q))
