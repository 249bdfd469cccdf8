"""Mean and standard deviation that do not depend on the order in which numbers are added up.

A sum of floating-point numbers depends on its order, so on how the work was cut. A float64 is a
whole number of tiny units, and sums of whole numbers do not: here they are Python integers.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

LARGEST = 1e150  # of the numbers that `Moments` takes: their squares stay finite
_UNIT = 1130  # sums count units of 2^-1130, smaller than the last bit of any float64
_HALF = 26  # bits of the lower half of a mantissa


class Moments(NamedTuple):
    """The number of values, their exact sum, and that of their squares, in units of 2^-1130."""

    number: int = 0
    total: int = 0
    squares: int = 0

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """The moments of finite numbers, float64 [n], none above `LARGEST`."""
        values = np.asarray(values, np.float64)
        square, error = _exact_square(values)
        return cls(len(values), _exact_sum(values), _exact_sum(square) + _exact_sum(error))

    def plus(self, other: Moments) -> Moments:
        """The moments of both sets of values together."""
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def mean(self) -> float:
        """The mean, rounded once; 0 of no values."""
        return float(Fraction(self.total, self.number << _UNIT)) if self.number else 0.0

    @property
    def std(self) -> float:
        """The standard deviation, divided by n; 1 where all values are equal."""
        if not self.number:
            return 1.0
        mean = Fraction(self.total, self.number << _UNIT)
        variance = float(Fraction(self.squares, self.number << _UNIT) - mean * mean)
        return math.sqrt(max(variance, 0.0)) or 1.0  # below 0 where squares are too small to hold


def _exact_sum(values: np.ndarray) -> int:
    mantissa, exponent = np.frexp(values)
    whole = np.ldexp(mantissa, 53).astype(np.int64)  # values = whole · 2^(exponent - 53)
    exponents, codes = np.unique(exponent, return_inverse=True)
    total = 0
    for part, shift in ((whole >> _HALF, _HALF), (whole & ((1 << _HALF) - 1), 0)):
        sums = np.zeros(len(exponents), np.int64)
        np.add.at(sums, codes, part)  # 27 bits each: no overflow below 2^36 values
        for sum_, power in zip(sums.tolist(), exponents.tolist(), strict=True):
            total += sum_ << (shift + power - 53 + _UNIT)
    return total


def _exact_square(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two float64 [n] whose sum is the square of a value without error, unless it is tiny.

    Dekker, Numerische Mathematik 18 (1971), doi:10.1007/BF01397083.
    """
    square = values * values
    scaled = values * (2.0**27 + 1)
    high = scaled - (scaled - values)
    low = values - high
    return square, ((high * high - square) + 2 * high * low) + low * low
