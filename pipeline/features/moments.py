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


class Moments(NamedTuple):
    """The number of values, their exact sum in units of 2^-1130, of their squares in 2^-2260."""

    number: int = 0
    total: int = 0
    squares: int = 0

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """The moments of finite numbers, float64 [n], none above `LARGEST`."""
        mantissa, exponent = np.frexp(np.asarray(values, np.float64))
        whole = np.ldexp(mantissa, 53).astype(np.int64)  # values = whole · 2^(exponent - 53)
        total = squares = 0
        for power in np.unique(exponent).tolist():
            alike = whole[exponent == power].tolist()
            shift = power - 53 + _UNIT
            total += sum(alike) << shift
            squares += sum(number * number for number in alike) << 2 * shift
        return cls(len(whole), total, squares)

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
        variance = Fraction(self.squares, self.number << 2 * _UNIT) - mean * mean
        return math.sqrt(float(variance)) or 1.0
