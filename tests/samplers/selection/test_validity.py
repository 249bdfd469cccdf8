import numpy as np
import tensorflow as tf
from table_encoders import seen_by

from samplers.candidates import Batch
from samplers.selection.validity import (
    hit_filter,
    num_rows,
    per_query_mask,
    weigh_rows,
    without_padding,
)

IDS = tf.constant([4, 7, 4, 9], tf.int64)
BATCH = Batch(tf.constant([0, 1, 2, 3], tf.int64), IDS)


def test_nothing_to_mask_is_none():
    assert hit_filter(BATCH, IDS, mask_accidental_hits=False) is None
    assert per_query_mask(BATCH, IDS[:, None], mask_accidental_hits=False) is None


def test_columns_with_the_rows_own_positive_are_hits():
    columns = tf.concat([IDS, [7]], axis=0)
    valid = hit_filter(BATCH, columns, mask_accidental_hits=True)(tf.range(5)).numpy()
    assert np.argwhere(~valid).tolist() == [[0, 0], [0, 2], [1, 1], [1, 4], [2, 0], [2, 2], [3, 3]]
    some = hit_filter(BATCH, columns, mask_accidental_hits=True)(tf.constant([2, 4, 9])).numpy()
    np.testing.assert_array_equal(some, valid[:, [2, 4, 4]])


def test_masks_are_combined():
    chosen = [[7], [7], [], [4, 9]]
    batch = BATCH._replace(seen=seen_by(chosen).hits(BATCH.query_ids, IDS))
    valid = hit_filter(batch, IDS, mask_accidental_hits=True)(tf.range(4)).numpy()
    assert valid.tolist() == [
        [False, False, False, True],
        [True, False, True, True],
        [False, True, False, True],
        [False, True, False, False],
    ]
    later = hit_filter(batch, IDS[1:], mask_accidental_hits=True, first=1)(tf.range(1, 4))
    assert later.numpy()[:, :2].tolist() == valid[:, 2:].tolist()  # the third does not exist
    drawn = tf.constant([[4, 7, 1], [4, 7, 1], [4, 7, 1], [4, 7, 1]], tf.int64)
    allowed = per_query_mask(batch, drawn, mask_accidental_hits=True, seen=seen_by(chosen)).numpy()
    assert allowed.tolist() == [
        [False, False, True],
        [True, False, True],
        [False, True, True],
        [False, True, True],
    ]


def test_padding_is_no_column():
    batch = BATCH._replace(valid=tf.constant([True, True, True, False]))
    assert without_padding(tf.zeros(4), batch).numpy().tolist() == [0, 0, 0, -np.inf]
    assert (int(num_rows(batch)), int(num_rows(BATCH))) == (3, 4)


def test_rows_are_weighed_and_padding_is_0():
    batch = BATCH._replace(
        weight=tf.constant([1.0, 2.0, 0.5, 1.0]), valid=tf.constant([True, True, True, False])
    )
    assert weigh_rows(tf.constant([1.0, 1, 1, 1]), batch).numpy().tolist() == [1, 2, 0.5, 0]
