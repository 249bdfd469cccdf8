"""A synthetic corpus with attributes and histories, and its towers without training.

The rows of candidates lie in clusters; a query has chosen candidates of a few of them, and is
embedded by their mean and by four columns, one of each kind, as a trained `features` tower does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.contract import hashing, schema
from pipeline.contract.bundle import SeenLists, write_bundle
from towers.data.attributes import Features
from towers.data.interactions import RetrievalData, Vocabulary
from towers.model.encoder import save_encoder
from towers.model.two_tower import TwoTower

HISTORY = 20
_IN_CLUSTER, _CLUSTERS_OF_A_QUERY = 1000, 3
_VALUES = {"categorical": 1000, "multi": 200, "text": 500}  # different ones, or words
_MAX_TAGS, _WORDS = 4, 3
_MEAN, _STD = 20.0, 8.0
_SAMPLES = 1_000
_TOWER = {
    "tower": "features",
    "query_inputs": ("id", "history", "features"),
    "history": HISTORY,
    "id_dropout": 0.1,
}

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LiveCorpus:
    """N candidates and Q queries, all by the seed.

    Attributes:
      num_candidates, num_queries, dim: N, Q, D.
      columns: side → column → codes int64 [V] (category), [V, 4] (tags, 0 for none), float64 [V]
        (price) and codes int64 [V, 3] (words of the note).
      histories: int64 [Q, 20], rows of candidates, the oldest first.
    """

    num_candidates: int
    num_queries: int
    dim: int
    columns: Mapping[str, Mapping[str, np.ndarray]]
    histories: np.ndarray

    @classmethod
    def of(cls, num_candidates: int, num_queries: int, dim: int) -> LiveCorpus:
        """Draws all but the vectors."""
        rng = np.random.default_rng(1)
        sizes = {"query": num_queries, "candidate": num_candidates}
        columns = {side: draw_columns(rng, size) for side, size in sizes.items()}
        clusters = max(1, num_candidates // _IN_CLUSTER)
        own = rng.integers(clusters, size=(num_queries, _CLUSTERS_OF_A_QUERY))
        cluster = own[:, np.arange(HISTORY) % _CLUSTERS_OF_A_QUERY]
        # So many steps that no candidate comes twice; candidate n is of the cluster n % clusters.
        steps = rng.integers(_IN_CLUSTER // HISTORY, size=cluster.shape)
        place = (steps + np.arange(HISTORY) * (_IN_CLUSTER // HISTORY)) * clusters + cluster
        return cls(num_candidates, num_queries, dim, columns, place % num_candidates)

    @property
    def query_ids(self) -> list[str]:
        """Raw ids by row."""
        return [f"query {row}" for row in range(self.num_queries)]

    def query(self, row: int) -> Row:
        """What is known of a query, as a request says it, without its id."""
        history = [f"candidate {place}" for place in self.histories[row]]
        return {"history": history} | raw_values(self.columns["query"], row)

    def centres(self, rows: np.ndarray) -> np.ndarray:
        """The centres of the clusters that candidates are of, float32 [n, D]."""
        clusters = max(1, self.num_candidates // _IN_CLUSTER)
        centres = np.random.default_rng(0).normal(size=(clusters, self.dim))
        return centres.astype(np.float32)[rows % clusters]

    def vectors(self) -> np.ndarray:
        """Rows of the candidates, float32 [N, D], in clusters."""
        shape = self.num_candidates, self.dim
        noise = np.random.default_rng(1).standard_normal(shape, np.float32)
        return self.centres(np.arange(self.num_candidates)) + noise

    def data(self) -> RetrievalData:
        """As if it had been prepared; every row of a history is a train row."""
        queries = _vocabulary(self.query_ids)
        candidates = _vocabulary([f"candidate {row}" for row in range(self.num_candidates)])
        rows = {
            schema.QUERY_ID: np.repeat(np.arange(self.num_queries), HISTORY),
            schema.CANDIDATE_ID: self.histories.ravel(),
            schema.TIMESTAMP: np.tile(np.arange(HISTORY), self.num_queries),
        }
        none = {name: values[:0] for name, values in rows.items()}
        return RetrievalData(
            queries,
            candidates,
            np.bincount(rows[schema.CANDIDATE_ID], minlength=self.num_candidates),
            lambda split: rows if split == "train" else none,
            fingerprint="synthetic",
            features=lambda side: _features(self.columns[side]),
        )

    def write_bundle(self, path: Path) -> np.ndarray:
        """Writes the bundle of untrained towers; returns the embeddings of all queries, [Q, D]."""
        data = self.data()
        model = TwoTower(data, self.dim, method="mns", init_stddev=0.1, **_TOWER)
        model.candidate_tower.table.assign(self.vectors())
        queries = model.query_embeddings().numpy()
        seen = SeenLists(np.arange(self.num_queries + 1) * HISTORY, self.histories.ravel())
        write_bundle(
            path,
            model.candidate_embeddings().numpy(),
            data.candidate_vocabulary.raw_ids,
            source="synthetic clusters",
            query_model=partial(save_encoder, data, model, "query"),
            candidate_model=partial(save_encoder, data, model, "candidate"),
            sample_queries=queries[-_SAMPLES:],
            query_ids=data.query_vocabulary.raw_ids,
            seen=seen,
            attributes=pa.table({"price": self.columns["candidate"]["price"]}),
        )
        return queries


def draw_columns(rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    """Columns of so many rows."""
    tags = rng.integers(1, _VALUES["multi"] + 1, size=(size, _MAX_TAGS))
    tags[np.arange(_MAX_TAGS) >= rng.integers(_MAX_TAGS + 1, size=size)[:, None]] = 0
    return {
        "category": rng.integers(1, _VALUES["categorical"] + 1, size),
        "tags": tags,
        "price": rng.normal(_MEAN, _STD, size),
        "note": rng.integers(_VALUES["text"], size=(size, _WORDS)),
    }


def raw_values(columns: Mapping[str, np.ndarray], row: int) -> Row:
    """The values of a row as tables and requests hold them."""
    return {
        "category": f"category {columns['category'][row]}",
        "tags": list(dict.fromkeys(f"tag {code}" for code in columns["tags"][row] if code)),
        "price": float(columns["price"][row]),
        "note": _text(columns["note"][row]),
    }


def _text(words: np.ndarray) -> str:
    return " ".join(f"w{word:03d}" for word in words)


def _vocabulary(ids: list[str]) -> Vocabulary:
    fingerprints = hashing.fingerprints(raw_id.encode() for raw_id in ids)
    return Vocabulary(pa.array(ids, pa.string()), fingerprints, np.ones(len(ids), np.int64))


def _features(columns: Mapping[str, np.ndarray]) -> Features:
    """As the feature files of prepared data hold the columns."""
    size = len(columns["price"])
    lists = [list(dict.fromkeys(row[row > 0].tolist())) for row in columns["tags"]]
    table = pa.table(
        {
            "category": pa.array(columns["category"], pa.int32()),
            "tags": pa.array(lists, pa.list_(pa.int32())),
            "price": pa.array((columns["price"] - _MEAN) / _STD, pa.float32()),
            "note": pa.array([_text(words) for words in columns["note"]], pa.string()),
        }
    )
    specs = (
        schema.FeatureSpec("category", "categorical", size=_VALUES["categorical"]),
        schema.FeatureSpec("tags", "multi", size=_VALUES["multi"], max_length=_MAX_TAGS),
        schema.FeatureSpec("price", "numeric", mean=_MEAN, std=_STD),
        schema.FeatureSpec("note", "text"),
    )
    values = {
        name: pa.array([f"{word} {n + 1}" for n in range(_VALUES[kind])], pa.string())
        for name, word, kind in (("category", "category", "categorical"), ("tags", "tag", "multi"))
    }
    cold = table.slice(size).add_column(0, schema.RAW_ID, pa.array([], pa.string()))
    return Features(specs, table, cold, values)
