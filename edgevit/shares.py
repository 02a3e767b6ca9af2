"""A share of pictures with its interval, the same for what is evaluated and for what was trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959963984540054  # of the normal distribution at 97.5 %: 95 % confidence, two sides


@dataclass(frozen=True)
class Figure:
    """A measured figure and the ends of its 95 % interval: shares from 0 to 1, or points where the function says so."""

    value: float
    low: float
    high: float


def wilson(hits: int, total: int) -> Figure:
    """The share `hits` / `total` with its score interval.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927). Unlike the textbook's, it stays within 0 to 1 and holds near
    its ends, where good classifiers are. Raises ValueError on impossible counts.
    """
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"{hits} of {total}: expected 0 or more of at least 1")
    share, z2 = hits / total, Z * Z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    low = 0.0 if hits == 0 else centre - half  # exact at the ends, where rounding would leave 1e-17
    return Figure(share, low, 1.0 if hits == total else centre + half)
