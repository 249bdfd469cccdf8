"""The best candidates of raw queries, by the graph that a published version encodes them with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tensorflow as tf

from pipeline.contract import hashing, schema
from towers.data.attributes import raw_values
from towers.data.interactions import Positives, RetrievalData, find_ids
from towers.metrics.ranking import rank_blocks, tie_order
from towers.model.encoder import HISTORY, Encoder

if TYPE_CHECKING:
    from towers.model.two_tower import TwoTower

_BLOCK = 1 << 16  # ids that are embedded at a time
TITLE = "title"  # column of the items' table that answers show


def recommend(
    model: TwoTower,
    queries: Sequence[Any] | None = None,
    *,
    history: Sequence[Sequence[Any]] | None = None,
    attributes: Mapping[str, Sequence[Any]] | None = None,
    k: int = 10,
    exclude_seen: bool = False,
) -> pd.DataFrame:
    """The k best candidates of raw queries, by the graph that a published version has.

    >>> import pandas as pd, towers
    >>> log = pd.DataFrame({"user": ["ann", "ann", "bob"], "item": ["tea", "milk", "tea"]})
    >>> data = towers.from_dataframe(log, user="user", item="item", train_ratio=1.0)
    >>> model = towers.TwoTower(data, dim=4, tower="fism")
    >>> model.recommend(["bob"], exclude_seen=True)["candidate_id"].tolist()
    ['milk']
    >>> len(model.recommend(history=[["tea"], ["milk"]], k=1))  # someone new
    2

    Args:
      queries: B raw ids; None: of someone new.
      history: B lists of raw candidate ids, the oldest first, of a tower that reads them; of
        a known id it stands in place of what was trained on, unless it is None.
      attributes: column → B values, None or NaN where one is missing, of a tower that reads them.
      k: candidates of each query; fewer where fewer are left.
      exclude_seen: leave out what a query has in train and validation, and its history.

    Returns:
      A row a candidate, best first: query_id (of someone new its place, from 0), rank from 1,
      candidate_id, score, and title where the items' table has a column of that name.

    Raises:
      ValueError: a query is not known, or the tower does not read what is given.
    """
    data = model.data
    given: dict[str, Any] = {schema.QUERY_ID: queries, HISTORY: history, **(attributes or {})}
    given = {
        name: [None if pd.api.types.is_scalar(v) and pd.isna(v) else v for v in values]
        for name, values in given.items()
        if values is not None
    }
    sizes = {name: len(values) for name, values in given.items()}
    whole = [queries, *given.get(HISTORY, ())]  # a text would be taken for a list of letters
    if len(set(sizes.values())) != 1 or 0 in sizes.values() or str in map(type, whole):
        raise ValueError(
            "recommend needs lists of one length, of ids, of histories or of both, such as "
            f'recommend(["ann"]) or recommend(history=[["tea", "milk"]]), got {sizes or queries}.'
        )
    candidates = all_ids(data, model, "candidate")
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k must be at least 1, without decimals, got {k!r}.")
    with tempfile.TemporaryDirectory() as scratch:
        encoder = Encoder(data, model, "query", Path(scratch))
        outputs = encoder.requested(_inputs(encoder.specs, given))
    names = given.get(schema.QUERY_ID, list(range(len(outputs["known"]))))
    if unknown := [names[row] for row in np.flatnonzero(~outputs["known"].numpy())]:
        raise ValueError(
            f"the model does not know {len(unknown)} of the queries, such as {unknown[0]!r}: leave "
            "them out, or say what they chose: history=[[...]], of a tower that reads histories."
        )
    prints = all_fingerprints(data, model, "candidate")
    seen = _seen(data, given, prints) if exclude_seen else []
    owners, left_out = np.array(seen, np.int64).reshape(-1, 2).T
    blocks = rank_blocks(
        outputs["embedding"],
        partial(vectors, model, "candidate"),
        np.arange(len(names)),
        Positives(owners, left_out, len(names)),
        k=k,
        order=tie_order(prints),
    )
    ranked, scores = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    kept = ranked >= 0
    rows, ranks = np.nonzero(kept)
    answer = {
        schema.QUERY_ID: [names[row] for row in rows],
        "rank": ranks + 1,
        schema.CANDIDATE_ID: candidates.take(pa.array(ranked[kept])).to_pylist(),
        "score": scores[kept],
    }
    if titles := candidate_titles(data):
        answer[TITLE] = [titles[row] if row < len(titles) else None for row in ranked[kept]]
    return pd.DataFrame(answer)


def candidate_titles(data: RetrievalData, column: str = "") -> list[Any]:
    """What people call the candidates, by dense id: a column of the items' table, or None.

    Without the name of a column it is `title`, and the list is empty if there is no such column.

    Raises:
      ValueError: there is no column of that name.
    """
    features = data.features("candidate")
    if not column and TITLE not in [spec.name for spec in features.specs]:
        return []
    return raw_values(features, (), [column or TITLE])[column or TITLE].to_pylist()


def _inputs(specs: dict[str, tf.TensorSpec], given: dict[str, Any]) -> dict[str, tf.Tensor]:
    """The inputs of an encoder; what is not given is missing: "" or NaN."""
    if unknown := sorted(set(given) - set(specs)):
        hint = " (history: train tower fism, svdpp, or features with a history)"
        raise ValueError(
            f"the tower of queries does not read {', '.join(unknown)}, it reads "
            f"{', '.join(specs)}{hint if HISTORY in unknown else ''}."
        )
    size, inputs = len(next(iter(given.values()))), {}
    for name, spec in specs.items():
        values = given.get(name, [None] * size)
        if spec.dtype.is_floating:
            inputs[name] = tf.constant([np.nan if v is None else v for v in values], spec.dtype)
        elif spec.shape.rank == 1:
            texts = ["" if value is None else str(value) for value in values]
            inputs[name] = tf.constant(texts, tf.string)
        else:
            lists = [[str(value) for value in (() if v is None else v)] for v in values]
            inputs[name] = tf.ragged.constant(lists, tf.string, ragged_rank=1).to_tensor("")
    return inputs


def _seen(data: RetrievalData, given: dict[str, Any], prints: np.ndarray) -> list[tuple[int, int]]:
    """(row, candidate) of what each query has in train, in validation or in its history."""
    known, seen = data.positives("train", "validation"), []
    for row, query in enumerate(data.encode_queries(given.get(schema.QUERY_ID, ()))):
        if query >= 0:
            seen += [(row, candidate) for candidate in known.of(query)]
    for row, history in enumerate(given.get(HISTORY, ())):
        chosen = hashing.fingerprints(str(v).encode() for v in (() if history is None else history))
        places, known_ids = find_ids(chosen, prints)
        seen += [(row, candidate) for candidate in places[known_ids]]
    return seen


def vectors(model: TwoTower, side: str, ids: np.ndarray | None = None) -> tf.Tensor:
    """What ids [n] are scored by; None: all V by dense id, then the cold ones: float32 [n, D].

    Those of queries are divided by the temperature. Made in place, so that they are there once.
    """
    embed, tower = getattr(model, f"{side}_embeddings"), getattr(model, f"{side}_tower")
    if model.propagation is not None:
        embed = partial(tf.gather, embed())
    size, cold = tower.vocabulary_size, tf.cast(tower.embed_cold(), tf.float32)
    cold /= model.temperature if side == "query" else 1.0
    ids = np.arange(size + len(cold)) if ids is None else ids
    made = tf.raw_ops.Empty(shape=[len(ids), embed(ids[:1] * 0).shape[1]], dtype=tf.float32)
    for start in range(0, len(ids), _BLOCK):
        block = ids[start : start + _BLOCK]
        rows = embed(np.minimum(block, size - 1))
        if (is_cold := np.flatnonzero(block >= size)).size:
            cold_rows = tf.gather(cold, block[is_cold] - size)
            rows = tf.tensor_scatter_nd_update(rows, is_cold[:, None], cold_rows)
        made = tf.raw_ops.InplaceUpdate(x=made, i=tf.range(start, start + len(block)), v=rows)
    return made


def all_ids(data: RetrievalData, model: TwoTower, side: str) -> pa.Array:
    """Raw ids by dense id, then those that the tower knows by their attributes alone."""
    vocabulary, tower = getattr(data, f"{side}_vocabulary"), getattr(model, f"{side}_tower")
    return pa.concat_arrays([vocabulary.raw_ids, tower.cold_ids])


def all_fingerprints(data: RetrievalData, model: TwoTower, side: str) -> np.ndarray:
    """The fingerprints of `all_ids`: int64 [V + cold]."""
    vocabulary, tower = getattr(data, f"{side}_vocabulary"), getattr(model, f"{side}_tower")
    cold = hashing.fingerprints(text.as_py().encode() for text in tower.cold_ids)
    return np.concatenate([vocabulary.fingerprints, cold])
