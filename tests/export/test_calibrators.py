"""Ranges from values whose answer is known by hand or by brute force, whatever the order and the cut of the data."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
from numpy.typing import NDArray

from edgevit.errors import ExportError, UnknownNameError
from edgevit.export.quantize import Recipe
from edgevit.export.quantize.calibrators import CALIBRATORS, Observer, Range

CLIPPING = tuple(name for name in CALIBRATORS if name != "minmax")


def seen(calibrator: str, *arrays: NDArray[np.floating]) -> Range:
    observer = Observer(calibrator)
    for array in arrays:
        observer.update(array)
    return observer.range()


def bell(count: int = 200_000, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def int8_error(values: NDArray[np.float32], clip: float) -> float:
    """Mean squared error of 256 even steps between the ends that `clip` leaves."""
    low, high = max(min(float(values.min()), 0.0), -clip), min(max(float(values.max()), 0.0), clip)
    step = (high - low) / 255
    return float(((np.rint(np.clip(values, low, high) / step) * step - values) ** 2).mean())


def test_minmax_holds_everything_and_zero() -> None:
    assert seen("minmax", np.array([[2.0, 5.0]]), np.array([3.0])) == Range(0.0, 5.0)
    assert seen("minmax", np.array([-2.0, -5.0])) == Range(-5.0, 0.0)
    assert seen("minmax", np.array([-2.0]), np.array([1.0])) == Range(-2.0, 1.0)


def test_percentile_cuts_one_in_ten_thousand_at_either_end() -> None:
    values = np.linspace(-3, 1, 100_001)
    low, high = np.percentile(values, [0.01, 99.99])
    found = seen("percentile", values)
    bins = 4 / 8192  # the histogram reaches to the next power of two, 4
    assert (found.low, found.high) == pytest.approx((low, high), abs=bins)
    assert found.low > -3 and found.high < 1


def test_percentile_of_one_sign_begins_at_zero() -> None:
    assert seen("percentile", np.linspace(0.5, 1, 1000)).low == 0.0
    assert seen("percentile", -np.linspace(0.5, 1, 1000)).high == 0.0


def test_mse_finds_the_clip_that_brute_force_finds() -> None:
    for values in (bell(), np.random.default_rng(1).laplace(size=100_000).astype(np.float32), np.maximum(bell(), 0)):
        clips = np.linspace(0.02, 1, 100) * float(np.abs(values).max())
        best = min(int8_error(values, clip) for clip in clips)
        found = seen("mse", values)
        assert int8_error(values, max(-found.low, found.high)) <= 1.02 * best


def test_mse_and_entropy_give_up_one_outlier_and_minmax_does_not() -> None:
    values = np.append(bell(), np.float32(300))
    assert seen("minmax", values).high == 300
    assert seen("mse", values).high < 250
    assert seen("entropy", values).high < 150
    assert seen("percentile", values).high < 4.5


def test_entropy_keeps_even_values_whole_and_cuts_long_tails() -> None:
    even = np.linspace(-1, 1, 100_000, dtype=np.float32)
    assert seen("entropy", even) == Range(-1.0, 1.0)
    tails = np.random.default_rng(0).laplace(size=200_000).astype(np.float32)
    clipped = seen("entropy", tails)
    assert 4 < clipped.high < 0.95 * max(-float(tails.min()), float(tails.max()))


def test_entropy_is_not_drowned_by_the_zeros_of_a_relu() -> None:
    positive = np.abs(bell())
    with_zeros = np.concatenate([positive, np.zeros(20 * len(positive), np.float32)])
    assert seen("entropy", with_zeros) == seen("entropy", positive)


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_range_depends_on_neither_the_order_nor_the_cut_nor_the_shape(calibrator: str) -> None:
    values = np.concatenate([bell(30_000) * scale for scale in (0.001, 100, 1)])
    whole = seen(calibrator, values)
    assert seen(calibrator, *np.array_split(values[::-1], 7)) == whole
    assert seen(calibrator, values.reshape(10, 3, -1)) == whole


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize("sign", [1, -1])
def test_range_of_one_sign_has_zero_at_its_other_end(calibrator: str, sign: int) -> None:
    found = seen(calibrator, sign * np.abs(bell()))
    ends = (found.low, found.high)[::sign]
    assert ends[0] == 0.0 and 3 < abs(ends[1]) < 6


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_scaling_by_two_scales_the_range_exactly(calibrator: str) -> None:
    once, twice = seen(calibrator, bell()), seen(calibrator, 2 * bell())
    assert (twice.low, twice.high) == (2 * once.low, 2 * once.high)


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([0.0], 0, 0), ([0.0] * 5000, 0, 0), ([3.0] * 9, 0, 3), ([-3.0], -3, 0), ([1e-38], 0, 1e-38)],
)
def test_constant_and_vanishing_tensors_have_a_range(
    calibrator: str, values: list[float], low: float, high: float
) -> None:
    found = seen(calibrator, np.array(values, np.float32))
    assert found.low == pytest.approx(low) and found.high == pytest.approx(high)


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_largest_floats_do_not_overflow(calibrator: str) -> None:
    largest = float(np.finfo(np.float32).max)
    found = seen(calibrator, np.array([-largest, largest] * 100, np.float32))
    assert math.isfinite(found.low) and found.high == pytest.approx(largest, rel=0.02)


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor(calibrator: str, value: float) -> None:
    values = bell(1000)
    values[500] = value
    observer = Observer(calibrator, "layers.0.mlp/gelu")
    with pytest.raises(ExportError) as caught:
        observer.update(values)
    assert str(caught.value) == (
        "layers.0.mlp/gelu: NaN or infinity in its values on the calibration pictures, expected finite ones; "
        "check the weights, and that the float32 export verifies"
    )


def test_float16_and_double_and_integers_are_taken_and_empty_arrays_say_nothing() -> None:
    values = np.array([-3, 0, 4])
    for kind in (np.float16, np.float64, np.int64):
        assert seen("minmax", np.empty((0, 3)), values.astype(kind)) == Range(-3.0, 4.0)
        assert seen("percentile", np.empty((0, 3)), values.astype(kind)).low == pytest.approx(-3)
    with pytest.raises(ExportError, match="no value seen, expected at least one calibration picture"):
        seen("minmax", np.empty(0))


def test_range_may_be_asked_for_while_values_come_in() -> None:
    observer = Observer("percentile")
    observer.update(bell(seed=1))
    half = observer.range()
    assert observer.range() == half
    observer.update(3 * bell(seed=2))
    assert half.moved(observer.range())


def test_recipe_takes_the_calibrators_that_there_are() -> None:
    assert get_args(get_type_hints(Recipe)["calibrator"]) == CALIBRATORS


def test_unknown_calibrator_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="unknown calibrator 'min-max'; did you mean 'minmax'"):
        Observer("min-max")


@pytest.mark.parametrize(
    ("other", "moved"),
    [
        (Range(-1, 3), False),
        (Range(-1.39, 3.39), False),
        (Range(-1.41, 3), True),
        (Range(-1, 3.41), True),
        (Range(-1, 2.59), True),
        (Range(-0.5, 3), True),
    ],
)
def test_range_moved_where_an_end_lies_a_tenth_of_the_width_away(other: Range, moved: bool) -> None:
    assert Range(-1, 3).moved(other) is moved


def test_empty_range_moved_where_anything_came() -> None:
    assert not Range(0, 0).moved(Range(0, 0))
    assert Range(0, 0).moved(Range(0, 1e-6))
