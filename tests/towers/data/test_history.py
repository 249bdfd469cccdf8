"""What was chosen before each row of a split, against a loop over all rows."""

import numpy as np
import pytest

from pipeline.contract import schema
from towers.data.dataframe import from_dataframe
from towers.data.history import Before


@pytest.fixture(scope="module")
def timed(pairs):
    """Random pairs with few different times, split without regard to them."""
    times = np.random.default_rng(4).integers(0, 6, len(pairs))
    settings = {"user": "user_id", "item": "item_id", "validation_ratio": 0.2}
    return from_dataframe(pairs.assign(time=times), timestamp="time", **settings)


def rows_of(data, split):
    columns = (schema.QUERY_ID, schema.CANDIDATE_ID, schema.TIMESTAMP)
    return list(zip(*(data.arrays(split)[name].tolist() for name in columns), strict=True))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_earlier_splits_and_earlier_rows_of_the_split(timed, split):
    before = Before.rows_of(timed, split)
    rows = rows_of(timed, split)
    codes = before.codes(np.arange(len(rows)))
    assert len(codes) == len(before.sizes) == len(rows)
    splits = schema.SPLITS[: schema.SPLITS.index(split)]
    prepared = [row for name in splits for row in rows_of(timed, name)]
    for (query, _, time), history in zip(rows, codes.tolist(), strict=True):
        known = [(t, 0, c) for q, c, t in prepared if q == query]
        known += [(t, 1, c) for q, c, t in rows if q == query and t < time]
        history = [code - 1 for code in history if code]
        assert sorted(history) == sorted(c for _, _, c in known)
        group_and_time = {c: (late, t) for t, late, c in known}
        assert sorted(map(group_and_time.get, history)) == [group_and_time[c] for c in history]


def test_histories_of_some_rows_are_as_wide_as_the_longest(timed):
    before = Before.rows_of(timed, "test")
    rows = np.argsort(before.sizes)[:3]
    assert before.codes(rows).shape == (3, before.sizes[rows].max())
    assert before.codes(rows[:0]).shape == (0, 0)


def test_data_without_times_are_refused(data):
    with pytest.raises(ValueError, match="a live history needs times"):
        Before.rows_of(data, "test")
