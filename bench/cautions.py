"""What a reader of a measurement must be warned of: what was seen, its likely cause, the next step.

Each function returns its warnings; no warning, no entry. After hyperfine's `output/warnings.rs`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgevit.specs import LatencyResult

from .stats import format_ms, median, round_medians

OUTLIER_SCORE = 3.5  # Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993, recommend it for this score
NORMAL_SCALE = 0.6745  # makes a median absolute deviation comparable to a standard deviation (same source)
OUTLIER_SHARE = 0.05  # half of the tenth that p90 sets aside; isolated ones are normal on any system
DRIFT_SHARE = 0.05  # a judgement: below it, either half tells the reader the same
MIN_DRIFT_ROUNDS = 6  # three rounds a half: with fewer, one slow round is a half's median


def outliers(result: LatencyResult) -> Iterator[str]:
    """Warn where more than OUTLIER_SHARE of the times lie far above the median, by the modified Z-score.

    Nothing is said where the median absolute deviation is 0: the clock is coarser than the noise, so no scale is known.
    """
    samples = np.asarray(result.samples_ms)
    middle = median(result.samples_ms)
    deviation = float(np.median(np.abs(samples - middle)))
    if deviation == 0:
        return
    slow = int(np.count_nonzero(NORMAL_SCALE * (samples - middle) / deviation > OUTLIER_SCORE))
    if slow > OUTLIER_SHARE * len(samples):
        yield (
            f"{result.name}: {slow} of {len(samples)} times are far above the median of {format_ms(middle)} ms "
            f"(modified Z-score above {OUTLIER_SCORE}). Other programs probably took the cores now and then. "
            "Close them, or use fewer threads than cores, and repeat."
        )


def drift(result: LatencyResult) -> Iterator[str]:
    """Warn where the second half of the rounds is slower or faster than the first by more than DRIFT_SHARE."""
    medians = round_medians(result)
    half = len(medians) // 2
    if len(medians) < MIN_DRIFT_ROUNDS:
        return
    before, after = median(medians[:half]), median(medians[-half:])
    if before <= 0 or abs(after / before - 1) <= DRIFT_SHARE:
        return
    change = f"{result.name}: {abs(after / before - 1):.0%}"
    figures = f"in the second half of the run ({format_ms(before)} -> {format_ms(after)} ms)"
    if after > before:
        yield f"{change} slower {figures}. The chip probably grew hot and lowered its clock. Let it cool, or cool it."
    else:
        yield f"{change} faster {figures}. The clock was probably still rising, or a program ended. Raise the duration."
