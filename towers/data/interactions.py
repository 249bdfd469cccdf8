"""Prepared interactions in memory: vocabularies, counts, arrays by split, batches."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import pyarrow as pa
import tensorflow as tf

from pipeline.contract import hashing, schema
from samplers.selection.seen import Seen
from towers.data.attributes import Features
from towers.data.epochs import epoch_dataset
from towers.data.shards import load_split, read_table


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids of one side; the row number is the dense id, by descending count."""

    raw_ids: pa.Array  # string [V]
    fingerprints: np.ndarray  # int64 [V], see `pipeline.contract.schema.fingerprint`
    counts: np.ndarray  # int64 [V], rows over all splits

    def __len__(self) -> int:
        return len(self.raw_ids)

    def restricted(self, kept: np.ndarray) -> Vocabulary:
        """Some of the ids, bool [V], in the same order."""
        raw_ids = self.raw_ids.filter(pa.array(kept))
        return Vocabulary(raw_ids, self.fingerprints[kept], self.counts[kept])

    def encode(self, raw_ids: Iterable[object]) -> np.ndarray:
        """Dense ids of raw ones: int64 [n], -1 where an id is unknown."""
        prints = hashing.fingerprints(str(raw_id).encode() for raw_id in raw_ids)
        places, known = find_ids(prints, self.fingerprints)
        return np.where(known, places, -1)

    def decode(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Raw ids of dense ones."""
        return self.raw_ids.take(pa.array(np.asarray(ids, np.uint64))).to_pylist()


def find_ids(wanted: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each fingerprint stands among others: places [n], and whether it does: bool [n]."""
    if not len(known):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    order = np.argsort(known)
    places = order[np.minimum(np.searchsorted(known, wanted, sorter=order), len(order) - 1)]
    return places, known[places] == wanted


class Positives:
    """The candidates that each query chose, in two arrays (compressed sparse rows)."""

    def __init__(self, query_ids: np.ndarray, candidate_ids: np.ndarray, num_queries: int) -> None:
        order = np.lexsort((candidate_ids, query_ids))
        self.candidate_ids = np.asarray(candidate_ids)[order]  # [n], ascending for each query
        sizes = np.bincount(query_ids, minlength=num_queries)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])  # int64 [Q + 1]

    @property
    def sizes(self) -> np.ndarray:
        """Number of candidates of each query: int64 [Q]."""
        return np.diff(self.offsets)

    def of(self, query_id: int) -> np.ndarray:
        """The candidates of one query, ascending."""
        return self.candidate_ids[self.offsets[query_id] : self.offsets[query_id + 1]]


