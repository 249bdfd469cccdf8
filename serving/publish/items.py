"""`twotower items`: candidates come and go by a small version on top of a large one."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.attributes import as_attributes
from pipeline.contract.bundle import SeenLists, read_bundle, read_raw_ids, write_bundle
from pipeline.contract.files import describe_files
from serving.publish.publish import PARTIAL, NumberTakenError, new_version, write_version
from serving.publish.settings import ItemsConfig, VersionOptions
from serving.version.delta import (
    ADDED_BEFORE,
    Delta,
    base_files,
    can_have_delta,
    read_delta,
    write_with_delta,
)
from serving.version.served_model import (
    EMBEDDING,
    KNOWN,
    QUERY_EMBEDDING,
    REQUEST_EMBEDDING,
    TOP_K,
    input_rows,
    input_tensors,
)
from serving.version.versions import CANDIDATE_MODEL, MODEL_CARD, RETRIEVAL, Version, find_version

_log = logging.getLogger(__name__)


def change_items(config: ItemsConfig) -> Path | str:
    """Publishes the next version of a model, with candidates added, replaced and removed.

    Example:
      >>> path = change_items(ItemsConfig("models", add="new.parquet", id_column="product"))
      version: models/twotower/3

    Returns:
      The directory of the version, or its place in a store. Its files are links to those of the
      newest version but for the delta, in which the candidates of earlier calls remain. Where the
      delta would be larger than `max_share` of the base, the version is built anew, which takes as
      long as an export.

    Raises:
      ValueError: a table cannot be read, has candidates that cannot be embedded, or the newest
        version cannot have a delta. Nothing is left.
    """
    while True:
        find_version(config.models, config.name)  # no lock is made where there is no model
        try:
            return _change_newest(config)
        except NumberTakenError:
            _log.warning("Another machine has published a version meanwhile: changing that one.")


def _change_newest(config: ItemsConfig) -> Path | str:
    with new_version(config.models, config.name, on_newest=True) as new:
        version = find_version(config.models, config.name)
        file = version.path / RETRIEVAL / schema.BUNDLE_CANDIDATE_IDS
        ids = pq.read_table(file, columns=[schema.RAW_ID])[schema.RAW_ID]
        base_ids = ids.cast(pa.string()).combine_chunks()
        delta = _changed(version, base_ids, config)
        left = len(base_ids) - len(delta.excluded) + len(delta.vectors)
        if not left:
            raise ValueError(f"nothing would be left of {version.path}: keep a candidate.")
        is_large = max(len(delta.vectors), len(delta.excluded)) > config.max_share * len(base_ids)
        if is_large:
            _log.info("The delta is above %g of the corpus: building anew.", config.max_share)
            _write_anew(new.partial, version, base_ids, delta)
        else:
            _write_on_top(new.partial, version, delta, left)
    _log.info("%d candidates%s.", left, "" if is_large else f", {len(delta.vectors)} beside them")
    print(f"version: {new.finished}")
    return new.finished


def _changed(version: Version, base_ids: pa.Array, config: ItemsConfig) -> Delta:
    if not can_have_delta(version.path):
        raise ValueError(f"{version.path} was exported by an older twotower: export it again.")
    before = read_delta(version.path, version.manifest.counts["dimensions"])
    added, vectors = _embedded(version, config) if config.add else (before.added[:0], None)
    ids = added[schema.CANDIDATE_ID]
    removed = read_raw_ids(Path(config.remove), config.id_column) if config.remove else []
    removed = pa.array(removed, pa.string())
    if twice := removed.filter(pc.is_in(removed, ids)).to_pylist():
        raise ValueError(f"candidate {twice[0]!r} is to be added and to be removed: choose one.")
    changed = pa.concat_arrays([*ids.chunks, removed])
    stays = pc.invert(pc.is_in(before.added[schema.CANDIDATE_ID], changed)).to_numpy()
    is_changed = pc.is_in(base_ids, changed)  # the other way round, a million ids are hashed
    known = pa.concat_arrays([base_ids.filter(is_changed), *before.added[0].chunks])
    if unknown := removed.filter(pc.invert(pc.is_in(removed, known))).to_pylist():
        _log.warning("%d ids to remove are not there: %s", len(unknown), unknown[:3])
    rows = np.flatnonzero(is_changed)
    parts = [before.vectors[stays], *([] if vectors is None else [vectors])]
    tables = [before.added.filter(pa.array(stays)), added]
    try:
        table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{config.add} must have the types of earlier rows: {error}.") from error
    attributes = version.path / RETRIEVAL / schema.BUNDLE_ATTRIBUTES
    if attributes.is_file():
        as_attributes(table, pq.read_schema(attributes))  # raises, so that no server fails
    return Delta(np.concatenate(parts), table, np.union1d(before.excluded, rows).astype(np.int64))


def _embedded(version: Version, config: ItemsConfig) -> tuple[pa.Table, np.ndarray]:
    """The rows to add, their ids as `candidate_id`, and their vectors float32 [A, D]."""
    ids = pa.array(read_raw_ids(Path(config.add), config.id_column), pa.string())
    table = pq.read_table(config.add).drop_columns([config.id_column])
    if schema.CANDIDATE_ID in table.column_names:
        raise ValueError(f"{config.add}: --id_column must be its column {schema.CANDIDATE_ID!r}.")
    table = table.add_column(0, schema.CANDIDATE_ID, ids)
    dimensions = version.manifest.counts["dimensions"]
    if EMBEDDING in table.column_names:
        try:
            vectors = np.array(table[EMBEDDING].to_pylist(), np.float32)
        except (ValueError, TypeError):
            vectors = np.zeros(0, np.float32)
        rule = f"{config.add}: {EMBEDDING} must be {dimensions} numbers in each row"
        if vectors.shape != (len(ids), dimensions):
            raise ValueError(f"{rule}, as in {version.path}.")
    elif (version.path / CANDIDATE_MODEL).is_dir():
        vectors = _by_model(version.path / CANDIDATE_MODEL, table, config.add)
        rule = f"{config.add}: the model must know something of each row, as a column that it reads"
    else:
        raise ValueError(
            f"{version.path} cannot embed new candidates, its tower knows ids alone: give "
            f"{config.add} a column {EMBEDDING!r}, or train --tower features."
        )
    good = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    if not good.all():
        raise ValueError(f"{rule}, got others for candidate {ids[int(np.argmin(good))]}.")
    return table, vectors


def _by_model(path: Path, table: pa.Table, source: str) -> np.ndarray:
    """Vectors of the rows by the candidate encoder of a version; zeros where it knows nothing."""
    encoder = tf.saved_model.load(str(path)).signatures[REQUEST_EMBEDDING]
    specs = encoder.structured_input_signature[1]
    if missing := sorted(specs.keys() - set(map(schema.input_name, table.column_names))):
        _log.warning("%s lacks columns that the model reads: %s", source, ", ".join(missing))
    try:
        rows = input_rows(specs, table)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    outputs = encoder(**input_tensors(specs, rows))
    return tf.where(outputs[KNOWN][:, None], outputs[EMBEDDING], 0.0).numpy()


def _write_on_top(path: Path, version: Version, delta: Delta, left: int) -> None:
    """Writes a version that has the files of another one, and its own delta."""
    manifest = version.manifest
    write_with_delta(version.path, manifest.files, path, delta)
    shutil.copyfile(version.path / MODEL_CARD, path / MODEL_CARD)  # people may annotate it
    same = base_files(manifest.files)
    own = describe_files(path, skip={*same, MODEL_CARD})
    details = {
        **manifest.details,
        "delta": {"added": len(delta.vectors), "excluded": len(delta.excluded)},
    }
    counts = {**manifest.counts, "candidates": left}
    dataclasses.replace(manifest, files=same | own, counts=counts, details=details).write(path)


def _write_anew(path: Path, version: Version, base_ids: pa.Array, delta: Delta) -> None:
    """Writes a version without a delta, of a bundle that is made from another one with it."""
    retrieval, num_base = version.path / RETRIEVAL, len(base_ids)
    stays = np.ones(num_base, bool)
    stays[delta.excluded] = False
    row = np.where(stays, np.cumsum(stays) - 1, -1)  # [N], in the new order
    moved = pc.index_in(base_ids, pa.array(delta.ids, pa.string())).fill_null(-1).to_numpy()
    row = np.where(moved >= 0, stays.sum() + moved, row)
    vectors = np.load(retrieval / schema.BUNDLE_VECTORS, mmap_mode="r")
    options: dict[str, Any] = {}
    if (retrieval / schema.BUNDLE_CANDIDATE_COUNTS).is_file():
        counts = np.zeros(stays.sum() + len(delta.vectors), np.int64)
        counts[row[row >= 0]] = np.load(retrieval / schema.BUNDLE_CANDIDATE_COUNTS)[row >= 0]
        options["counts"] = counts
    if (retrieval / schema.BUNDLE_SEEN_OFFSETS).is_file():
        offsets = np.load(retrieval / schema.BUNDLE_SEEN_OFFSETS)
        seen = row[np.load(retrieval / schema.BUNDLE_SEEN_CANDIDATES)]
        before = np.concatenate([[0], np.cumsum(seen >= 0)])  # kept ones in front of each
        options["seen"] = SeenLists(before[offsets], seen[seen >= 0])
        options["query_ids"] = read_raw_ids(retrieval / schema.BUNDLE_QUERY_IDS)
    if (retrieval / schema.BUNDLE_SAMPLE_QUERIES).is_file():
        options["sample_queries"] = np.load(retrieval / schema.BUNDLE_SAMPLE_QUERIES)
    if (retrieval / schema.BUNDLE_ATTRIBUTES).is_file():
        attributes = pq.read_table(retrieval / schema.BUNDLE_ATTRIBUTES)
        added = as_attributes(delta.added, attributes.schema)
        options["attributes"] = pa.concat_tables([attributes.filter(pa.array(stays)), added])
    if version.manifest.details["input"] == schema.QUERY_ID:
        options["query_model"] = lambda place: _save_query_model(version.path, place)
    if (version.path / CANDIDATE_MODEL).is_dir():
        options["candidate_model"] = version.path / CANDIDATE_MODEL
    scratch = path.with_name(f"{PARTIAL}bundle")
    try:
        bundle = write_bundle(
            scratch / "bundle",
            np.concatenate([vectors[stays], delta.vectors]),
            pa.concat_arrays([base_ids.filter(pa.array(stays)), pa.array(delta.ids, pa.string())]),
            manifest=_manifest_anew(version, delta),
            **options,
        )
        (path / ADDED_BEFORE).parent.mkdir(parents=True)
        pq.write_table(_added_before(version, base_ids, delta), path / ADDED_BEFORE)
        settings = VersionOptions(**{**version.manifest.configuration, "version": 0})
        write_version(path, read_bundle(bundle), settings)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _added_before(version: Version, base_ids: pa.Array, delta: Delta) -> pa.Table:
    """What was said of all candidates that came and stayed, for the next export to name."""
    tables = [delta.added]
    if (version.path / ADDED_BEFORE).is_file():
        earlier = pq.read_table(version.path / ADDED_BEFORE)
        gone = pa.concat_arrays(
            [base_ids.take(pa.array(delta.excluded)), pa.array(delta.ids, pa.string())]
        )
        stay = pc.invert(pc.is_in(earlier[schema.CANDIDATE_ID], gone))
        tables.insert(0, earlier.filter(stay))
    return pa.concat_tables(tables, promote_options="permissive")


def _manifest_anew(version: Version, delta: Delta) -> schema.Manifest:
    """What the bundle of a version said of itself, and that its candidates are others now."""
    details = dict(version.manifest.details.get("bundle", {}))
    change = f"{len(delta.vectors)} added, {len(delta.excluded)} removed or replaced"
    change_note = f"at last {change} by `twotower items`; metrics are those of the trained ones"
    details["data"] = details.get("data", {}) | {"candidates": change_note}
    return schema.Manifest("bundle", version.manifest.source, {}, {}, {}, details)


def _save_query_model(version: Path, place: Path) -> None:
    served, module = tf.saved_model.load(str(version)), tf.Module()
    module.encoder = served.encoder
    names = {TOP_K: QUERY_EMBEDDING, REQUEST_EMBEDDING: REQUEST_EMBEDDING}
    functions = {n: served.signatures[f] for n, f in names.items() if f in served.signatures}
    tf.saved_model.save(module, str(place), signatures=functions)
