"""The figures that papers print beside the ones that are counted here.

>>> figure("27.8M"), figure("4.9 G"), figure("3,232,788"), figure(81.2), figure("unknown")
(27800000.0, 4900000000.0, 3232788.0, 81.2, None)
"""

from __future__ import annotations

import re
from collections.abc import Mapping

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
COUNTED = {"parameters": "parameters", "macs": "flops"}  # ours: the paper's word; its FLOPs are multiply-adds
_FIGURE = re.compile(r"\s*(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)\s*([KMGBT]?)\s*", re.IGNORECASE)


def figure(printed: str | float) -> float | None:
    """The number that a paper printed, "27.8M" or 27.8e6; None where it is no number."""
    if not isinstance(printed, str):
        return float(printed)
    found = _FIGURE.fullmatch(printed)
    return None if found is None else float(found[1].replace(",", "")) * UNITS[found[2].upper()]


def gap_percent(ours: float, printed: str | float | None) -> float | None:
    """How far `ours` lies from a paper's figure, in percent of that; None where it has none."""
    theirs = None if printed is None else figure(printed)
    return (ours - theirs) / theirs * 100 if theirs else None


def gaps(paper: Mapping[str, str | float], parameters: int | None, macs: int | None) -> dict[str, float | None]:
    """The gap in percent of each count that the paper has too; None also for what cannot be compared."""
    ours = {"parameters": parameters, "macs": macs}
    return {
        name: None if count is None else gap_percent(count, paper.get(COUNTED[name])) for name, count in ours.items()
    }
