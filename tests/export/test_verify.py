"""Outputs against the reference: the limits, near ties, what is not finite, features of any scale."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgevit.errors import UnknownNameError
from edgevit.export.verify import LIMITS, compare_outputs, cosine, top1_agreement
from edgevit.specs import Parity

LIMIT, COSINE = LIMITS["fp32"]
WITHIN, BEYOND = 0.9 * LIMIT, 1.1 * LIMIT  # off the limit itself, which float32 cannot hold

Array = NDArray[np.float32]


def logits(*rows: list[float]) -> Array:
    return np.array(rows, np.float32)


def noise(*shape: int, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


def compare(expected: Array, actual: Array, name: str = "logits") -> Parity:
    return compare_outputs({name: expected}, {name: actual}, "fp32", "fake")


# ---- logits


def test_equal_outputs_pass_with_nothing_between_them() -> None:
    parity = compare(noise(4, 10), noise(4, 10))
    assert parity.passed
    assert (parity.inputs, parity.max_abs, parity.top1_agreement) == (4, 0.0, 1.0)
    assert parity.cosine == pytest.approx(1.0, abs=1e-12)
    assert (parity.max_abs_limit, parity.cosine_limit, parity.runtime) == (LIMIT, COSINE, "fake")


def test_one_logit_beyond_the_limit_fails_and_within_it_passes() -> None:
    expected = noise(4, 10)
    for distance, passes in ((WITHIN, True), (BEYOND, False)):
        actual = expected.copy()
        actual[2, np.argmin(expected[2])] -= distance  # the smallest: top-1 stays
        parity = compare(expected, actual)
        assert parity.max_abs == pytest.approx(distance, rel=1e-3)  # float32 near 1 has steps of 1e-7
        assert parity.top1_agreement == 1.0
        assert parity.passed is passes


def test_small_logits_within_the_limit_still_fail_by_their_direction() -> None:
    parity = compare(logits([3e-4, 0.0]), logits([3e-4, 1e-4]))
    assert parity.max_abs < LIMIT
    assert parity.cosine == pytest.approx(3 / 10**0.5, abs=1e-6)  # float32
    assert not parity.passed


def test_another_scale_has_the_same_direction_and_fails_all_the_same() -> None:
    parity = compare(noise(4, 10), 2 * noise(4, 10))
    assert parity.cosine == pytest.approx(1.0, abs=1e-12)
    assert not parity.passed


def test_a_near_tie_is_no_disagreement() -> None:
    parity = compare(logits([1.0, 1.0 + WITHIN, 0.0]), logits([1.0 + WITHIN, 1.0, 0.0]))
    assert parity.top1_agreement == 1.0
    assert parity.passed


def test_another_class_by_more_than_a_tie_fails_although_each_logit_is_within_the_limit() -> None:
    parity = compare(logits([1.0, 1.0 + 1.5 * LIMIT, 0.0]), logits([1.0 + WITHIN, 1.0 + 0.7 * LIMIT, 0.0]))
    assert parity.max_abs < LIMIT
    assert parity.top1_agreement == 0.0
    assert not parity.passed


def test_one_picture_of_another_class_fails_all() -> None:
    expected = np.eye(4, dtype=np.float32)
    agreement = top1_agreement(expected, expected[[0, 1, 2, 0]], LIMIT)
    assert agreement == 0.75
    assert not compare(expected, expected[[0, 1, 2, 0]]).passed


def test_one_class_alone_agrees_with_itself() -> None:
    assert compare(noise(2, 1), noise(2, 1)).passed


# ---- what is not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["actual", "expected", "both"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf - inf, on purpose
def test_what_is_not_finite_fails(value: float, where: str) -> None:
    expected, actual = noise(4, 10), noise(4, 10)
    for array in {"actual": [actual], "expected": [expected], "both": [actual, expected]}[where]:
        array[1, 3] = value
    parity = compare(expected, actual)
    assert not parity.passed
    assert not parity.record()["passed"]
    assert not np.isnan(parity.max_abs)  # the manifest's JSON has no NaN, and a message should not say nan


def test_one_picture_of_four_that_is_wrong_is_seen() -> None:
    good = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32) * np.array([[100], [100], [100], [0.01]])
    bad = good.copy()
    bad[3] *= -1
    assert cosine(good, bad) > COSINE
    parity = compare(good.astype(np.float32), bad.astype(np.float32))
    assert not parity.passed and parity.cosine == pytest.approx(-1.0)


def test_a_cosine_of_what_is_not_finite_is_the_worst_there_is() -> None:
    assert cosine(logits([1.0, np.nan]), logits([1.0, 1.0])) == -1.0


def test_zeros_equal_zeros_and_nothing_else() -> None:
    zeros = logits([0.0, 0.0])
    assert cosine(zeros, zeros) == 1.0
    assert cosine(zeros, logits([0.0, 1e-30])) == 0.0


def test_large_values_do_not_overflow() -> None:
    large = noise(1, 10, scale=1e38)
    assert cosine(large, large) == pytest.approx(1.0, abs=1e-12)


# ---- features


def test_features_are_compared_relative_to_the_scale_of_their_map() -> None:
    expected = noise(2, 4, 8, 8, scale=100.0)
    for distance, passes in ((100 * WITHIN, True), (120 * LIMIT, False)):
        actual = expected.copy()
        actual[1, 2, 3, 4] += distance
        parity = compare(expected, actual, "feature0")
        # the draw's root mean square is within 5 % of 100: 512 samples
        assert parity.max_abs == pytest.approx(distance / 100, rel=0.05)
        assert parity.passed is passes
        assert parity.top1_agreement is None


def test_maps_below_one_are_compared_as_they_are() -> None:
    expected = noise(2, 4, 8, 8, scale=0.5)
    actual = expected.copy()
    actual[0, 0, 0, 0] += WITHIN
    assert compare(expected, actual, "feature0").max_abs == pytest.approx(WITHIN, rel=1e-3)  # float32 near 1


def test_logits_get_no_such_allowance() -> None:
    expected = noise(1, 10, scale=100.0)
    actual = expected.copy()
    actual[0, np.argmin(expected)] -= 10 * LIMIT
    assert not compare(expected, actual).passed


def test_the_worst_output_decides() -> None:
    good, bad = noise(1, 4, 8, 8), noise(1, 4, 8, 8)
    bad[0, 0, 0, 0] += 0.5
    parity = compare_outputs({"feature0": good, "tokens": good}, {"feature0": good, "tokens": bad}, "fp32", "fake")
    assert parity.max_abs == pytest.approx(0.5, rel=0.05)  # relative to a root mean square near 1
    assert parity.cosine < COSINE
    assert not parity.passed


# ---- the request


def test_a_precision_without_limits_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown precision 'fp8'"):
        compare_outputs({"logits": noise(1, 2)}, {"logits": noise(1, 2)}, "fp8", "fake")


def test_the_inputs_are_left_alone() -> None:
    expected, actual = noise(2, 3), noise(2, 3)
    compare(expected, actual)
    assert np.array_equal(expected, noise(2, 3)) and np.array_equal(actual, noise(2, 3))
