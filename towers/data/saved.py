"""What a model needs of its data, in a directory beside its weights, and read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import schema
from pipeline.contract.files import check_files
from towers.data.interactions import RetrievalData, data_in

KIND = "model"
_KEPT = ("train", "validation")  # what a query has seen; nobody needs the test rows


def write_data(data: RetrievalData, directory: Path) -> dict[str, Any]:
    """Writes vocabularies, counts, train and validation rows and attributes; details of them."""
    columns: dict[str, Any] = {}
    for side in schema.SIDES:
        vocabulary, features = getattr(data, f"{side}_vocabulary"), data.features(side)
        fields = (schema.RAW_ID, schema.FINGERPRINT, schema.COUNT)
        parts = (vocabulary.raw_ids, vocabulary.fingerprints, vocabulary.counts)
        table = pa.table(dict(zip(fields, parts, strict=True)))
        pq.write_table(table, directory / schema.vocabulary_name(side))
        if features.specs:
            pq.write_table(features.table, directory / schema.features_name(side))
            pq.write_table(features.cold, directory / schema.cold_features_name(side))
            columns[side] = {"columns": [dataclasses.asdict(spec) for spec in features.specs]}
        for spec in features.specs:
            if spec.vocabulary:
                values = pa.table({schema.VALUE: features.values[spec.name]})
                pq.write_table(values, directory / spec.vocabulary)
    counts = pa.table({schema.COUNT: data.train_counts})
    pq.write_table(counts, directory / schema.train_counts_name())
    for split in _KEPT:
        rows = pa.table({name: np.asarray(v) for name, v in data.arrays(split).items()})
        pq.write_table(rows, directory / f"{split}.parquet")
    return {schema.FEATURES: columns, "data_fingerprint": data.fingerprint}


def read_data(root: Path, manifest: schema.Manifest) -> RetrievalData:
    """The data that `write_data` wrote, without their test rows.

    Raises:
      ValueError: a file is missing or was changed.
    """
    check_files(root, manifest.files)
    kept = {}
    for split in _KEPT:
        table = pq.read_table(root / f"{split}.parquet")
        kept[split] = {name: table[name].to_numpy() for name in table.column_names}
    kept["test"] = {name: values[:0] for name, values in kept["train"].items()}
    data = data_in(root, manifest, kept.__getitem__)
    for side in schema.SIDES:
        data.features(side)  # read now: the directory may be removed
    return data
