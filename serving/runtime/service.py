"""The service without a network: what the REST and gRPC APIs call, and nothing else of ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tensorflow.core.protobuf import meta_graph_pb2

from serving.errors import DeadlineExceeded, InvalidRequest, ServiceError, Unavailable
from serving.monitoring.logs import event
from serving.monitoring.metrics import Metrics
from serving.retrieval.requests import RetrieveRequest, RetrieveResponse
from serving.retrieval.retriever import Retriever
from serving.runtime.batch_queue import BatchThreads
from serving.runtime.batched_version import PREDICT, RETRIEVE, BatchedVersion
from serving.runtime.configuration import Configuration
from serving.runtime.loaded_version import LoadedVersion
from serving.runtime.manager import ModelManager
from serving.runtime.model_config import ModelConfig
from serving.runtime.process import limit_tensorflow
from serving.runtime.signature import Signature
from serving.settings import ServeConfig
from serving.version.status import VersionStatus
from serving.version.versions import VersionFiles

DEFAULT_SIGNATURE = "serving_default"

_DRAIN_STEP = 0.01  # seconds between two looks at what is still under way
_log = logging.getLogger(__name__)

Inputs = Mapping[str, np.ndarray]
_T = TypeVar("_T")


class Prediction(NamedTuple):
    """The outputs of a signature, rows in the order of the inputs, and who gave them."""

    outputs: dict[str, np.ndarray]  # strings are object arrays of bytes
    version: int
    signature: Signature


class Service:
    """Serves model versions; its methods are for the event loop unless they say otherwise.

    All refusals are `serving.errors.ServiceError`; another exception is a fault of ours.
    Deadlines are absolute `time.monotonic()` seconds; the service's own (`deadline_ms`) holds
    where it is earlier or none is given. `entrypoint` ("REST", "GRPC") and `request_id` appear
    in metrics and logs. A cancelled call leaves the queue, its batch runs without it.
    """

    def __init__(self, config: ServeConfig) -> None:
        """Reads the configuration; nothing is loaded and no thread runs before `start`.

        Raises:
          ValueError: the directory of models, the `config_file`, or the reload that was kept
            cannot be read.
        """
        self.config = config
        self.metrics = Metrics()
        self._manager = ModelManager(
            Configuration(config.models, config.config_file, config.state_dir),
            self._load,
            poll_seconds=config.poll_seconds,
            prune_versions=config.prune_versions,
            on_change=self.metrics.changed,
        )
        self._served = self._manager.served
        self._threads = BatchThreads(config.num_batch_threads)
        self._leaving = self._draining = False
        self._under_way = 0
        self.metrics.watched.queue_depth = lambda: self._threads.waiting_rows
        self.metrics.watched.statuses = lambda: {
            name: list(model.statuses.values()) for name, model in self._served.models.items()
        }
        self.metrics.watched.ready = lambda: self.ready

    def start(self, wait_seconds: float = 0) -> None:
        """Starts to load versions and run batches; waits at most so long until it is ready."""
        limit_tensorflow(self.config.intra_op_threads, self.config.inter_op_threads)
        self._threads.start()
        self._manager.start()
        if wait_seconds:
            self._manager.wait_until_ready(wait_seconds)

    @property
    def ready(self) -> bool:
        """Whether every configured model has a version to answer, and the service stays."""
        return not self._leaving and self._manager.ready

    @property
    def alive(self) -> bool:
        """Whether the threads that load and run are there; False calls for a restart."""
        return self._threads.alive and self._manager.alive

    @property
    def models(self) -> list[str]:
        """Names of the models, loaded or not."""
        return sorted(self._served.models)

    async def predict(
        self,
        model: str,
        inputs: Inputs | Callable[[Signature], Awaitable[Inputs]],
        *,
        signature: str = DEFAULT_SIGNATURE,
        version: int | None = None,
        label: str | None = None,
        deadline: float | None = None,
        entrypoint: str = "",
        request_id: str = "",
        encode: Callable[[Prediction, float], Awaitable[Any]] | None = None,
    ) -> Any:
        """Runs a signature of a version, in one batch with what others ask of it.

        Args:
          model: its name.
          inputs: an array for each input of the signature, or a function that makes them once
            version and signature are known (a JSON request has no dtypes); an InvalidRequest
            that it raises is passed on. Strings are object arrays of bytes (or str).
          signature: its name.
          version, label: at most one of them; neither for the newest version.
          deadline, entrypoint, request_id: see the class.
          encode: makes the answer from a prediction and the deadline, which holds for it, too.

        Returns:
          A `Prediction`, or what `encode` makes of it.

        Raises:
          InvalidRequest: the inputs do not fit the signature, or there is no such label; the
            message names what does, and those there are.
          NotFound: no such model or version; the message names those there are.
          FailedPrecondition: no such signature; the message names those there are.
          Overloaded, DeadlineExceeded, Unavailable: see `serving.errors`.
        """
        caller = _Caller(model, PREDICT, entrypoint, request_id)
        async with self._accounted(caller, deadline) as latest:
            with self._served.pinned(model, version, label) as pinned:
                described = pinned.loaded.signature(signature)
                if callable(inputs):
                    inputs = await self._timed("decode", caller, inputs(described))
                outputs = await pinned.predict(signature, inputs, latest)
                prediction = Prediction(outputs, pinned.loaded.number, described)
                if not encode:
                    return prediction
                return await self._timed("encode", caller, encode(prediction, latest))

    async def retrieve(
        self,
        model: str,
        request: RetrieveRequest,
        *,
        version: int | None = None,
        label: str | None = None,
        deadline: float | None = None,
        entrypoint: str = "",
        request_id: str = "",
        encode: Callable[[RetrieveResponse, float], Awaitable[Any]] | None = None,
    ) -> Any:
        """The best candidates of each query, a `RetrieveResponse`; otherwise as `predict`."""
        caller = _Caller(model, RETRIEVE, entrypoint, request_id)
        async with self._accounted(caller, deadline) as latest:
            with self._served.pinned(model, version, label) as pinned:
                response = await pinned.retrieve(request, latest)
                if not encode:
                    return response
                return await self._timed("encode", caller, encode(response, latest))

    def metadata(
        self, model: str, version: int | None = None, label: str | None = None
    ) -> tuple[int, dict[str, meta_graph_pb2.SignatureDef]]:
        """The version that answers, and its signatures by name; refusals as in `predict`."""
        with self._served.pinned(model, version, label) as pinned:
            signatures = pinned.loaded.signatures
            return pinned.loaded.number, {name: signatures[name].proto for name in signatures}

    def status(
        self, model: str, version: int | None = None, label: str | None = None
    ) -> list[VersionStatus]:
        """State of every version of a model that was looked at, newest first, or of one.

        Raises:
          NotFound: no such model or version.
          InvalidRequest: no such label.
        """
        return self._served.status(model, version, label)

    @contextlib.contextmanager
    def retriever(
        self, model: str, version: int | None = None, label: str | None = None
    ) -> Iterator[Retriever]:
        """The retriever of a version, for what it tells without a search; refusals as above.

        Raises:
          InvalidRequest: the version has none, another framework made it.
        """
        with self._served.pinned(model, version, label) as pinned:
            yield pinned.retriever

    def reload(self, configs: Sequence[ModelConfig], wait_seconds: float = 0) -> None:
        """Serves exactly these models and versions from now on; may be called by any thread.

        What is served stays until what replaces it is loaded; then the reload is kept for the
        next start. With `wait_seconds` it blocks (call it outside the event loop) until that.

        Raises:
          InvalidRequest: a path outside the models, or a label of a version that is not wanted.
          NotFound: a model or a specific version is not on disk. Nothing is changed then.
          FailedPrecondition: it could not be kept. Nothing is changed then.
          Unavailable: with `wait_seconds`, a version could not be loaded or it took longer.
          Aborted: with `wait_seconds`, another reload or an edit of the file came meanwhile.
        """
        self._manager.reload(configs, wait_seconds)

    def leave(self) -> None:
        """Is not ready from now on, and goes on to answer: clients are to look for another."""
        self._leaving = True

    async def drain(self, seconds: float) -> None:
        """Refuses new requests from now on and waits at most `seconds` for those it has."""
        self._leaving = self._draining = True
        end = time.monotonic() + seconds
        while self._under_way and time.monotonic() < end:
            await asyncio.sleep(_DRAIN_STEP)

    def close(self) -> None:
        """Ends the threads and frees the versions; call it after `drain`."""
        self._leaving = self._draining = True
        self._threads.close()
        self._manager.close()

    @contextlib.asynccontextmanager
    async def _accounted(self, caller: _Caller, deadline: float | None) -> AsyncIterator[float]:
        """Around a request: its deadline, its metrics, its line in the log if it is refused."""
        start = time.monotonic()
        latest = start + self.config.deadline_ms / 1000.0
        latest = latest if deadline is None else min(latest, deadline)
        self._under_way += 1
        try:
            if self._draining:
                raise Unavailable("The service is shutting down.")
            async with asyncio.timeout(latest - start):
                yield latest
        except asyncio.CancelledError:
            self.metrics.cancelled(self._known(caller.model), caller.api)
            raise
        except Exception as error:
            refusal = self._refusal(error, caller)
            try:  # an error that refers to itself would hold the request
                if refusal is error:
                    raise
                raise refusal from error
            finally:
                del refusal
        else:
            seconds = time.monotonic() - start
            self.metrics.answered(caller.model, caller.api, caller.entrypoint, seconds)
            if self.config.log_requests:
                event(_log, logging.INFO, "answered", **caller._asdict(), seconds=seconds)
        finally:
            self._under_way -= 1

    async def _timed(self, stage: str, caller: _Caller, work: Awaitable[_T]) -> _T:
        with self.metrics.timed(stage, caller.model, caller.api):
            return await work

    def _refusal(self, error: Exception, caller: _Caller) -> ServiceError:
        """What the client is told; a fault of ours is logged with its stack trace."""
        if isinstance(error, ServiceError):
            refusal = error
        elif isinstance(error, TimeoutError):
            refusal = DeadlineExceeded("There was no result before the deadline.")
        elif isinstance(error, UnicodeEncodeError):  # JSON may hold half of a surrogate pair
            refusal = InvalidRequest(f"Text must be Unicode: {error.reason}.")
        else:
            _log.exception("Request %s failed.", caller.request_id)
            refusal = ServiceError("The service failed; its log says why.")
        self.metrics.refused(
            refusal, caller.entrypoint, self._known(caller.model), caller.api, caller.request_id
        )
        return refusal

    def _known(self, model: str) -> str:
        """The name as a label of metrics: clients may send any."""
        return model if model in self._served.models else ""

    def _load(self, model: str, files: VersionFiles) -> BatchedVersion:
        loaded = LoadedVersion(files, self.config.index)
        try:
            loaded.warm_up(self.config.max_batch_size)
        except Exception:
            loaded.close()
            raise
        return BatchedVersion(model, loaded, self.config, self._threads, self.metrics)


class _Caller(NamedTuple):
    """Who asks for what, for metrics and logs."""

    model: str
    api: str
    entrypoint: str
    request_id: str
