"""Writes the shards of examples, and what TFDS needs to open their directory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.contract import schema
from pipeline.contract.files import written_aside


class Shard(NamedTuple):
    """One file of a split, and what is in it."""

    split: int
    number: int
    rows: int
    bytes: int

    def name(self, num_shards: int) -> str:
        """The name of the file."""
        return schema.shard_name(schema.SPLITS[self.split], self.number, num_shards)


def shard_of(order: np.ndarray, num_shards: int) -> np.ndarray:
    """The shard of each row by its place in the output, int64 [n]: equal ranges of hashes."""
    high = order >> np.uint64(32)
    return ((high * np.uint64(num_shards)) >> np.uint64(32)).astype(np.int64)


def columns_of(has_timestamp: bool, has_weight: bool) -> tuple[str, ...]:
    """The columns of an example, in the order in which they are written."""
    optional = ((schema.TIMESTAMP, has_timestamp), (schema.WEIGHT, has_weight))
    return (schema.QUERY_ID, schema.CANDIDATE_ID, *(name for name, has in optional if has))


def write_shard(path: Path, rows: np.ndarray, columns: tuple[str, ...]) -> int:
    """Writes rows, ROW [n] with dense ids, as one tf.Example each; the size in bytes."""
    import tensorflow as tf

    fields = {schema.QUERY_ID: "query", schema.CANDIDATE_ID: "candidate"}
    values = [rows[fields.get(name, name)].tolist() for name in columns]
    example = tf.train.Example()
    cells = []  # of the one example, which takes the values of row after row
    for name in columns:
        feature = example.features.feature[name]
        cells.append((feature.float_list if name == schema.WEIGHT else feature.int64_list).value)
        cells[-1].append(0)
    with written_aside(path) as aside, tf.io.TFRecordWriter(str(aside)) as writer:
        for row in zip(*values, strict=True):
            for cell, value in zip(cells, row, strict=True):
                cell[0] = value
            writer.write(example.SerializeToString(deterministic=True))
    return path.stat().st_size


def write_dataset_metadata(
    directory: Path, shards: list[Shard], num_shards: int, columns: tuple[str, ...]
) -> None:
    """Makes the directory one that `tfds.builder_from_directory` opens.

    Writes `features.json` and `dataset_info.json`, and an empty file for a shard without rows.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    infos = []
    types = {name: tf.float32 if name == schema.WEIGHT else tf.int64 for name in columns}
    template = tfds.core.ShardedFileTemplate(
        dataset_name=schema.DATASET, data_dir=directory, filetype_suffix="tfrecord"
    )
    for code, split in enumerate(schema.SPLITS):
        of_split = {shard.number: shard for shard in shards if shard.split == code}
        if not of_split:
            continue
        all_shards = [of_split.get(n, Shard(code, n, 0, 0)) for n in range(num_shards)]
        for shard in all_shards:
            (directory / shard.name(num_shards)).touch()  # those without rows are not there yet
        info = tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.rows for shard in all_shards],
            num_bytes=sum(shard.bytes for shard in all_shards),
            filename_template=template,
        )
        infos.append(info)
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=tfds.features.FeaturesDict(
            {name: tfds.features.Scalar(dtype) for name, dtype in types.items()}
        ),
        split_infos=infos,
        version="1.0.0",
        filename_template=template,
        description="Interactions with dense ids, prepared by twotower.",
        check_data=False,
    )
