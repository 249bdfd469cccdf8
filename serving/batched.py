"""A loaded version whose requests are batched: one queue a signature, one for retrieval."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from serving import joining
from serving.batching import Batcher, BatchOptions, BatchThreads
from serving.config import ServeConfig
from serving.errors import InvalidRequest, NotFound
from serving.loaded import LoadedVersion
from serving.monitoring import Metrics
from serving.requests import RetrieveRequest, RetrieveResponse, UnknownQuery
from serving.retriever import Retriever

PREDICT, RETRIEVE = "predict", "retrieve"  # names of the APIs in the metrics

Arrays = Mapping[str, np.ndarray]
_R = TypeVar("_R")


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
        alone = options._replace(max_batch_size=1)
        on_predict = partial(metrics.batch, model, PREDICT)
        self._predict: dict[str, Batcher[Arrays, dict[str, np.ndarray]]] = {
            name: Batcher(
                threads,
                partial(loaded.run_all, name),
                options if signature.by_rows else alone,
                on_predict,
            )
            for name, signature in loaded.signatures.items()
        }
        on_retrieve = partial(metrics.batch, model, RETRIEVE)
        # Nothing here refers back to this object: it is freed with its last reference.
        answer_all = partial(_answer_all, loaded, config.unknown_queries)
        self._retrieve = Batcher(threads, answer_all, options, on_retrieve)

    @property
    def retriever(self) -> Retriever:
        """Answers without batching.

        Raises:
          InvalidRequest: there is none, another framework made the version.
        """
        if self.loaded.retriever is None:
            raise InvalidRequest(
                f"Version {self.loaded.number} was not made by `twotower export`: it answers "
                ":predict alone."
            )
        return self.loaded.retriever

    async def predict(self, name: str, inputs: Arrays, deadline: float) -> dict[str, np.ndarray]:
        """Runs a signature; more rows than a batch has are run in several.

        Raises:
          InvalidRequest, NotFound, Overloaded, DeadlineExceeded, Unavailable: see `Service`.
        """
        arrays = self.loaded.fit(name, inputs)
        signature, batcher = self.loaded.signatures[name], self._predict[name]
        rows, key = signature.rows(arrays), signature.row_shapes(arrays)
        size = self._config.max_batch_size
        if rows <= size or not signature.by_rows:
            return await batcher.submit(arrays, rows, key=key, deadline=deadline)
        _check_size(rows, batcher.capacity)
        parts = await _all(
            batcher.submit(part, min(size, rows - at * size), key=key, deadline=deadline)
            for at, part in enumerate(joining.pieces(arrays, size))
        )
        return dict(joining.join(parts))

    async def retrieve(self, request: RetrieveRequest, deadline: float) -> RetrieveResponse:
        """Answers a request; more queries than a batch has are searched in several."""
        _ = self.retriever  # refused before it is queued
        if request.k > self._config.max_k:
            raise InvalidRequest(f"k must be at most {self._config.max_k}, got {request.k}.")
        "".join(request.query_ids or ()).encode()  # TensorFlow takes no half of a surrogate pair
        parts = list(_parts(request, self._config.max_batch_size))
        _check_size(sum(rows for _, rows in parts), self._retrieve.capacity)
        responses = await _all(
            self._retrieve.submit(part, rows, deadline=deadline) for part, rows in parts
        )
        results = [result for response in responses for result in response.results]
        return dataclasses.replace(responses[0], results=results)

    def close(self) -> None:
        """Frees the version, once nothing runs that its last requests did not wait for."""
        for batcher in self._predict.values():
            batcher.wait_until_idle()
        self._retrieve.wait_until_idle()
        self.loaded.close()


def _answer_all(
    loaded: LoadedVersion, unknown_queries: str, requests: Sequence[RetrieveRequest]
) -> list[RetrieveResponse | Exception]:
    retriever = loaded.retriever
    assert retriever is not None
    if unknown_queries == "popular" and not retriever.has_popularity:
        unknown_queries = "empty"
    return [_known(one) for one in retriever.answer_all(requests, unknown_queries=unknown_queries)]


def _known(outcome: RetrieveResponse | Exception) -> RetrieveResponse | Exception:
    """Errors of a retriever as those of a service."""
    if isinstance(outcome, UnknownQuery):
        return NotFound(str(outcome))
    if isinstance(outcome, ValueError):
        return InvalidRequest(str(outcome))
    return outcome


def _parts(request: RetrieveRequest, size: int) -> Iterator[tuple[RetrieveRequest, int]]:
    """The request in pieces of at most `size` queries, and how many each has."""
    queries = {"query_ids": request.query_ids, **(request.features or {})}
    columns = [column for column in queries.values() if isinstance(column, Sequence | np.ndarray)]
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or max(lengths) <= size:  # lengths that differ are refused with a reason
        yield request, max(lengths, default=1)
        return
    for start in range(0, max(lengths), size):
        piece = slice(start, start + size)
        ids = request.query_ids and request.query_ids[piece]
        features = request.features and {n: v[piece] for n, v in request.features.items()}
        rows = min(size, max(lengths) - start)
        yield dataclasses.replace(request, query_ids=ids, features=features), rows


def _check_size(rows: int, most: int) -> None:
    if rows > most:
        raise InvalidRequest(f"A request may have at most {most} rows, got {rows}: split it.")


async def _all(futures: Iterable[asyncio.Future[_R]]) -> list[_R]:
    """The results of all; where one is refused, the others are not waited for."""
    submitted: list[asyncio.Future[_R]] = []
    try:
        submitted.extend(futures)
        return [await submitted[0]] if len(submitted) == 1 else await asyncio.gather(*submitted)
    finally:
        for future in submitted:
            future.cancel()
