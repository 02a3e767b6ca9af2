"""Logits -> the classes a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def top_classes(logits: NDArray[np.float32], names: Sequence[str] | None, top: int) -> list[dict[str, Any]]:
    """The `top` classes of one picture's logits (classes,), most probable first, with label and probability.

    The softmax is taken in float64, so that close classes keep their order; without `names` the label is the index.
    """
    wide = logits.astype(np.float64)
    shares = np.exp(wide - wide.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")[:top]
    return [
        {"class": int(c), "label": str(c) if names is None else names[c], "probability": float(shares[c])}
        for c in order
    ]
