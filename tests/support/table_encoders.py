"""Encoders that look rows up in two tables, and what queries have seen."""

import numpy as np
import tensorflow as tf

import samplers


def make_encoders(queries, table, batch):
    return samplers.Encoders(
        query=tf.gather(queries, batch.query_ids),
        positive=tf.gather(table, batch.candidate_ids),
        candidates=lambda ids: tf.gather(table, ids),
        corpus=lambda: tf.convert_to_tensor(table),
        queries=lambda ids: tf.gather(queries, ids),
    )


def seen_by(lists):
    """The train positives of query 0, 1, ... in the form that methods take."""
    rows = [sorted(set(ids)) for ids in lists]
    flat = np.array([candidate for row in rows for candidate in row], np.int64)
    return samplers.Seen(flat, np.cumsum([0, *map(len, rows)]))


def seen_hits(seen, column_ids):
    """`Batch.seen` from candidates of each row [B, S], padded with -1."""
    hits = (np.asarray(column_ids)[None, :, None] == np.asarray(seen)[:, None, :]).any(-1)
    return tf.constant(np.concatenate([np.argwhere(hits), [[0, -1]]]), tf.int64)
