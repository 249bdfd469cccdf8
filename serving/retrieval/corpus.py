"""What a version knows beside its graph: ids of candidates and queries, vectors, seen lists."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import schema
from pipeline.contract.attributes import as_attributes
from pipeline.contract.bundle import read_raw_ids
from serving.errors import InvalidRequest
from serving.retrieval.attributes import Attributes
from serving.retrieval.encoded_ids import EncodedIds
from serving.retrieval.filters import Filters, among
from serving.retrieval.requests import RetrieveRequest
from serving.version.delta import base_key, read_delta
from serving.version.names import WORKERS_FOLDER
from serving.version.versions import RETRIEVAL, Version


class FilterRows(NamedTuple):
    """What all queries of a request do not get, and what alone they may: rows, ascending."""

    excluded: np.ndarray  # int64
    allowed: np.ndarray | None  # int64; or all rows as a mask, bool [N]; None for all
    unknown_ids: int  # different ids that are not in the corpus


_lock = threading.Lock()
_bases: weakref.WeakValueDictionary[str, Base] = weakref.WeakValueDictionary()


class Base:
    """What versions with the same base share while one of them is in use: its models and files.

    Files below `assets.extra/retrieval` that need much memory are read on first use.

    Attributes:
      models: by the name of their index; what is missing is loaded under `loading`.
      ids: raw ids of the N candidates, which workers map from one file.
      vectors: float32 [N, D].
      has_seen: whether there are seen lists.
      has_popularity: whether it is known which candidates are popular: by counts or seen lists.
    """

    def __init__(self, version: Version) -> None:
        self.models: dict[str, Any] = {}
        self._shared: Path | None = None
        self.loading = threading.Lock()
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        files = self._files = version.path / RETRIEVAL
        self.ids = self._read_ids(base_key(version.manifest))
        # Pages are shared by all who map the file; `c` as TensorFlow takes no read-only array.
        self.vectors = np.load(files / schema.BUNDLE_VECTORS, mmap_mode="c")
        self.has_seen = (files / schema.BUNDLE_SEEN_OFFSETS).is_file()
        self.has_popularity = self.has_seen or (files / schema.BUNDLE_CANDIDATE_COUNTS).is_file()
        attributes = files / schema.BUNDLE_ATTRIBUTES
        self.column = cache(lambda name: pq.read_table(attributes, columns=[name])[name])

    @classmethod
    def of(cls, version: Version, user: object) -> Base:
        """The base of a version, which stays as long as there is a user that has not left."""
        with _lock:
            key = base_key(version.manifest)
            base = _bases.get(key) or cls(version)
            _bases[key] = base
            base._users.add(user)
            return base

    def leave(self, user: object) -> dict[str, Any]:
        """Forgets a user; with the last one the models, which are returned to be freed."""
        with _lock, self.loading:
            self._users.discard(user)
            if self._users:
                return {}
            models = self.models
            self.models = {}
            for key in [key for key, base in _bases.items() if base is self]:
                del _bases[key]
        if self._shared:  # others have mapped it, or write it again
            self._shared.unlink(missing_ok=True)
        return models

    def _read_ids(self, key: str) -> EncodedIds:
        read = partial(read_raw_ids, self._files / schema.BUNDLE_CANDIDATE_IDS)
        if folder := os.environ.get(WORKERS_FOLDER):
            self._shared = Path(folder, f"{key}.arrow")
            with contextlib.suppress(OSError):  # there is no room: each has its own
                return EncodedIds.mapped(self._shared, read)
        return EncodedIds(read())

    @cached_property
    def attributes(self) -> Attributes:
        """What `where` of a request may name; without columns where none were exported."""
        file = self._files / schema.BUNDLE_ATTRIBUTES
        return Attributes(pq.read_table(file) if file.is_file() else pa.table({}))

    @cached_property
    def popularity(self) -> tuple[np.ndarray, np.ndarray]:
        counts = self._files / schema.BUNDLE_CANDIDATE_COUNTS
        if counts.is_file():
            count = np.load(counts, mmap_mode="r")
        else:
            count = np.bincount(self.seen[1], minlength=len(self.vectors)).astype(np.int32)
        return count, np.argsort(-count, kind="stable").astype(np.int32)

    @cached_property
    def query_row(self) -> dict[str, int]:
        """Raw id of a query → the place of its seen list."""
        if not self.has_seen:
            return {}
        query_ids = read_raw_ids(self._files / schema.BUNDLE_QUERY_IDS)
        return {query_id: row for row, query_id in enumerate(query_ids)}

    @cached_property
    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each seen list begins, int64 [Q + 1], and their rows of candidates, int32."""
        offsets = np.load(self._files / schema.BUNDLE_SEEN_OFFSETS, mmap_mode="r")
        return offsets, np.load(self._files / schema.BUNDLE_SEEN_CANDIDATES, mmap_mode="r")


