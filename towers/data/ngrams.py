"""Texts → codes of their words and of their groups of three characters, by hashing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from towers.data.lists import Lists

MOST_CODES = 64  # of one text; the rest is left out, groups of characters first
_SIZE = 3  # characters in a group
_TEXTS_A_STEP = 65_536


def text_codes(texts: Sequence[str], num_buckets: int) -> Lists:
    """The codes of texts, 1 … num_buckets: of each its words first, then its character trigrams.

    Letters count as lower case, words end at white space. A word is hashed with a space on either
    side, and so are its trigrams: `tea` gives " tea ", " te", "tea" and "ea ". Words of languages
    without spaces are found through their trigrams. The hash is the same on every machine.

    Args:
      texts: V of them; an empty one has no codes.
      num_buckets: different codes, at least 1; texts that share one are told apart by the others.
    """
    values, sizes = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for start in range(0, len(texts), _TEXTS_A_STEP):
        codes = _codes(tf.constant(texts[start : start + _TEXTS_A_STEP], tf.string), num_buckets)
        values.append(codes.values.numpy())
        sizes.append(codes.row_lengths().numpy())
    return Lists.of(np.concatenate(values), np.concatenate(sizes))


def _codes(texts: tf.Tensor, num_buckets: int) -> tf.RaggedTensor:
    words = tf.strings.split(tf.strings.lower(texts, encoding="utf-8"))  # [V, words]
    bounded = tf.ragged.map_flat_values(lambda word: tf.strings.join([" ", word, " "]), words)
    characters = tf.strings.unicode_split(bounded, "UTF-8")  # [V, words, characters]
    groups = tf.strings.ngrams(characters, _SIZE, separator="").merge_dims(1, 2)
    terms = tf.concat([bounded, groups], axis=1)[:, :MOST_CODES]
    return tf.ragged.map_flat_values(
        lambda term: 1 + tf.cast(tf.strings.to_hash_bucket_fast(term, num_buckets), tf.int32),
        terms,
    )
