"""From the embeddings of a request to its results: an index first, then what filters ask for.

A query that filters leave fewer than k of the K results of an index is searched again: ScaNN is
asked for more, and what is still missing is scored among all candidates that it may get. What
filters choose by `allow` or `where` decides what comes first: few candidates are scored each, of a
larger share so many results are asked for that k of them are among them, if they lie evenly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from serving.retrieval.corpus import Corpus, FilterRows
from serving.retrieval.filters import MAX_SCORES, Best, Filters, best_rows, first
from serving.retrieval.requests import RetrieveRequest, RetrieveResult, UnknownQuery
from serving.version import served_model
from serving.version.index import best_rows as best_rows_of

_MAX_WIDENING = 8  # times K: what a wider search may be asked for
_FEW_CHOSEN = 20_000  # so few rows are scored each; more are sought among an index's results
_SPREAD = 2  # standard deviations that an index is asked for beyond k of its results, on average

_NOTHING = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)


class Hits(NamedTuple):
    """Results of an index for B queries, best first; row -1 for no result."""

    rows: np.ndarray  # int32 [B, n]
    scores: np.ndarray  # float32 [B, n]


class IndexSearch:
    """The loaded SavedModel of an index ("exact" or "scann"), in NumPy on both sides.

    Its results are joined by the added candidates that score above the last of them. Those below
    wait: what the index did not return may score higher.

    Attributes:
      signature: the function `embedding_search`, of the base.
      widest: most results that `search_wider` may ask of the index; 0: it cannot give more.
      spare: results that are asked for beyond K, as removed candidates may be among them.
    """

    def __init__(self, model: Any, kind: str, k: int, corpus: Corpus) -> None:
        self.model, self.kind, self.k = model, kind, k
        num_candidates = len(corpus.vectors)
        self._first_added = num_candidates  # row
        self._added = tf.constant(np.ascontiguousarray(corpus.added.T))  # [D, A]
        self.signature = model.signatures[served_model.EMBEDDING_SEARCH]
        if kind == "exact":
            self.signature = _exact_search(corpus.vectors, k)
        self._wide_search = model.signatures.get(served_model.WIDE_SEARCH)
        self.widest = 0 if self._wide_search is None else min(_MAX_WIDENING * k, num_candidates)
        removed, self.spare = len(corpus.removed), 0
        if removed and self.widest:  # they are spread over the corpus, and 4 times as many come
            self.spare = min(16 + 4 * k * removed // num_candidates, removed, self.widest - k)
        takes_leaves = served_model.LEAVES_TO_SEARCH in self.signature.structured_input_signature[1]
        self._tuned = {served_model.LEAVES_TO_SEARCH: tf.constant(0)} if takes_leaves else {}

    def search(self, embeddings: np.ndarray, k: int) -> Hits:
        """The K best or more for embeddings [B, D], as good as the index promises.

        At most K, `k` of them are wanted when removed candidates are gone.
        """
        if self.spare and k + self.spare > self.k:
            return self.search_wider(embeddings, k + self.spare)
        return self._run(self.signature, embeddings, self._tuned)

    def search_wider(self, embeddings: np.ndarray, num_results: int) -> Hits:
        """As `search`, with `num_results` of the index, at most `widest`."""
        inputs = {served_model.NUM_RESULTS: tf.constant(num_results)}
        return self._run(self._wide_search, embeddings, inputs)

    def after(self, encoder: Any) -> Any:
        """A signature of queries and this search as one call: -> rows, scores [B, K].

        A call of its own costs as much as the search of one query. TensorFlow's operation runs a
        function in half the time of calling it, which binds inputs by name each time.
        """
        specs = encoder.structured_input_signature[1]

        @tf.function(autograph=False)
        def search(*inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            queries = encoder(**dict(zip(specs, inputs, strict=True)))
            embedding = {served_model.EMBEDDING: queries[served_model.EMBEDDING]}
            results = self.signature(**embedding, **self._tuned)
            rows, scores = results[served_model.CANDIDATE_ROW], results[served_model.SCORE]
            is_result = queries[served_model.KNOWN][:, tf.newaxis] & (rows >= 0)
            return tf.where(is_result, rows, -1), tf.where(is_result, scores, 0.0)

        function = search.get_concrete_function(*specs.values())
        types, captured = [output.dtype for output in function.outputs], function.captured_inputs

        def run(**inputs: tf.Tensor) -> Any:
            values = [*(inputs[name] for name in specs), *captured]
            return tf.raw_ops.StatefulPartitionedCall(args=values, Tout=types, f=function)

        return run

    def _run(self, search: Any, embeddings: np.ndarray, inputs: dict[str, Any]) -> Hits:
        outputs = search(**{served_model.EMBEDDING: tf.constant(embeddings)}, **inputs)
        rows, scores = outputs[served_model.CANDIDATE_ROW], outputs[served_model.SCORE]
        return self._with_added(Hits(rows.numpy(), scores.numpy()), embeddings)

    def _with_added(self, hits: Hits, embeddings: np.ndarray) -> Hits:
        last = np.where(hits.rows[:, -1:] < 0, -np.inf, hits.scores[:, -1:])  # [B, 1]
        num_added = self._added.shape[1]
        size = max(1, MAX_SCORES // max(1, num_added))
        found = [_NOTHING]  # queries, added rows, scores
        for start in range(0, len(embeddings), size) if num_added else ():
            piece = slice(start, start + size)
            # TensorFlow's threads are there already; those of NumPy would fight with them. A
            # memoryview, as `numpy()` copies.
            scores = np.asarray(memoryview(tf.matmul(embeddings[piece], self._added)))
            places = np.flatnonzero(scores > last[piece])
            queries, rows = np.divmod(places, num_added)
            found.append((start + queries, rows, scores.ravel()[places]))
        queries, rows, scores = map(np.concatenate, zip(*found, strict=True))
        if not len(rows):
            return hits
        counts = np.bincount(queries, minlength=len(embeddings))
        places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        more = Hits(
            np.full((len(counts), counts.max()), -1, np.int32),
            np.full((len(counts), counts.max()), -np.inf, np.float32),
        )
        more.rows[queries, places], more.scores[queries, places] = self._first_added + rows, scores
        joined = Hits(*(np.concatenate(parts, axis=1) for parts in zip(hits, more, strict=True)))
        joined.scores[joined.rows < 0] = -np.inf
        order = np.argsort(-joined.scores, axis=1, kind="stable")
        return Hits(*(np.take_along_axis(part, order, axis=1) for part in joined))


def load_exact(path: Path) -> Any:
    """The exact model without vectors and ids, which `IndexSearch` maps from files.

    TensorFlow keeps the memory of what is restored, also when it is freed.
    """
    options = tf.saved_model.LoadOptions(experimental_skip_checkpoint=True)
    model = tf.saved_model.load(str(path), options=options)
    encoder = tf.train.Checkpoint(encoder=model.encoder)
    try:
        encoder.read(str(path / "variables" / "variables")).expect_partial()
    except BaseException:
        destroy_tables(model)
        raise
    return model


def destroy_tables(model: Any) -> None:
    """Frees the lookup tables of a SavedModel: TensorFlow keeps them when the model is gone."""
    for part in tf.train.TrackableView(model).descendants():
        handle = getattr(part, "resource_handle", None)
        if handle is not None and not isinstance(part, tf.Variable):
            tf.raw_ops.DestroyResourceOp(resource=handle, ignore_lookup_error=True)


def _exact_search(vectors: np.ndarray, k: int) -> Any:
    """`embedding_search` of the exact model over vectors [N, D] that are mapped, not copied."""
    mapped = tf.experimental.dlpack.from_dlpack(vectors.__dlpack__())
    mapped = tf.identity(mapped) if tf.config.list_logical_devices("GPU") else mapped
    embedding = tf.TensorSpec([None, vectors.shape[1]], tf.float32, name=served_model.EMBEDDING)

    @tf.function(input_signature=[embedding], autograph=False)
    def embedding_search(embedding: tf.Tensor) -> dict[str, tf.Tensor]:
        rows, scores = best_rows_of(mapped, embedding, min(k, len(vectors)))
        return {served_model.CANDIDATE_ROW: rows, served_model.SCORE: scores}

    return embedding_search.get_concrete_function()


class CheckedQueries(NamedTuple):
    """Queries of a request that is checked; its filters, as rows, are shared by all parts."""

    request: RetrieveRequest
    query_ids: Sequence[str]  # B, "" each where embeddings were given
    queries: Sequence[Mapping[str, Any]] | None  # B, what the request says of each, if it does
    embeddings: np.ndarray | None  # float32 [B, D], None where they are still to be made
    shared: FilterRows

    def parts(self, size: int) -> Iterator[CheckedQueries]:
        """In pieces of at most `size` queries; without queries there is one piece."""
        for start in range(0, len(self.query_ids) or 1, size):
            piece = slice(start, start + size)
            given = None if self.embeddings is None else self.embeddings[piece]
            queries = None if self.queries is None else self.queries[piece]
            yield self._replace(query_ids=self.query_ids[piece], queries=queries, embeddings=given)


class EmbeddedQueries(NamedTuple):
    """B queries with the same request, ready for a search."""

    request: RetrieveRequest
    query_ids: Sequence[str]  # B
    embeddings: np.ndarray  # float32 [B, D]
    known: np.ndarray  # bool [B], whether the model knows them
    unknown_history: np.ndarray  # int32 [B], ids of their histories that it does not know
    filters: Filters
    unknown_ids: int

    def asks_index(self, k: int) -> bool:
        """Whether the K results of an index are worth looking at first."""
        return self.request.k <= k and self.num_asked <= k and not self.chooses_few

    @property
    def chooses_few(self) -> bool:
        """Whether filters leave so few candidates that each is scored."""
        return self.filters.is_chosen and self.filters.num_shared <= _FEW_CHOSEN

    @property
    def num_asked(self) -> int:
        """How many results have k of the chosen ones among them, if these lie evenly."""
        k, filters = self.request.k, self.filters
        if not filters.is_chosen:
            return k
        wanted = k + _SPREAD * math.sqrt(k)
        return math.ceil(wanted * filters.num_candidates / max(1, filters.num_shared))


def results(
    queries: EmbeddedQueries,
    index: IndexSearch,
    hits: Hits | None,
    corpus: Corpus,
    unknown_queries: str,
) -> list[RetrieveResult]:
    """The results of a request, in the order of its queries.

    `hits` are the K results of the index, None where `asks_index` is False; it is searched again
    where they do not suffice.

    Raises:
      UnknownQuery: there is one, and that is to be an error.
      InvalidRequest: there is one, and the version does not know what is popular.
    """
    unknown = np.flatnonzero(~queries.known).tolist()
    if unknown and unknown_queries == "error":
        shown = ", ".join(repr(queries.query_ids[query][:80]) for query in unknown[:3])
        raise UnknownQuery(
            f"{len(unknown)} of {len(queries.known)} queries are not known to the model: {shown}"
            f"{', ...' if len(unknown) > 3 else ''}."
        )
    best = best_of_known(queries, index, hits, corpus)
    fallback = "popular" if unknown_queries == "popular" else ""
    for query in unknown if fallback else ():
        best[query] = corpus.popular_rows(queries.filters, query, queries.request.k)
    answers = []
    columns = queries.query_ids, queries.known.tolist(), queries.unknown_history.tolist(), best
    for query_id, known, skipped, (rows, scores) in zip(*columns, strict=True):
        names, values = corpus.encoded_ids.names(rows), scores.astype(float).tolist()
        shown = "" if known else fallback
        titles = corpus.titles(rows)
        answers.append(RetrieveResult(query_id, known, names, values, shown, skipped, titles))
    return answers


def best_of_known(
    queries: EmbeddedQueries, index: IndexSearch, hits: Hits | None, corpus: Corpus
) -> list[Best]:
    """Rows and scores for each query that is known, nothing for the others."""
    filters, k = queries.filters, queries.request.k
    best: list[Best] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries.known)
    left = np.flatnonzero(queries.known)
    below = np.zeros(len(best), bool)  # whose results go below the lowest score
    if hits is not None:
        hits = Hits(hits.rows[left], hits.scores[left])
        enough = _take(queries, left, hits, best)
        is_low = (hits.rows >= 0) & (hits.scores < filters.min_score)
        below[left] = np.logical_or.reduce(is_low, axis=1)
        if index.kind == "exact":  # what is not among the results is lower still
            enough |= below[left]
        left = left[~enough]
    for asked in _widths(queries, index, corpus, is_searched=hits is not None):
        wide = left[(asked[left] <= index.widest) & ~below[left]]
        if len(wide):
            num_results = max(index.k, int(asked[wide].max()))
            wider = index.search_wider(queries.embeddings[wide], num_results)
            enough = _take(queries, wide, wider, best)
            left = np.setdiff1d(left, wide[enough])
    vectors = [corpus.vectors, corpus.added]
    exactly = best_rows(vectors, queries.embeddings[left], filters, left, k)
    for query, rows_and_scores in zip(left, exactly, strict=True):
        best[query] = rows_and_scores
    return best


def _widths(
    queries: EmbeddedQueries, index: IndexSearch, corpus: Corpus, *, is_searched: bool
) -> list[np.ndarray]:
    """How many results an index is asked for, one try after the other: int [B] each."""
    filters, k = queries.filters, queries.request.k
    if not filters.is_chosen:
        barred = corpus.num_candidates - len(corpus.removed) - filters.num_left  # by the request
        # So many results cannot all be barred but k; if they are too few, leaves were.
        return [k + barred + index.spare]
    if queries.chooses_few or queries.num_asked > index.widest:
        return []
    tries = [index.widest] if is_searched else [queries.num_asked, index.widest]
    return [np.full(len(queries.known), asked) for asked in tries]


def _take(queries: EmbeddedQueries, places: np.ndarray, hits: Hits, best: list[Best]) -> np.ndarray:
    """Sets the results that pass the filters; whether they are enough: bool, one a query."""
    filters, k = queries.filters, queries.request.k
    taken = first(filters.may_get(hits.rows, places) & (hits.scores >= filters.min_score), k)
    counts = taken.sum(axis=1)
    ends = np.cumsum(counts)[:-1]
    parts = zip(np.split(hits.rows[taken], ends), np.split(hits.scores[taken], ends), strict=True)
    for query, part in zip(places, parts, strict=False):  # of no queries there is one empty part
        best[query] = part
    return np.greater_equal(counts, np.minimum(k, filters.num_left[places]))
