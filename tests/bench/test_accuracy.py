"""Figures and intervals against published and simulated values."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from numpy.typing import NDArray

from edgevit.bench.accuracy import MAX_SQNR_DB, Hits, drop_points, ranks, share, sqnr_db
from edgevit.shares import wilson


def paired(both: int, first: int, second: int, neither: int) -> tuple[Hits, Hits]:
    """Hits of two models with these counts of both right, one right, neither."""
    counts = (both, first, second, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [  # Newcombe, Stat. Med. 17 (1998) 857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_published_one(hits: int, total: int, low: float, high: float) -> None:
    found = wilson(hits, total)
    assert found.value == hits / total
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(total - hits, total)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_ends_exactly_where_all_or_none_are_right() -> None:
    for total in (1, 3, 7, 2000, 50_000):
        assert wilson(total, total).high == 1.0
        assert wilson(0, total).low == 0.0


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(hits: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{hits} of {total}"):
        wilson(hits, total)


def test_share_counts_hits() -> None:
    assert share(np.array([True, False, True, True])) == wilson(3, 4)


@pytest.mark.parametrize(
    ("counts", "drop", "low", "high"),
    [  # Fagerland, Lydersen and Laake, Stat. Med. 33 (2014) 2850, the airway data; and Newcombe's own (36, 12, 2, 0)
        ((1, 1, 7, 12), -28.57, -50.7, -2.6),
        ((36, 12, 2, 0), 20.0, 5.69, 34.04),
    ],
)
def test_paired_interval_is_the_published_one(
    counts: tuple[int, int, int, int], drop: float, low: float, high: float
) -> None:
    assert astuple(drop_points(*paired(*counts))) == pytest.approx((drop, low, high), abs=0.06)


def test_drop_turns_its_sign_with_the_models() -> None:
    first, second = paired(1800, 30, 18, 152)
    there, back = drop_points(first, second), drop_points(second, first)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert there.value == pytest.approx(0.6)


def test_equal_models_lose_nothing_and_their_interval_is_narrow() -> None:
    first, second = paired(1800, 0, 0, 200)
    found = drop_points(first, second)
    assert found.value == 0 and -0.2 < found.low < 0 < found.high < 0.2


def test_pairing_makes_the_interval_narrower_than_the_accuracies_own() -> None:
    first, second = paired(1800, 12, 8, 180)
    alone = wilson(1812, 2000)
    found = drop_points(first, second)
    assert found.high - found.low < 100 * (alone.high - alone.low) / 2


@pytest.mark.parametrize("rates", [(0.9, 0.006, 0.004, 0.09), (0.5, 0.05, 0.02, 0.43), (0.97, 0.01, 0.0, 0.02)])
def test_paired_interval_holds_the_truth_in_nineteen_of_twenty_simulations(rates: tuple[float, ...]) -> None:
    truth, held, runs = 100 * (rates[1] - rates[2]), 0, 1000
    for counts in np.random.default_rng(0).multinomial(2000, rates, size=runs).tolist():
        found = drop_points(*paired(*counts))
        held += found.low <= truth <= found.high
    assert 0.93 <= held / runs <= 0.99


def test_unpaired_and_empty_hits_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 3"):
        drop_points(np.ones(2, bool), np.ones(3, bool))
    with pytest.raises(ValueError, match="0 of 0"):
        drop_points(np.ones(0, bool), np.ones(0, bool))


def test_ranks_count_the_classes_before_the_right_one() -> None:
    logits = np.array([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]], np.float32)
    assert ranks(logits, np.array([1, 2, 0])).tolist() == [0, 1, 2]


def test_network_that_says_the_same_of_all_classes_is_right_by_chance_only() -> None:
    found = ranks(np.zeros((4, 4), np.float32), np.arange(4))
    assert found.tolist() == [0, 1, 2, 3]


def test_ranks_agree_with_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    logits: NDArray[np.float32] = rng.integers(0, 4, (50, 9)).astype(np.float32)  # many are equal
    labels = rng.integers(0, 9, 50)
    order = np.argsort(-logits, axis=1, kind="stable")
    assert ranks(logits, labels).tolist() == [
        row.tolist().index(label) for row, label in zip(order, labels, strict=True)
    ]


def test_sqnr_of_a_tenth_is_twenty_decibel() -> None:
    reference = np.array([[3.0, 4.0], [30.0, 40.0]], np.float32)
    assert sqnr_db(reference, reference * np.float32(1.1)) == pytest.approx([20, 20], abs=1e-4)
    assert sqnr_db(reference, reference + np.array([[0.5, 0.0]], np.float32)) == pytest.approx([20, 40], abs=1e-4)


def test_sqnr_of_equal_and_of_vanishing_logits_is_finite() -> None:
    logits = np.array([[1.0, -2.0], [0.0, 0.0]], np.float32)
    found = sqnr_db(logits, logits)
    assert found[0] == pytest.approx(MAX_SQNR_DB) and np.isfinite(found).all()
    assert np.isfinite(sqnr_db(np.zeros((1, 2)), np.ones((1, 2)))).all()
