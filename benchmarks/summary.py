"""Medians, spreads, ratios and fits: what is done to measured numbers. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Line", "Summary", "fit", "fit_power", "ratio", "summarise"]


@dataclass(frozen=True, slots=True)
class Summary:
    """Several measurements of one thing: the middle one, the least, the greatest, and how many."""

    median: float
    low: float
    high: float
    count: int


def summarise(values: Sequence[float]) -> Summary:
    """Summarise at least one measurement."""
    return Summary(statistics.median(values), min(values), max(values), len(values))


def ratio(slower: Summary | None, faster: Summary | None) -> float | None:
    """Return how many times the second's median fits into the first's; None where one was not measured."""
    if slower is None or faster is None or faster.median <= 0:
        return None
    return slower.median / faster.median


@dataclass(frozen=True, slots=True)
class Line:
    """y = offset + slope * x, and the share of the variance of y that it explains."""

    offset: float
    slope: float
    r_squared: float


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Fit a line by least squares, to at least two different x."""
    correlation = statistics.correlation(xs, ys) if len(set(ys)) > 1 else 1.0  # a level line explains everything
    slope, offset = statistics.linear_regression(xs, ys)
    return Line(offset, slope, correlation**2)


def fit_power(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Fit y = c * x**e: the slope is the exponent e, 1 where y grows as x does; the offset is the logarithm of c."""
    return fit([math.log(x) for x in xs], [math.log(y) for y in ys])
