"""The rule of the split and the hash behind it, which preparation and notebooks share."""

import numpy as np
import pytest

from pipeline.contract import hashing


def splitmix64(state):
    """The step in Python integers."""
    mask = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_splitmix64_is_the_published_one():
    # The first outputs of the reference implementation with seed 1234567.
    outputs = [splitmix64(1234567 + k * 0x9E3779B97F4A7C15) for k in range(2)]
    assert outputs == [6457827717110365317, 3203168211198807973]


def test_row_hash_is_splitmix64_of_all_that_it_gets():
    a, b = np.array([0, 1, -1, 2**62]), np.array([5, 6, 7, -8])
    expected = []
    for values in zip(a.tolist(), b.tolist(), strict=True):
        state = splitmix64(10)
        for value in (hashing.fingerprint("split"), *values):
            state = splitmix64(state ^ (value % 2**64))
        expected.append(state)
    assert hashing.row_hash(10, "split", a, b).tolist() == expected


def test_row_hash_golden_values():
    hashes = hashing.row_hash(10, "split", np.array([0, 1, -1]), np.array([5, 6, 7]))
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [16705236570897383432, 1154692661927397504, 8112112227489350065]


def test_row_hash_depends_on_seed_salt_and_order_of_columns():
    a, b = np.arange(50), np.arange(50)[::-1].copy()
    plain = hashing.row_hash(1, "x", a, b)
    for other in (
        hashing.row_hash(2, "x", a, b),
        hashing.row_hash(1, "y", a, b),
        hashing.row_hash(1, "x", b, a),
    ):
        assert not (plain == other).any()


def test_row_hash_is_even():
    shares = hashing.row_hash(0, "x", np.arange(100_000)) / 2.0**64
    counts, _ = np.histogram(shares, 20, (0, 1))
    assert (abs(counts - 5000) < 5 * np.sqrt(5000)).all()


def test_split_sizes_by_hand():
    sizes = hashing.split_sizes(np.array([1, 2, 3, 5, 10, 20]), 0.8, 0.1)
    # not test: 1, rint(1.6) 2, rint(2.4) 2, 4, 8, 16; validation: rint(.1, .2, .2, .4, .8, 1.6)
    assert [part.tolist() for part in sizes] == [
        [1, 2, 2, 4, 7, 14],
        [0, 0, 0, 0, 1, 2],
        [0, 0, 1, 1, 2, 4],
    ]


def test_split_sizes_round_halves_to_even_and_keep_a_train_row():
    train, validation, test = hashing.split_sizes(np.array([1, 3, 5]), 0.5, 0.9)
    assert (train + validation + test).tolist() == [1, 3, 5]
    assert (train + validation).tolist() == [1, 2, 2]  # at least 1, rint(1.5), rint(2.5)
    assert train.tolist() == [1, 1, 1]


@pytest.mark.parametrize("ratios", [(0, 0), (1.1, 0), (0.8, 1), (0.8, -0.1)])
def test_wrong_ratios_are_errors(ratios):
    with pytest.raises(ValueError, match="ratio must be"):
        hashing.split_sizes(np.array([1]), *ratios)


def test_split_codes_cut_each_query_in_order():
    queries = np.array([7, 3, 7, 7, 3, 7, 7])
    order = np.array([5, 1, 4, 3, 0, 2, 1])
    codes = hashing.split_codes(queries, order, train_ratio=0.6, validation_ratio=0.4)
    # 7 has 5 rows: 2 train, 1 validation, 2 test. 3 has 2 rows: rint(1.2) = 1 train, 1 test.
    assert codes.tolist() == [2, 2, 2, 1, 0, 0, 0]
    assert codes.dtype == np.int8


def test_split_codes_first_key_decides_first():
    queries = np.zeros(4, np.int64)
    time, tie = np.array([2, 1, 1, 0]), np.array([0, 9, 3, 0])
    codes = hashing.split_codes(queries, time, tie, train_ratio=0.5)
    assert codes.tolist() == [2, 2, 0, 0]


def test_split_codes_do_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 20, 400)
    keys = hashing.row_hash(3, "x", queries, np.arange(400))
    codes = hashing.split_codes(queries, keys, train_ratio=0.8, validation_ratio=0.1)
    shuffled = rng.permutation(400)
    again = hashing.split_codes(
        queries[shuffled], keys[shuffled], train_ratio=0.8, validation_ratio=0.1
    )
    np.testing.assert_array_equal(again, codes[shuffled])


def test_split_codes_of_nothing():
    empty = np.array([], np.int64)
    assert len(hashing.split_codes(empty, empty, train_ratio=0.8)) == 0