class Corpus:
    """The candidates of a version, and what its queries have seen.

    Rows are those of the base, then the added ones of a delta.

    Attributes:
      vectors: float32 [N, D], of the base.
      added: float32 [A, D], of the delta.
      removed: int64, ascending, rows that nobody gets: removed, or replaced by an added one.
      num_candidates: all rows, removed ones too.
      title_column: the attribute that `titles` gives; "" where the version has none.
      has_seen, has_popularity: as of its `Base`.
    """

    def __init__(self, base: Base, version: Version) -> None:
        delta = read_delta(version.path, base.vectors.shape[1])
        self._base, self._delta = base, delta
        self.title_column: str = version.manifest.configuration.get("title_column", "")
        self.vectors, self.added, self.removed = base.vectors, delta.vectors, delta.excluded
        self.num_candidates = len(self.vectors) + len(self.added)
        self.has_seen, self.has_popularity = base.has_seen, base.has_popularity
        added = {raw_id: len(base.vectors) + row for row, raw_id in enumerate(delta.ids)}
        # Ids of the delta → their row, -1 for removed ones.
        self._changed = dict.fromkeys(base.ids.names(delta.excluded), -1)
        new_rows = np.array([added.get(raw_id, -1) for raw_id in self._changed], np.int64)
        # Rows of replaced ones, ascending, and their new rows.
        self._moved = delta.excluded[new_rows >= 0], new_rows[new_rows >= 0]
        self._changed |= added

    def filter_rows(self, request: RetrieveRequest) -> FilterRows:
        """What a request excludes and allows, in rows; its cost grows with their ids."""
        excluded = self.removed
        if request.exclude:
            excluded = np.union1d(excluded, self.candidate_rows(request.exclude))
        allowed = None if request.allow is None else self.candidate_rows(request.allow)
        if request.where:
            conditions = self.attributes.check(request.where)
            fulfils = self.attributes.mask(conditions)
            if len(self.added):
                fulfils = np.concatenate([fulfils, self._added_attributes.mask(conditions)])
            allowed = fulfils if allowed is None else allowed[fulfils[allowed]]
        ids = {*request.exclude, *(request.allow or ())}
        return FilterRows(excluded, allowed, int((self._rows(list(ids)) < 0).sum()))

    def seen_rows(self, query_id: str) -> np.ndarray:
        """Rows that the query had in training, int64, in the order of its list; [] if unknown."""
        row = self._base.query_row.get(query_id)
        if row is None:
            return np.empty(0, np.int64)
        offsets, candidates = self._base.seen
        rows = candidates[offsets[row] : offsets[row + 1]].astype(np.int64)
        moved, new_rows = self._moved
        if (is_moved := among(rows, moved)).any():
            rows[is_moved] = new_rows[np.searchsorted(moved, rows[is_moved])]
        return rows

    def query_ids(self, limit: int) -> list[str]:
        """The first raw ids of the queries that have a seen list."""
        return list(itertools.islice(self._base.query_row, limit))

    @cached_property
    def encoded_ids(self) -> EncodedIds:
        base, added = self._base.ids, self._delta.ids
        return EncodedIds(added, base) if added else base

    def titles(self, rows: Sequence[int] | np.ndarray) -> Sequence[str]:
        """What people call rows of candidates, "" if missing or -1; () without such a column."""
        if not self.title_column:
            return ()
        rows = np.asarray(rows, np.int64)
        values = self._titles.take(pa.array(rows, mask=rows < 0)).to_pylist()
        return [
            " ".join(value) if isinstance(value, list) else str(value or "") for value in values
        ]

    def titles_of(self, candidate_ids: Iterable[str]) -> Sequence[str]:
        """As `titles`, by raw ids; "" for one that is not in the corpus."""
        return self.titles(self._rows(list(candidate_ids)))

    @cached_property
    def popularity(self) -> tuple[np.ndarray, np.ndarray]:
        """Training rows of each candidate, [N], and rows from the most to the least of it.

        The counts of the bundle, and where it has none, how many seen lists name a candidate. Of
        equally popular ones the lower row comes first.

        Raises:
          InvalidRequest: the version has neither.
        """
        self.check_popularity()
        count, by_popularity = self._base.popularity
        if not len(self.added):
            return count, by_popularity
        added = np.zeros(len(self.added), count.dtype)
        moved, new_rows = self._moved
        added[new_rows - len(count)] = count[moved]
        order = np.argsort(-added, kind="stable")
        places = np.searchsorted(-count[by_popularity], -added[order], side="right")
        by_popularity = np.insert(by_popularity, places, len(count) + order)
        return np.concatenate([count, added]), by_popularity

    @property
    def attributes(self) -> Attributes:
        """Of the base: what `where` of a request may name, and of which kinds."""
        return self._base.attributes

    @cached_property
    def _added_attributes(self) -> Attributes:
        return Attributes(as_attributes(self._delta.added, self.attributes.schema))

    def check_popularity(self) -> None:
        """Raises InvalidRequest where the version does not know which candidates are popular."""
        if not self.has_popularity:
            raise InvalidRequest(
                f"unknown_queries 'popular' needs counts of the candidates, but the version "
                f"has neither {schema.BUNDLE_CANDIDATE_COUNTS} nor seen lists: choose 'empty' or "
                "'error', or export again with one of them in the bundle."
            )

    def load(self) -> None:
        """Reads now what is otherwise read on first use."""
        if self.has_popularity:
            _ = self.popularity
        self.encoded_ids.load()
        _ = self._added_attributes, self._base.query_row
        if self.has_seen:
            _ = self._base.seen
        if self.title_column:
            _ = self._titles

    def popular_rows(self, filters: Filters, query: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The most popular rows that a query may get, at most k, and their counts."""
        count, by_popularity = self.popularity
        if not filters.is_chosen:
            barred = self.num_candidates - int(filters.num_left[query])
            most = by_popularity[: k + barred]
        else:
            most = filters.base[np.argsort(-count[filters.base], kind="stable")]
        rows = most[filters.may_get(most[None], np.array([query]))[0]][:k]
        return rows, count[rows]

    def candidate_rows(self, candidate_ids: Iterable[str]) -> np.ndarray:
        """Rows of the candidates that are in the corpus: int64, ascending, each once."""
        rows = np.unique(self._rows(list(candidate_ids)))
        return rows[rows >= 0]

    def _rows(self, candidate_ids: Sequence[str]) -> np.ndarray:
        """Their rows, int64; -1 where one is not in the corpus."""
        rows = self._base.ids.rows(candidate_ids)
        for place, raw_id in enumerate(candidate_ids if self._changed else ()):
            rows[place] = self._changed.get(raw_id, rows[place])
        return rows

    @cached_property
    def _titles(self) -> pa.ChunkedArray:
        base = self._base.column(self.title_column)
        added = as_attributes(self._delta.added, self.attributes.schema)[self.title_column]
        return pa.chunked_array([*base.chunks, *added.chunks], base.type) if len(added) else base
