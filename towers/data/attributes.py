"""Attributes of the ids of one side, as prepared data hold them, and as arrays for a tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.attributes import with_values
from towers.data.ragged import Lists, first_distinct, first_values
from towers.data.shards import read_table

_LARGEST = 5.0  # standard deviations; numbers beyond are cut off there
_MAX_VALUES = 64  # of a multi-valued column; the rest of a longer list is left out
MAX_CODES = 64  # of one text; the rest is left out, groups of characters first
_GROUP = 3  # characters
_TEXTS_A_STEP = 65_536


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """The feature files of one side; `schema.FeatureSpec` says what they hold."""

    specs: tuple[schema.FeatureSpec, ...] = ()
    # [V], the row number is the dense id
    table: pa.Table = dataclasses.field(default_factory=lambda: pa.table({}))
    # [C], ids without interactions: raw_id, then the same columns
    cold: pa.Table = dataclasses.field(
        default_factory=lambda: pa.table({schema.RAW_ID: pa.array([], pa.string())})
    )
    values: Mapping[str, pa.Array] = dataclasses.field(default_factory=dict)  # by code - 1

    @property
    def rows(self) -> pa.Table:
        """The columns of all ids: [V + C]."""
        return pa.concat_tables([self.table, self.cold.select(self.table.column_names)])

    @classmethod
    def read(cls, root: Path, manifest: schema.Manifest, side: str) -> Features:
        """Those in a directory, none where it was prepared without."""
        specs = schema.feature_specs(manifest.details, side)
        if not specs:
            return cls()
        columns = [spec.name for spec in specs]
        columns += [spec.presence for spec in specs if spec.has_presence]
        table = read_table(root, manifest, f"{side}_features-", columns)
        values = {
            spec.name: read_table(root, manifest, spec.vocabulary, [schema.VALUE])[0]
            for spec in specs
            if spec.vocabulary
        }
        cold, names = table.schema.empty_table(), f"{side}_features_cold-"
        if manifest.files_of(names):
            cold = read_table(root, manifest, names, [schema.RAW_ID, *columns])
        return cls(specs, table, cold, {k: v.combine_chunks() for k, v in values.items()})


@dataclasses.dataclass(frozen=True)
class Column:
    """How a tower reads a column."""

    name: str
    kind: str  # one of `schema.FEATURE_KINDS`
    num_codes: int = 0  # codes are 1 … num_codes, and 0 for none; 0 for numbers
    width: int = 0  # codes of one id in a multi or text column
    spec: schema.FeatureSpec | None = None  # what its numbers were scaled by


Arrays = Mapping[str, Any]  # column → Lists, int64 [V] or float32 [V, 2], in NumPy or as tensors


def columns_of(features: Features, text_buckets: int) -> tuple[tuple[Column, ...], Arrays]:
    """How to read the columns, and their values by dense id, then those of cold ids: [V + C].

    Args:
      features: of the columns that are wanted.
      text_buckets: codes that the n-grams of texts are hashed to.
    """
    columns, arrays = [], {}
    for spec in features.specs:
        arrays[spec.name] = _values(features.rows, spec, text_buckets)
        num_codes, width = spec.size, 0
        if spec.kind == "text":
            sizes = np.diff(arrays[spec.name].offsets)[: len(features.table)]
            num_codes, width = text_buckets, min(int(sizes.max(initial=1)), MAX_CODES)
        elif spec.kind == "multi":
            width = min(max(spec.max_length, 1), _MAX_VALUES)
        elif spec.kind == "numeric":
            num_codes = 0
        columns.append(Column(spec.name, spec.kind, num_codes, width, spec))
    return tuple(columns), arrays


def raw_values(
    features: Features, names: Sequence[str], text_names: Sequence[str] = ()
) -> pa.Table:
    """Columns in the values and units of their table, null where missing: [V + C], cold ones last.

    Values that the vocabulary does not hold are missing; numbers have the precision of float32.
    Columns of `text_names` may be texts, too. A ValueError for columns that are not there, and for
    texts among `names`.
    """
    every = {spec.name: spec for spec in features.specs}
    if unknown := [name for name in text_names if name not in every]:
        raise ValueError(
            f"title_column must be among {', '.join(every) or 'none (no item_features)'}, got "
            f"{', '.join(unknown)}; change title_column."
        )
    specs = {name: spec for name, spec in every.items() if spec.kind != "text"}
    if unknown := [name for name in names if name not in specs]:
        raise ValueError(
            f"filter_columns must be among {', '.join(specs) or 'none (no item_features)'}, got "
            f"{', '.join(unknown)}: categories, lists and numbers of the items' table."
        )
    both = dict.fromkeys([*names, *text_names])
    return pa.table({name: _raw(features.rows, every[name], features.values) for name in both})


def _raw(table: pa.Table, spec: schema.FeatureSpec, values: Mapping[str, pa.Array]) -> pa.Array:
    column = table[spec.name].combine_chunks()
    if spec.kind == "text":
        return column
    if spec.kind == "categorical":
        return values[spec.name].take(pc.if_else(pc.equal(column, 0), None, pc.subtract(column, 1)))
    if spec.kind == "multi":
        flat = values[spec.name].take(pc.subtract(pc.list_flatten(column), 1))
        return with_values(column, flat)
    scaled = column.fill_null(0).to_numpy().astype(np.float64)
    numbers = scaled * spec.std + spec.mean
    # As many decimals as float32 kept: 20 is 20 again, and not 20.0000003, which is above it.
    kept = -np.log10(np.maximum(np.abs(scaled), 1e-7) * spec.std * 2**-23)
    decimals = np.clip(np.floor(kept), -300, 15).astype(int)
    for places in np.unique(decimals):
        rows = decimals == places
        numbers[rows] = np.round(numbers[rows], places)
    present = table[spec.presence] if spec.has_presence else pc.is_valid(column)
    return pa.array(numbers, mask=~present.to_numpy(zero_copy_only=False))


def _values(table: pa.Table, spec: schema.FeatureSpec, text_buckets: int) -> Any:
    column = table[spec.name]
    if spec.kind == "text":
        return text_codes(column.to_pylist(), text_buckets)
    if spec.kind == "multi":
        sizes = pc.list_value_length(column).to_numpy()
        return Lists.of(pc.list_flatten(column).to_numpy(), sizes)
    if spec.kind == "categorical":
        return column.to_numpy().astype(np.int64)
    numbers = np.clip(column.fill_null(0).to_numpy().astype(np.float32), -_LARGEST, _LARGEST)
    present = table[spec.presence].to_numpy() if spec.has_presence else np.ones(len(numbers), bool)
    return np.stack([numbers, present.astype(np.float32)], axis=1)


def read_column(column: Column, values: Any, ids: tf.Tensor) -> tf.Tensor:
    """The values of ids [...]: codes int64 [...] or [..., width], or numbers float32 [..., 2]."""
    if column.kind in ("multi", "text"):
        return first_values(values, ids, column.width)
    return tf.gather(values, ids)


def encode_column(column: Column, values: tf.Tensor, codes: Any) -> tf.Tensor:
    """Raw values of a request → what `read_column` gives of the same values in prepared data.

    Args:
      column: to read as.
      values: string [B], of a multi column [B, W], or float64 [B]; "" and NaN are missing.
      codes: a table of strings → codes, of a categorical or multi column.
    """
    if column.kind == "numeric":
        assert column.spec is not None
        present = ~tf.math.is_nan(values)
        scaled = tf.where(present, (values - column.spec.mean) / column.spec.std, 0.0)
        number = tf.clip_by_value(tf.cast(scaled, tf.float32), -_LARGEST, _LARGEST)
        there = present if column.spec.has_presence else tf.ones_like(present)
        return tf.stack([number, tf.cast(there, tf.float32)], axis=1)
    if column.kind == "text":
        return _codes(values, column.num_codes)[:, : column.width]
    found = tf.maximum(codes.lookup(values), 0)
    return first_distinct(found, column.width) if column.kind == "multi" else found


def text_codes(texts: Sequence[str], num_buckets: int) -> Lists:
    """The codes of texts, 1 … num_buckets: of each its words first, then its character trigrams.

    Letters count as lower case, words end at white space. A word is hashed with a space on either
    side, and so are its trigrams: `tea` gives " tea ", " te", "tea" and "ea ". Words of languages
    without spaces are found through their trigrams. The hash is the same on every machine.

    Args:
      texts: V of them; an empty one has no codes.
      num_buckets: different codes, at least 1; texts that share one are told apart by the others.
    """
    values, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, len(texts), _TEXTS_A_STEP):
        step = tf.constant(texts[start : start + _TEXTS_A_STEP], tf.string)
        codes = _codes(step, num_buckets).numpy()
        values.append(codes[codes > 0])
        sizes.append(np.count_nonzero(codes, axis=1))
    return Lists.of(np.concatenate(values), np.concatenate(sizes))


def _codes(texts: tf.Tensor, num_buckets: int) -> tf.Tensor:
    """The codes of texts: int64 [V, MAX_CODES], 0 after the last one of each.

    Dense operations: ragged ones are several times as many, and a request pays for each of them.
    """
    num_texts = tf.size(texts, tf.int64)
    split = tf.raw_ops.StringSplitV2(input=tf.strings.lower(texts, encoding="utf-8"), sep="")
    row, place = split.indices[:, 0], split.indices[:, 1]  # [words]
    words = tf.strings.join([" ", split.values, " "])
    sizes = tf.cast(tf.strings.length(words, "UTF8_CHAR"), tf.int64) - (_GROUP - 1)
    sizes = tf.minimum(sizes, MAX_CODES)  # groups of each word; more of them would be left out
    starts = tf.cumsum(sizes, exclusive=True)
    number = tf.range(tf.reduce_sum(sizes))  # [groups]
    ends = (starts + sizes)[None]
    word = tf.raw_ops.UpperBound(sorted_inputs=ends, values=number[None], out_type=tf.int64)[0]
    first = tf.cast(number - tf.gather(starts, word), tf.int32)  # its first letter in the word
    lengths = tf.fill(tf.shape(first), _GROUP)
    groups = tf.strings.substr(tf.gather(words, word), first, lengths, "UTF8_CHAR")
    num_words = tf.math.unsorted_segment_sum(tf.ones_like(row), row, num_texts)  # [V]
    num_groups = tf.math.unsorted_segment_sum(sizes, row, num_texts)
    offset = num_words - tf.cumsum(num_groups, exclusive=True)  # from a group's number to its place
    row_of_group = tf.gather(row, word)
    rows = tf.concat([row, row_of_group], 0)
    places = tf.concat([place, number + tf.gather(offset, row_of_group)], 0)
    places = tf.minimum(places, MAX_CODES)  # a column too many takes what is left out
    codes = 1 + tf.strings.to_hash_bucket_fast(tf.concat([words, groups], 0), num_buckets)
    table = tf.scatter_nd(tf.stack([rows, places], 1), codes, tf.stack([num_texts, MAX_CODES + 1]))
    return table[:, :MAX_CODES]
