"""How often a classifier is right, and what another one loses against it on the same pictures; each with its interval.

Pure statistics on arrays. Every interval has 95 % confidence. What two models get right is paired: the drop's interval
follows from the pictures on which they differ, and is several times narrower than the two accuracies' own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevit.shares import Figure, wilson

MAX_SQNR_DB = 150.0  # of one picture: finer than float32 resolves, and equal outputs would make a mean infinite

Hits = NDArray[np.bool_]  # (n,), one for each picture


def ranks(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """How many classes stand before the right one, for logits (n, classes) and labels (n,): 0 where it is first.

    Of equal logits the lower class stands first, as in a stable sort: a network that puts out one value for all classes
    is right by chance only.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)  # n classes -> n 1
    before = np.arange(logits.shape[1]) < labels[:, None]  # n classes
    return np.asarray(((logits > own) | ((logits == own) & before)).sum(axis=1))


def share(hits: Hits) -> Figure:
    """The share of True in `hits` (n,) with its interval. Raises ValueError on none."""
    return wilson(int(hits.sum()), len(hits))


def drop_points(reference: Hits, candidate: Hits) -> Figure:
    """What the candidate loses against the reference on the same pictures, in points; negative where it gains.

    The interval is Newcombe's for paired proportions (Stat. Med. 17 (1998) 2635, method 10): Wilson's of both, joined
    with the correlation of the two. It needs no resampling and holds for few pictures and equal models too. Raises
    ValueError on other lengths, or none.
    """
    if len(reference) != len(candidate):
        raise ValueError(f"paired pictures expected, got {len(reference)} and {len(candidate)}")
    first, second = share(reference), share(candidate)
    phi = _phi(reference, candidate)
    down, up = first.value - first.low, first.high - first.value
    below, above = second.value - second.low, second.high - second.value
    lower = math.sqrt(max(down * down - 2 * phi * down * above + above * above, 0.0))
    upper = math.sqrt(max(up * up - 2 * phi * up * below + below * below, 0.0))
    drop = first.value - second.value
    return Figure(100 * drop, 100 * (drop - lower), 100 * (drop + upper))


def _phi(reference: Hits, candidate: Hits) -> float:
    """The correlation of two sets of hits, with Newcombe's correction for continuity; 0 where one never varies."""
    both, neither = int((reference & candidate).sum()), int((~reference & ~candidate).sum())
    only_first, only_second = int((reference & ~candidate).sum()), int((~reference & candidate).sum())
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if product == 0:
        return 0.0
    excess = both * neither - only_first * only_second
    corrected = max(excess - len(reference) / 2, 0.0) if excess > 0 else excess
    return corrected / math.sqrt(product)


def sqnr_db(reference: NDArray[np.floating[Any]], candidate: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Signal to noise of each picture's logits (n, classes) in dB, at most 150: 20 dB is an error of a tenth."""
    wide = reference.astype(np.float64)
    signal, noise = (wide**2).sum(axis=1), ((wide - candidate) ** 2).sum(axis=1)
    floor = 10 ** (-MAX_SQNR_DB / 10)
    return np.asarray(10 * np.log10(np.maximum(signal, 1e-300) / np.maximum(noise, np.maximum(signal * floor, 1e-300))))
