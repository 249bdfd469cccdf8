"""A loaded version whose requests are batched: one queue a signature, one for retrieval."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from serving.errors import InvalidRequest, check_ids, check_rows
from serving.monitoring.metrics import Metrics
from serving.retrieval.requests import RetrieveRequest, RetrieveResponse
from serving.retrieval.retriever import Retriever
from serving.runtime.batch_queue import Batcher, BatchOptions, BatchThreads
from serving.runtime.loaded_version import Arrays, LoadedVersion, join, split
from serving.runtime.process import aside
from serving.settings import ServeConfig
from serving.version.served_model import SCORE

PREDICT, RETRIEVE = "predict", "retrieve"  # names of the APIs in the metrics
MAX_RESULTS = 640_000  # of a request: 6,400 rows of 100, or 640 of 1,000
MAX_FILTER_IDS = 100_000  # of a request
_NO_FILTERS = {"query_ids", "queries", "features", "k", "index", "unknown_queries"}
_MASK = 1 << 16  # values that are compared for a condition which is new, about
_WIDTH = 64  # values of an embedding, about


class BatchedVersion:
    """Answers requests on an event loop with a version that runs in threads."""

    def __init__(
        self,
        model: str,
        loaded: LoadedVersion,
        config: ServeConfig,
        threads: BatchThreads,
        metrics: Metrics,
    ) -> None:
        self.loaded = loaded
        self._config = config
        options = BatchOptions(
            config.max_batch_size, config.batch_timeout_micros / 1e6, config.max_enqueued_batches
        )
        retriever = loaded.retriever
        quick = retriever is not None  # the model of somebody else may wait for anything
        alone = options._replace(max_batch_size=1)
        on_predict = partial(metrics.batch, model, PREDICT)
        self._predict: dict[str, Batcher] = {}
        for name, signature in loaded.signatures.items():
            knobs = options if signature.by_rows else alone
            run = partial(loaded.run_all, name)
            self._predict[name] = Batcher(threads, run, knobs, on_predict, may_be_quick=quick)
        self._batchers: list[Batcher] = list(self._predict.values())
        if retriever is None:
            return
        unknown, on_retrieve = config.unknown_queries, partial(metrics.batch, model, RETRIEVE)
        if unknown == "popular" and not retriever.corpus.has_popularity:
            unknown = "empty"
        # Nothing here refers back to this object: it is freed with its last reference.
        answer = partial(retriever.answer_all, unknown_queries=unknown)
        self._retrieve = Batcher(threads, answer, options, on_retrieve, may_be_quick=True)
        # What scores all candidates leaves one thread to what an index answers.
        most = max(1, config.num_batch_threads - 1)
        self._score_all = Batcher(threads, answer, options, on_retrieve, most)
        self._batchers += [self._retrieve, self._score_all]

    @property
    def retriever(self) -> Retriever:
        """Answers without batching; InvalidRequest for a version of another framework."""
        if self.loaded.retriever is None:
            raise InvalidRequest(
                f"Version {self.loaded.number} was not made by `twotower export`: it answers "
                ":predict alone."
            )
        return self.loaded.retriever

    async def predict(
        self, name: str, inputs: Arrays, deadline: float, alone: bool
    ) -> dict[str, np.ndarray]:
        """Runs a signature; more rows than a batch has are run in several."""
        arrays = self.loaded.fit(name, inputs)
        signature, batcher = self.loaded.signatures[name], self._predict[name]
        rows, key = signature.rows(arrays), signature.row_shapes(arrays)
        size = self._config.max_batch_size
        if signature.by_rows:
            check_rows(rows, batcher.capacity)
        if self.loaded.retriever is not None and SCORE in signature.outputs:
            _check_results(rows, self.loaded.retriever.k)
        if rows > size and signature.by_rows and name not in self.loaded.not_by_rows:
            counts = [min(size, rows - start) for start in range(0, rows, size)]
            parts = await _all(
                batcher.submit(piece, count, key=key, deadline=deadline)
                for piece, count in zip(split(arrays, counts), counts, strict=True)
            )
            if self.loaded.have_rows(name, parts, counts):
                return dict(join(parts))
        return await batcher.submit(arrays, rows, key=key, deadline=deadline, alone=alone)

    async def retrieve(
        self, request: RetrieveRequest, deadline: float, alone: bool
    ) -> RetrieveResponse:
        """Answers a request; more queries than a batch has are searched in several."""
        retriever, filter_ids = self.retriever, len(request.exclude) + len(request.allow or ())
        columns = [request.query_ids, request.queries, *(request.features or {}).values()]
        sizes = [len(column) for column in columns if isinstance(column, Sequence | np.ndarray)]
        rows = max(sizes, default=0)
        check_rows(rows, self._retrieve.capacity)
        if request.k > self._config.max_k:
            raise InvalidRequest(f"k must be at most {self._config.max_k}, got {request.k}.")
        check_ids(request.query_ids or ())
        _check_results(rows, min(request.k, retriever.num_candidates))
        if filter_ids > MAX_FILTER_IDS:
            raise InvalidRequest(
                f"exclude and allow may have at most {MAX_FILTER_IDS} ids, got {filter_ids}."
            )
        size = filter_ids + rows * (1 if request.query_ids is not None else _WIDTH)
        size += _MASK if request.where else 0
        checked = await aside(size, partial(retriever.check, request))
        scores_all = retriever.default_index != "exact" and retriever.scores_all(request)
        batcher = self._score_all if scores_all else self._retrieve
        # What was quick without filters need not be with them: all may have to be scored.
        alone = alone and request.k <= retriever.k and request.model_fields_set <= _NO_FILTERS
        responses = await _all(
            batcher.submit(part, len(part.query_ids), deadline=deadline, alone=alone)
            for part in checked.parts(self._config.max_batch_size)
        )
        results = [result for response in responses for result in response.results]
        return dataclasses.replace(responses[0], results=results)

    def close(self) -> None:
        """Frees the version, once nothing runs that its last requests did not wait for."""
        for batcher in self._batchers:
            batcher.wait_until_idle()
        self.loaded.close()


def _check_results(rows: int, k: int) -> None:
    if rows * k > MAX_RESULTS:
        raise InvalidRequest(
            f"A request may have at most {MAX_RESULTS} results, {rows} rows of {k} are more: "
            "split it."
        )


async def _all(futures: Iterable[asyncio.Future[Any]]) -> list[Any]:
    """The results of all; where one is refused, the others are not waited for."""
    submitted: list[asyncio.Future[Any]] = []
    try:
        submitted.extend(futures)
        return [await submitted[0]] if len(submitted) == 1 else await asyncio.gather(*submitted)
    finally:
        for future in submitted:
            future.cancel()
        submitted.clear()  # with what they raise they make a cycle, which holds the request
