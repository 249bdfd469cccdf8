"""The delta of a version: candidates that came or went since its base was exported.

The base stays as it is, rows 0..N-1; added candidates are rows N..N+A-1. `assets.extra/delta/`
holds the delta, and the exact model has it once more as variables, so that stock TensorFlow
Serving answers from all of it: its checkpoint has two shards, of which only the second changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from pipeline.contract import schema

DELTA = Path("assets.extra/delta")
ADDED = DELTA / "added.parquet"  # candidate_id and what else was said of each
ADDED_BEFORE = Path("assets.extra/added_before.parquet")  # the same, of those joined to the base
_VECTORS, _EXCLUDED = DELTA / "vectors.npy", DELTA / "excluded.npy"
_BASE_INDEX = DELTA / "base.index"  # of the first shard alone
_VARIABLES = Path("variables")
_SHARD = "variables.data-0000{}-of-00002"
_OF_DELTA = {str(_VARIABLES / _SHARD.format(1)), str(_VARIABLES / "variables.index")}
_OF_DELTA |= {str(file) for file in (ADDED, _VECTORS, _EXCLUDED)}
_KEYS = "delta/{}/.ATTRIBUTES/VARIABLE_VALUE"  # of the variables in a checkpoint


class Delta(NamedTuple):
    """What is beside a base of N candidates with D dimensions."""

    vectors: np.ndarray  # float32 [A, D]
    added: pa.Table  # A rows: candidate_id and whatever columns came with it
    excluded: np.ndarray  # int64, ascending: rows of the base that are removed or replaced

    @property
    def ids(self) -> list[str]:
        """Raw ids of the added candidates, A."""
        return self.added[schema.CANDIDATE_ID].to_pylist()


class DeltaVariables(tf.Module):
    """The delta in the graph of the exact model, of any size."""

    def __init__(self, dimensions: int) -> None:
        super().__init__(name="delta")
        empty = tf.zeros([0, dimensions])
        self.vectors = tf.Variable(empty, trainable=False, shape=[None, dimensions])
        self.ids = tf.Variable(tf.zeros([0], tf.string), trainable=False, shape=[None])
        self.excluded = tf.Variable(tf.zeros([0], tf.int32), trainable=False, shape=[None])


def read_delta(version: Path, dimensions: int) -> Delta:
    """The delta of a version; an empty one where it has none."""
    if not (version / ADDED).is_file():
        ids = pa.table({schema.CANDIDATE_ID: pa.array([], pa.string())})
        return Delta(np.zeros((0, dimensions), np.float32), ids, np.zeros(0, np.int64))
    vectors, excluded = np.load(version / _VECTORS), np.load(version / _EXCLUDED)
    return Delta(vectors, pq.read_table(version / ADDED), excluded)


def can_have_delta(version: Path) -> bool:
    """Whether it was exported by a twotower that prepares for one."""
    return (version / _BASE_INDEX).is_file()


def part_checkpoint(version: Path) -> None:
    """Parts the checkpoint of a saved exact model in two shards, the second with the delta."""
    variables = version / _VARIABLES
    prefix = str(variables / "variables")
    types = tf.train.load_checkpoint(prefix).get_variable_to_dtype_map()
    # As tensors: arrays would be copies of the vectors and of each id.
    names = sorted(types)
    dtypes = [types[name] for name in names]
    values = tf.raw_ops.RestoreV2(
        prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), dtypes=dtypes
    )
    tensors = dict(zip(names, values, strict=True))
    of_delta = {_KEYS.format(name) for name in ("vectors", "ids", "excluded")}
    delta = {name: tensors.pop(name) for name in of_delta}
    shutil.rmtree(variables)
    _save(variables / "base", tensors)
    (version / DELTA).mkdir(parents=True)
    shutil.copyfile(variables / "base.index", version / _BASE_INDEX)
    _merge(variables, delta)


def write_with_delta(base: Path, files: Mapping[str, Any], version: Path, delta: Delta) -> None:
    """Writes a version with its own delta; `files`, of a manifest, are linked from another one."""
    for name in files.keys() - _OF_DELTA:
        (version / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(base / name, version / name)
        except OSError:  # on another file system, or one without links
            shutil.copyfile(base / name, version / name)
    variables = version / _VARIABLES
    os.rename(variables / _SHARD.format(0), variables / "base.data-00000-of-00001")
    shutil.copyfile(version / _BASE_INDEX, variables / "base.index")
    ids = np.array([raw_id.encode() for raw_id in delta.ids], object)
    tensors = {"vectors": delta.vectors, "ids": ids, "excluded": delta.excluded.astype(np.int32)}
    _merge(variables, {_KEYS.format(name): tensor for name, tensor in tensors.items()})
    np.save(version / _VECTORS, delta.vectors)
    np.save(version / _EXCLUDED, delta.excluded)
    pq.write_table(delta.added, version / ADDED)


def base_files(files: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a version's files that stay the same whatever its delta."""
    return {name: files[name] for name in files.keys() - _OF_DELTA}


def base_key(manifest: schema.Manifest) -> str:
    """The same for versions with the same base."""
    text = json.dumps(base_files(manifest.files), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _save(prefix: Path, tensors: Mapping[str, Any]) -> None:
    names = sorted(tensors)
    values = [tf.convert_to_tensor(tensors[name]) for name in names]
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=names, shape_and_slices=[""] * len(names), tensors=values
    )


def _merge(variables: Path, delta: Mapping[str, Any]) -> None:
    """Writes the shard of the delta, and joins it with that of the base to one checkpoint."""
    _save(variables / "delta", delta)
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(variables / name) for name in ("base", "delta")],
        destination_prefix=str(variables / "variables"),
        delete_old_dirs=False,
    )
