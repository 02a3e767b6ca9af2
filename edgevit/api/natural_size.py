"""Image sizes at which a network computes on padding, found by counting: no family is asked for its sizes.

Without padding, MACs are a convex function of the pixels: a fixed share, a share for each pixel and, where every token
sees every other, a share for each pair. So at any size they lie on or below the chord between a smaller and a larger
one. Attention in groups pads a map to whole groups, and that lifts its cost above the chord between two sizes at which
nothing is padded: whole multiples of the size a network was published for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from edgevit.errors import UsageError
from edgevit.specs import MAX_SIDE, ModelCard, Size, size_text

WASTEFUL = 1.15  # times the chord: CrossFormer is at 1.44, 1.30, 1.19 at 256, 288, 320; below lies what rounding costs
NEAR = 0.25  # of a side: how far around the size others are looked at
STEP = 32  # pixels between them, or the smallest legal step above it: the stride of a hierarchical network
MOST = 8  # sizes that are looked at; each takes a quarter of a second
NATURAL = 1.05  # times the lowest cost per pixel found

Cost = Callable[[Size], int]  # (height, width) -> MACs; UsageError where the network refuses the size


def size_notes(card: ModelCard, sizes: Sequence[Size], cost: Cost) -> list[str]:
    """A warning for each size at which the network computes on much padding."""
    return [note for size in sizes if size != card.image.size and (note := size_note(card, size, cost))]


def size_note(card: ModelCard, size: Size, cost: Cost) -> str | None:
    """What to tell of an image size that costs much more than its pixels, and the nearest one that does not."""
    excess = _excess(card, size, cost)
    if excess is None or excess < WASTEFUL:
        return None
    costs = {near: macs for near in _around(card, size) if (macs := _try(cost, near)) is not None}
    per_pixel = {near: macs / math.prod(near) for near, macs in costs.items()}
    best = min(per_pixel.values())
    natural = min((near for near in costs if per_pixel[near] <= NATURAL * best), key=lambda near: _distance(near, size))
    if natural == size:
        return None  # nothing around it is better
    ratio, (asked, near) = per_pixel[size] / per_pixel[natural], map(size_text, (size, natural))
    return (
        f"{asked} costs {costs[size] / 1e9:,.2f} G MACs, {ratio:.2f} times the cost per pixel of {near} "
        f"({costs[natural] / 1e9:,.2f} G): maps are padded to whole groups there; nearest natural size {near}"
    )


def _excess(card: ModelCard, size: Size, cost: Cost) -> float | None:
    """MACs over the chord between two multiples of the published size; None where there is nothing to compare with."""
    (height, width), pixels = card.image.size, math.prod(size)
    times = math.isqrt(pixels // (height * width))
    low = (times * height, times * width) if times else (card.size_multiple, card.size_multiple)
    high = ((times + 1) * height, (times + 1) * width)
    if math.prod(low) >= pixels or max(high) > MAX_SIDE:
        return None
    ends = [_try(cost, low), _try(cost, high)]
    if ends[0] is None or ends[1] is None:
        return None
    share = (pixels - math.prod(low)) / (math.prod(high) - math.prod(low))
    return cost(size) / (ends[0] + share * (ends[1] - ends[0]))


def _around(card: ModelCard, size: Size) -> list[Size]:
    """The size, others of about its shape, and those whose sides are multiples of the published ones."""
    height, width = size
    step = card.size_multiple * math.ceil(STEP / card.size_multiple)
    step *= math.ceil(2 * NEAR * height / step / MOST)
    rows = range(math.ceil((1 - NEAR) * height / step), int((1 + NEAR) * height / step) + 1)
    scaled = [(step * n, step * max(1, round(n * width / height))) for n in rows]
    multiples = [
        {own * max(1, times) for times in (side // own, side // own + 1)}
        for side, own in zip(size, card.image.size, strict=True)
    ]
    near = dict.fromkeys([size, *scaled, *itertools.product(*map(sorted, multiples))])
    return [(h, w) for h, w in near if max(h, w) <= MAX_SIDE]


def _distance(one: Size, other: Size) -> int:
    """How many pixels two sizes' sides lie apart."""
    return abs(one[0] - other[0]) + abs(one[1] - other[1])


def _try(cost: Cost, size: Size) -> int | None:
    try:
        return cost(size)
    except UsageError:
        return None