class RetrievalData:
    """Interactions with dense ids, split into train, validation and test.

    Made by `open_data` from a directory, or by `from_dataframe`.
    """

    def __init__(
        self,
        query_vocabulary: Vocabulary,
        candidate_vocabulary: Vocabulary,
        train_counts: np.ndarray,
        load: Callable[[str], Mapping[str, np.ndarray]],
        *,
        fingerprint: str,
        source: str = "",
        features: Callable[[str], Features] = lambda side: Features(),
    ) -> None:
        self.query_vocabulary = query_vocabulary
        self.candidate_vocabulary = candidate_vocabulary
        self.num_queries, self.num_candidates = len(query_vocabulary), len(candidate_vocabulary)
        self.train_counts = train_counts  # int64 [N], train rows of each candidate
        self.fingerprint = fingerprint  # one checksum for all of the content
        self.source = source  # where it came from, for the records
        self.features = functools.cache(features)  # side, query or candidate → its attributes
        self._load = functools.cache(load)
        self._positives = functools.cache(self._make_positives)

    def __repr__(self) -> str:
        rows = ", ".join(f"{self.num_rows(split):,} {split}" for split in schema.SPLITS)
        lines = [f"{self.num_queries:,} queries, {self.num_candidates:,} candidates"]
        lines.append(f"rows: {rows}")
        for side in schema.SIDES:
            if names := [f"{spec.name} ({spec.kind})" for spec in self.features(side).specs]:
                lines.append(f"{side} attributes: {', '.join(names)}")
        return "\n  ".join([f"RetrievalData of {self.source or 'arrays'}:", *lines])

    def encode_queries(self, raw_ids: Iterable[object]) -> np.ndarray:
        """Dense ids of raw query ids: int64 [n], -1 where an id is unknown.

        >>> import pandas as pd, towers
        >>> log = pd.DataFrame({"user": ["ann", "ann", "bob"], "item": ["tea", "milk", "tea"]})
        >>> data = towers.from_dataframe(log, user="user", item="item")
        >>> data.encode_queries(["bob", "nobody"])
        array([ 1, -1])
        """
        return self.query_vocabulary.encode(raw_ids)

    def encode_candidates(self, raw_ids: Iterable[object]) -> np.ndarray:
        """Dense ids of raw candidate ids: int64 [n], -1 where an id is unknown."""
        return self.candidate_vocabulary.encode(raw_ids)

    def decode_queries(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Raw query ids of dense ones, [n]."""
        return self.query_vocabulary.decode(ids)

    def decode_candidates(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Raw candidate ids of dense ones, [n]."""
        return self.candidate_vocabulary.decode(ids)

    def arrays(self, split: str) -> Mapping[str, np.ndarray]:
        """The columns of a split, [n] each: query_id, candidate_id, perhaps timestamp, weight."""
        if split not in schema.SPLITS:
            raise ValueError(f"split must be one of {', '.join(schema.SPLITS)}, got {split!r}.")
        return self._load(split)

    def num_rows(self, split: str) -> int:
        """Number of interactions of a split."""
        return len(self.arrays(split)[schema.QUERY_ID])

    def positives(self, *splits: str) -> Positives:
        """What each query chose in one split, or in several together."""
        return self._positives(splits)

    def _make_positives(self, splits: tuple[str, ...]) -> Positives:
        parts = [self.arrays(split) for split in splits]
        return Positives(
            np.concatenate([part[schema.QUERY_ID] for part in parts]),
            np.concatenate([part[schema.CANDIDATE_ID] for part in parts]),
            self.num_queries,
        )

    def with_counts(self, counts: np.ndarray) -> RetrievalData:
        """The same data with other counts [N] in place of its train rows of each candidate."""
        data = copy.copy(self)
        data.train_counts = counts
        return data

    def seen(self) -> Seen:
        """What each query chose in train, for methods that leave it out of the negatives."""
        chosen = self.positives("train")
        return Seen(chosen.candidate_ids, chosen.offsets)

    def by_query(self) -> RetrievalData:
        """The same data with one train row for each query that has some, to train on alone.

        For what is trained towards all that a query chose, such as distillation: the candidate
        of a row is the first of these, its weight sqrt(n / mean n) for a query with n train rows,
        whatever the weights of those.
        Not to evaluate on: what else the query chose would count as new to it.
        """
        chosen = self.positives("train")
        queries = np.flatnonzero(chosen.sizes)
        sizes = chosen.sizes[queries]
        rows = {
            schema.QUERY_ID: queries,
            schema.CANDIDATE_ID: chosen.candidate_ids[chosen.offsets[queries]].astype(np.int64),
            schema.WEIGHT: np.sqrt(sizes / sizes.mean()).astype(np.float32),
        }
        return self._loading(lambda split: rows if split == "train" else self._load(split))

    def all_as_train(self) -> RetrievalData:
        """The same data with the rows of all splits in train, to fit what was chosen before."""
        parts = [self._load(split) for split in schema.SPLITS]
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        empty = {name: values[:0] for name, values in rows.items()}
        data = self._loading(lambda split: rows if split == "train" else empty)
        chosen = rows[schema.CANDIDATE_ID]
        return data.with_counts(np.bincount(chosen, minlength=self.num_candidates))

    def restricted(self, queries: np.ndarray, candidates: np.ndarray) -> RetrievalData:
        """The same data with some ids alone, bool [Q] and bool [N]; the dense ids close up."""
        kept = {"query": queries, "candidate": candidates}

        def load(split: str) -> Mapping[str, np.ndarray]:
            rows = self._load(split)
            stay = queries[rows[schema.QUERY_ID]] & candidates[rows[schema.CANDIDATE_ID]]
            rows = {name: values[stay] for name, values in rows.items()}
            closed = {f"{s}_id": (np.cumsum(kept[s]) - 1)[rows[f"{s}_id"]] for s in schema.SIDES}
            return {**rows, **closed}

        def features(side: str) -> Features:
            features = self.features(side)
            if not features.specs:
                return features
            return dataclasses.replace(features, table=features.table.filter(pa.array(kept[side])))

        return RetrievalData(
            self.query_vocabulary.restricted(queries),
            self.candidate_vocabulary.restricted(candidates),
            self.train_counts[candidates],
            load,
            fingerprint=self.fingerprint,
            source=self.source,
            features=features,
        )

    def _loading(self, load: Callable[[str], Mapping[str, np.ndarray]]) -> RetrievalData:
        """The same with other rows."""
        data = copy.copy(self)
        data._load = functools.cache(load)
        data._positives = functools.cache(data._make_positives)
        return data

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches of an epoch; the last may be short."""
        return -(-self.num_rows("train") // batch_size)

    def train(self, batch_size: int, *, seed: int = 10, first_step: int = 0) -> tf.data.Dataset:
        """Batches of the train split, shuffled: iterating once is one epoch.

        The next iteration is the next epoch, in another order; the order is a function of the
        seed and the number of the epoch.

        Args:
          batch_size: B, rows of a batch; the last one of an epoch may be shorter.
          seed: of the order, at least 0.
          first_step: batches that were trained on before, to go on after them.

        Returns:
          Dicts of query_id and candidate_id, int64 [B], and weight, float32 [B], if there is one.
        """
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(
                f"batch_size must be at least 1, without decimals, got {batch_size!r}."
            )
        if not all(isinstance(n, Integral) and n >= 0 for n in (seed, first_step)):
            raise ValueError(
                f"seed, first_step must be at least 0, without decimals, got {seed}, {first_step}."
            )
        columns = self.arrays("train")
        names = (schema.QUERY_ID, schema.CANDIDATE_ID, schema.WEIGHT)
        used = {name: columns[name] for name in names if name in columns}
        batches = epoch_dataset(used, batch_size, seed=seed, first_step=first_step)
        batches.of_data = self, min(batch_size, self.num_rows("train"))  # what `fit` checks
        return batches


def open_data(directory: str | os.PathLike[str]) -> RetrievalData:
    """Opens what `twotower prepare` made.

    The shards are decoded once, into arrays that are cached beside them.

    Raises:
      ValueError: the directory holds no finished preparation, or one that was changed.
    """
    root, manifest = Path(directory), schema.read_manifest(directory, "prepared")
    data = data_in(root, manifest, lambda split: load_split(root, manifest, split))
    if data.num_rows("train") == 0:
        raise ValueError(f"{directory} has no train rows: prepare it from more interactions.")
    return data


def data_in(
    root: Path, manifest: schema.Manifest, load: Callable[[str], Mapping[str, np.ndarray]]
) -> RetrievalData:
    """The vocabularies, counts and attributes in a directory, with rows that `load` reads."""
    query, candidate = (_read_vocabulary(root, manifest, side) for side in schema.SIDES)
    counts = read_table(root, manifest, "candidate_train_counts-", [schema.COUNT])
    return RetrievalData(
        query,
        candidate,
        counts[schema.COUNT].to_numpy(),
        load,
        fingerprint=manifest.details.get("data_fingerprint", manifest.fingerprint),
        source=manifest.source,
        features=lambda side: Features.read(root, manifest, side),
    )


def _read_vocabulary(root: Path, manifest: schema.Manifest, side: str) -> Vocabulary:
    columns = [schema.RAW_ID, schema.FINGERPRINT, schema.COUNT]
    table = read_table(root, manifest, f"{side}_vocabulary-", columns)
    return Vocabulary(table[0].combine_chunks(), table[1].to_numpy(), table[2].to_numpy())
