"""How counts are distributed over ids, from a histogram that stays small whatever their number.

A log of n rows has at most sqrt(2n) different counts, so the histogram of whole counts is exact.
Counts that decay are all different: those that are not whole share bins of a relative width of at
most 1/1024, which keep the sum of what is in them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
TOP_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
TAIL_SHARE = 0.2  # the ids that make up the last fifth of the rows
_MANTISSA = 2048  # parts of [0.5, 1), and so bins of a relative width of 1/1024 at most


class Histogram(NamedTuple):
    """How many ids have which count, by ascending count."""

    keys: np.ndarray  # float64 [h], the count, or where it is not whole the middle of its bin
    numbers: np.ndarray  # int64 [h], ids, at least one
    weights: np.ndarray  # float64 [h], sum of their counts

    @property
    def values(self) -> np.ndarray:
        """The mean count in each bin: float64 [h]; the count itself where it is whole."""
        return self.weights / self.numbers

    @property
    def size(self) -> int:
        """The number of ids."""
        return int(self.numbers.sum())

    @property
    def total(self) -> float:
        """The sum of all counts."""
        return float(self.weights.sum())


def as_lists(counts: Histogram) -> list[list[float]]:
    """A histogram as JSON can hold it."""
    return [column.tolist() for column in counts]


def from_lists(columns: list[list[float]]) -> Histogram:
    """The inverse of `as_lists`."""
    kinds = (np.float64, np.int64, np.float64)
    return Histogram(*map(np.array, columns, kinds))


def histogram(counts: np.ndarray) -> Histogram:
    """The histogram of counts, [n], none of them negative."""
    counts = np.asarray(counts, np.float64)
    mantissa, exponent = np.frexp(counts)
    middle = np.ldexp((np.floor(mantissa * _MANTISSA) + 0.5) / _MANTISSA, exponent)
    keys = np.where(counts == np.rint(counts), counts, middle)
    return _by_key(keys, np.ones(len(counts), np.int64), counts)


def merge(histograms: Iterable[Histogram]) -> Histogram:
    """The histogram of the ids of several, which have none in common."""
    parts = [*histograms, histogram(np.empty(0))]
    return _by_key(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _by_key(keys: np.ndarray, numbers: np.ndarray, weights: np.ndarray) -> Histogram:
    keys, codes = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(keys), np.int64)
    np.add.at(sums, codes, numbers)
    return Histogram(keys, sums, np.bincount(codes, weights, len(keys)))


def gini(counts: Histogram) -> float:
    """The Gini coefficient: 0 where all counts are equal, towards 1 where one id has all rows.

    sum_i (2i - n - 1) x_i / (n sum_i x_i) with x ascending and i from 1, bin by bin.
    """
    if counts.total == 0:
        return 0.0
    size, below = counts.size, np.cumsum(counts.numbers) - counts.numbers
    ranks = 2.0 * below + counts.numbers - size  # mean of 2i - n - 1 over the ids of a bin
    return float((ranks * counts.weights).sum() / (size * counts.total))


def quantiles(counts: Histogram) -> dict[str, float]:
    """For each share of QUANTILES the smallest count that so many of the ids do not exceed."""
    up_to, values = np.cumsum(counts.numbers), counts.values
    described = {}
    for share in QUANTILES:
        place = np.searchsorted(up_to, max(1, np.ceil(share * counts.size)))
        described[f"{share:g}"] = float(values[place]) if len(values) else 0.0
    return described


def top(counts: Histogram, number: int) -> tuple[float, float]:
    """The sum of the `number` largest counts, at least 1 and at most all, and the smallest."""
    numbers, values = counts.numbers[::-1], counts.values[::-1]
    taken = np.clip(number - (np.cumsum(numbers) - numbers), 0, numbers)
    return float((taken * values).sum()), float(values[taken > 0][-1])


def rarest(counts: Histogram, share: float) -> int:
    """The largest number of ids whose counts make up no more than this share of the total."""
    left = share * counts.total - (np.cumsum(counts.weights) - counts.weights)
    with np.errstate(divide="ignore"):  # ids with a count of 0 fit as long as anything does
        fitting = np.floor(left / counts.values)
    return int(np.clip(fitting, 0, counts.numbers)[left >= 0].sum())


def log_bins(counts: Histogram) -> list[dict[str, Any]]:
    """The numbers of ids with counts from 1, 2, 4, 8, … to below the next; [] when all are 0."""
    known = counts.keys >= 1
    if not known.any():
        return []
    powers = np.frexp(counts.keys[known])[1] - 1
    numbers = np.zeros(powers.max() + 1, np.int64)
    np.add.at(numbers, powers, counts.numbers[known])
    return [{"from": 2**power, "ids": int(ids)} for power, ids in enumerate(numbers)]


def concentration(counts: Histogram) -> list[dict[str, float]]:
    """The share of the rows that the most frequent ids have, for growing shares of the ids."""
    numbers = sorted({max(1, int(np.rint(share * counts.size))) for share in TOP_SHARES})
    return [
        {
            "share_of_ids": number / counts.size,
            "share_of_rows": top(counts, number)[0] / counts.total,
        }
        for number in (numbers if counts.total else ())
    ]


def describe(counts: Histogram, head_share: float) -> dict[str, Any]:
    """Head, tail, Gini coefficient and quantiles of the counts of a side, for a manifest.

    `head_share` is the share of the ids, in (0, 1], that is the head; it is at least one id.
    """
    size, total = counts.size, counts.total
    described = {"ids": size, "rows": total, "gini": gini(counts), "quantiles": quantiles(counts)}
    if not total:
        return described
    once = (counts.keys > 0) & (counts.keys <= 1)  # also what decayed below 1

    def share_of(ids: int) -> dict[str, Any]:
        return {"ids": ids, "share_of_ids": ids / size}

    number = max(1, int(np.rint(head_share * size)))
    rows, smallest = top(counts, number)
    rows_of_once = float(counts.weights[once].sum())
    return described | {
        "head": share_of(number) | {"share_of_rows": rows / total, "smallest_count": smallest},
        "seen_once": share_of(int(counts.numbers[once].sum()))
        | {"share_of_rows": rows_of_once / total},
        "tail": {"share_of_rows": TAIL_SHARE} | share_of(rarest(counts, TAIL_SHARE)),
    }


def as_text(described: dict[str, Any], noun: str) -> list[str]:
    """What `describe` gives as a few lines of text; `noun` is what the ids are, in the plural."""
    shown = [
        f"{quantile_name(share)} {_number(count)}"
        for share, count in described["quantiles"].items()
    ]
    lines = [f"{noun}: Gini {described['gini']:.3f}; rows of one: {', '.join(shown)}"]
    if "head" in described:
        head, once, tail = (described[name] for name in ("head", "seen_once", "tail"))
        smallest = _number(head["smallest_count"])
        lines += [
            f"{noun}, head: {head['ids']:,} ({head['share_of_ids']:.2%}) have "
            f"{head['share_of_rows']:.2%} of the rows, {smallest} or more each",
            f"{noun} seen once: {once['ids']:,} ({once['share_of_ids']:.2%}) with "
            f"{once['share_of_rows']:.2%} of the rows",
            f"{noun}, tail: {tail['ids']:,} ({tail['share_of_ids']:.2%}) share the last "
            f"{tail['share_of_rows']:.0%} of the rows",
        ]
    return lines


def quantile_name(share: str) -> str:
    """What a quantile is called, from its share of the ids."""
    return {"0": "least", "0.5": "median", "1": "most"}.get(share, f"{float(share):.0%}")


def _number(count: float) -> str:
    return f"{count:,.0f}" if count == round(count) else f"{count:,.3f}"
