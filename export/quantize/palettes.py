"""The few values that stand for all weights of a tensor: k-means in one dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 100  # of Lloyd's algorithm, which moves little after some ten from where it starts here
BINS = 16  # for each centre, of the histogram that the start follows from


def palette(bits: int) -> Callable[[NDArray[Any]], tuple[NDArray[Any], NDArray[np.uint8]]]:
    """What compresses weights of any shape to 2^bits values and the flat indices of each weight's nearest one.

    Deterministic: it starts where the cube root of the density puts centres, which is best for many of them
    (P. Panter, W. Dite, Proc. IRE 39, 1951), and stops where nothing moves. Tensors of fewer different weights come out
    exact.
    """

    def compress(weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        values, which, counts = np.unique(weights.ravel(), return_inverse=True, return_counts=True)
        centres = _centres(values.astype(np.float64), counts.astype(np.float64), 1 << bits)
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values.astype(np.float64))
        return centres.astype(weights.dtype), nearest[which.ravel()].astype(np.uint8)

    return compress


def _centres(values: NDArray[np.float64], counts: NDArray[np.float64], wanted: int) -> NDArray[np.float64]:
    """`wanted` numbers in order, near which the sorted `values` lie; the last is repeated where there are fewer."""
    if len(values) <= wanted:
        return np.concatenate([values, np.repeat(values[-1:], wanted - len(values))]).astype(np.float64)
    below, sums = (np.concatenate([[0.0], np.cumsum(each)]) for each in (counts, counts * values))
    bins = np.linspace(values[0], values[-1], BINS * wanted + 1)
    crowd = np.cumsum(np.diff(np.interp(bins, values, below[1:], left=0.0)) ** (1 / 3))
    found = np.interp((np.arange(wanted) + 0.5) / wanted * crowd[-1], crowd, bins[1:])
    for _ in range(ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(values, (found[1:] + found[:-1]) / 2), [len(values)]])
        weight, total = below[edges[1:]] - below[edges[:-1]], sums[edges[1:]] - sums[edges[:-1]]
        better = np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), found)  # an empty cell stays
        if np.array_equal(better, found):
            break
        found = better
    return np.asarray(found, np.float64)
