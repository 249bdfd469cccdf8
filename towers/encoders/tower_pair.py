"""Both towers together: what a training step looks up, and the encoders that a method sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from pipeline.contract import schema
from samplers.candidates import Batch, Encoders
from towers.encoders.propagation import Propagation
from towers.encoders.tower import Maybe, Rows, Tower, in_blocks

Tables = dict[str, tf.Tensor]  # side → embeddings of the graph, empty without a graph


class Embedded(NamedTuple):
    """Rows that were embedded already."""

    embeddings: tf.Tensor  # [..., D]


class TowerPair:
    """The towers of a model and, where their tables spread over a graph, what spreads them.

    Args:
      query, candidate: the towers.
      propagation: between their tables and their look-ups; None: nothing is.
      temperature: what the embeddings of queries are divided by.
    """

    def __init__(
        self,
        query: Tower,
        candidate: Tower,
        propagation: Propagation | None = None,
        *,
        temperature: float = 1.0,
    ) -> None:
        self.query, self.candidate, self.propagation = query, candidate, propagation
        self._temperature = temperature
        self.dim: int = query.dim if propagation is None else propagation.dim

    def tables(self) -> Tables:
        """What all look-ups of a step read from, where that is not a variable."""
        if self.propagation is None:
            return {}
        tables = tuple(tf.convert_to_tensor(t.table) for t in (self.query, self.candidate))
        return dict(zip(schema.SIDES, self.propagation(tables), strict=True))

    def look_up(self, batch: Batch, seed: tf.Tensor | None) -> tuple[Tables, dict[str, Rows]]:
        """What the look-ups of a step read from, and the rows of a batch, to be trained on."""
        tables = self.tables()
        query = self.query.lookup(
            batch.query_ids, table=tables.get("query"), positives=batch.candidate_ids, seed=seed
        )
        positive = self.candidate_rows(batch.candidate_ids, tables, seed)
        return tables, {"query": query, "positive": positive}

    def candidate_rows(self, ids: tf.Tensor, tables: Tables, seed: tf.Tensor | None) -> Rows:
        """The rows of candidates [...]."""
        return self.candidate.lookup(ids, table=tables.get("candidate"), seed=seed)

    def encoders(self, rows: dict[str, Rows], tables: Tables, seed: tf.Tensor | None) -> Encoders:
        """The towers as a method sees them, from what `look_up` gave.

        `rows` may also hold `columns`, the embeddings of what `Batch.columns` are.
        """

        def candidates(ids: tf.Tensor | None = None) -> tf.Tensor:
            return _embed(self.candidate, ids, tables.get("candidate"), seed)

        return Encoders(
            query=_embeddings(rows["query"], lambda row: self.query(row) / self._temperature),
            positive=_embeddings(rows["positive"], self.candidate),
            candidates=candidates,
            corpus=candidates,
            queries=lambda ids: self.queries(ids, tables),
            whole=rows["columns"].embeddings if "columns" in rows else None,
        )

    def encoders_without_batch(self) -> Encoders:
        """The same with no queries, [0, D], between epochs."""
        nothing = Embedded(tf.zeros([0, self.dim]))
        return self.encoders({"query": nothing, "positive": nothing}, self.tables(), None)

    def queries(self, ids: tf.Tensor | None = None, tables: Tables | None = None) -> tf.Tensor:
        """Embeddings of queries [...] or of all, over the temperature: [..., D]."""
        tables = self.tables() if tables is None else tables
        return _embed(self.query, ids, tables.get("query")) / self._temperature

    def candidates(self, ids: tf.Tensor | None = None) -> tf.Tensor:
        """Embeddings of candidates [...] or of the whole corpus: [..., D]."""
        return _embed(self.candidate, ids, self.tables().get("candidate"))


def _embeddings(rows: Rows, embed: Callable[[Rows], tf.Tensor]) -> tf.Tensor:
    return rows.embeddings if isinstance(rows, Embedded) else embed(rows)


def _embed(tower: Tower, ids: Maybe, table: Maybe, seed: Maybe = None) -> tf.Tensor:
    """As `Tower.embed`; in a notebook or an export a whole vocabulary goes block by block."""
    if ids is not None or table is not None or not tf.executing_eagerly():
        return tower.embed(ids, table=table, seed=seed)
    return in_blocks(lambda block: tower.embed(block, seed=seed), tower.vocabulary_size)


def floats_in(*nests: Any) -> list[tf.Tensor]:
    """The tensors of some nests that can have a gradient, in a fixed order."""
    return [t for t in tf.nest.flatten(nests) if t is not None and t.dtype.is_floating]
