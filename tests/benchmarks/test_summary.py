from __future__ import annotations

import math

import pytest

from benchmarks.summary import Summary, fit, fit_power, ratio, summarise


def test_summary_has_the_middle_the_extremes_and_the_count() -> None:
    assert summarise([3.0, 1.0, 10.0]) == Summary(median=3.0, low=1.0, high=10.0, count=3)


def test_median_of_an_even_number_lies_between_the_middle_two() -> None:
    assert summarise([1.0, 2.0, 4.0, 9.0]).median == 3.0


def test_ratio_says_how_many_times_as_long_the_first_takes() -> None:
    assert ratio(summarise([8.0]), summarise([2.0])) == 4.0


@pytest.mark.parametrize("missing", [0, 1], ids=["first", "second"])
def test_ratio_with_something_that_was_not_measured_is_none(missing: int) -> None:
    pair = [summarise([1.0]), summarise([1.0])]
    assert ratio(*(None if place == missing else one for place, one in enumerate(pair))) is None


def test_fit_finds_the_line_through_points_on_one() -> None:
    line = fit([1, 2, 3], [5, 7, 9])
    assert (line.offset, line.slope, line.r_squared) == pytest.approx((3, 2, 1))


def test_fit_explains_less_of_points_beside_the_line() -> None:
    assert fit([1, 2, 3, 4], [1, 3, 2, 4]).r_squared == pytest.approx(0.64)


def test_fit_of_a_level_line_explains_everything() -> None:
    line = fit([1, 2, 3], [4, 4, 4])
    assert (line.slope, line.r_squared) == (0, 1)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_fit_power_finds_the_exponent(exponent: float) -> None:
    xs = [10.0, 30.0, 100.0]
    line = fit_power(xs, [7 * x**exponent for x in xs])
    assert (line.slope, math.exp(line.offset)) == pytest.approx((exponent, 7))
