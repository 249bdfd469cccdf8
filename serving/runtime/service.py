"""The service without a network: what the REST and gRPC APIs call, and nothing else of ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tensorflow.core.protobuf import meta_graph_pb2

from serving.errors import DeadlineExceeded, InvalidRequest, ServiceError, Unavailable
from serving.monitoring.logs import event
from serving.monitoring.metrics import Metrics
from serving.retrieval.encoded_ids import EncodedIds
from serving.retrieval.requests import RetrieveRequest, RetrieveResponse
from serving.retrieval.retriever import Retriever
from serving.runtime.batch_queue import BatchThreads
from serving.runtime.batched_version import PREDICT, RETRIEVE, BatchedVersion
from serving.runtime.configuration import Configuration, ModelConfig
from serving.runtime.loaded_version import LoadedVersion
from serving.runtime.manager import ModelManager
from serving.runtime.signature import Signature
from serving.settings import ServeConfig
from serving.version.names import VersionStatus
from serving.version.versions import VersionFiles

DEFAULT_SIGNATURE = "serving_default"
REQUEST_ID = "x-request-id"  # header of a request and of its answer

_SAFE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # nothing that could forge a line of a log
_LOGGED = ("model", "entrypoint", "request_id")
_DRAIN_STEP = 0.01  # seconds between two looks at what is still under way
_log = logging.getLogger(__name__)

Inputs = Mapping[str, np.ndarray]


class Call(NamedTuple):
    """All of a request but its content."""

    model: str = ""
    version: int | None = None  # at most one of version and label; without, the newest version
    label: str | None = None
    deadline: float = math.inf  # `time.monotonic()` seconds; that of the service may be earlier
    entrypoint: str = ""  # "REST" or "GRPC"; it and the id appear in metrics and logs
    request_id: str = ""


class Prediction(NamedTuple):
    """The outputs of a signature, rows in the order of the inputs, and who gave them."""

    outputs: dict[str, np.ndarray]  # strings are object arrays of bytes
    version: int
    signature: Signature
    ids: Mapping[str, EncodedIds]  # of outputs that hold rows of candidates, in place of strings

    @property
    def num_written(self) -> int:
        """Values that are written one by one in an answer."""
        return sum(array.size for name, array in self.outputs.items() if name not in self.ids)


class Service:
    """Serves model versions; its methods are for the event loop unless they say otherwise.

    All refusals are `serving.errors.ServiceError`; another exception is a fault of ours.
    A cancelled call leaves the queue, its batch runs without it.
    """

    others_ready: Callable[[], bool] = staticmethod(lambda: True)

    def __init__(self, config: ServeConfig) -> None:
        """Reads the configuration (or raises ValueError); nothing is loaded before `start`."""
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
        self.metrics.queue_depth = lambda: self._threads.waiting_rows
        self.metrics.watched.statuses = lambda: {
            name: list(model.statuses.values()) for name, model in self._served.models.items()
        }
        self.metrics.watched.ready = lambda: self.ready

    def start(self) -> None:
        """Starts to load versions and run batches."""
        self._threads.start()
        self._manager.start()

    @property
    def ready(self) -> bool:
        """Whether every configured model has a version to answer, and the service stays.

        Of workers, each has to have one the first time; a dead one does not hold up the others.
        """
        return not self._leaving and self.loaded and self.others_ready()

    @property
    def loaded(self) -> bool:
        """Whether every configured model has a version to answer in this process."""
        return self._manager.ready

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
        call: Call,
        inputs: Inputs | Callable[[Signature], Awaitable[Inputs]],
        *,
        signature: str = DEFAULT_SIGNATURE,
        encode: Callable[[Prediction, float], Awaitable[Any]] | None = None,
    ) -> Any:
        """Runs a signature of a version, in one batch with what others ask of it.

        `inputs` are an array for each input of the signature, or a function that makes them once
        version and signature are known (a JSON request has no dtypes). Strings are object arrays of
        bytes. Returns a `Prediction`, or what `encode` makes of it before the deadline.

        Raises:
          InvalidRequest: the inputs do not fit the signature, or there is no such label; the
            message names what does, and those there are.
          NotFound: no such model or version; the message names those there are.
          FailedPrecondition: no such signature; the message names those there are.
          Overloaded, DeadlineExceeded, Unavailable: see `serving.errors`.
        """
        async with self._accounted(call, PREDICT) as (pinned, deadline):
            described = pinned.loaded.signature(signature)
            if callable(inputs):
                with self.metrics.timed("decode", call.model, PREDICT):
                    inputs = await inputs(described)
            outputs = await pinned.predict(signature, inputs, deadline, self._under_way == 1)
            loaded = pinned.loaded
            prediction = Prediction(outputs, loaded.number, described, loaded.ids(signature))
            if not encode:
                return prediction
            with self.metrics.timed("encode", call.model, PREDICT):
                return await encode(prediction, deadline)

    async def retrieve(
        self,
        call: Call,
        request: RetrieveRequest,
        *,
        encode: Callable[[RetrieveResponse, float], Awaitable[Any]] | None = None,
    ) -> Any:
        """The best candidates of each query, a `RetrieveResponse`; otherwise as `predict`."""
        async with self._accounted(call, RETRIEVE) as (pinned, deadline):
            response = await pinned.retrieve(request, deadline, self._under_way == 1)
            if not encode:
                return response
            with self.metrics.timed("encode", call.model, RETRIEVE):
                return await encode(response, deadline)

    def metadata(self, call: Call) -> tuple[int, dict[str, meta_graph_pb2.SignatureDef]]:
        """The version that answers, and its signatures by name; refusals as in `predict`."""
        with self._pinned(call) as pinned:
            signatures = pinned.loaded.signatures
            return pinned.loaded.number, {name: signatures[name].proto for name in signatures}

    def status(self, call: Call) -> list[VersionStatus]:
        """State of every version of a model that was looked at, newest first, or of one."""
        return self._served.status(call.model, call.version, call.label)

    @contextlib.contextmanager
    def retriever(self, call: Call) -> Iterator[Retriever]:
        """The retriever of a version; InvalidRequest: another framework made it; as `predict`."""
        with self._pinned(call) as pinned:
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

    @contextlib.contextmanager
    def counted(self, call: Call, api: str) -> Iterator[None]:
        """Counts and logs what is refused inside, for what is not counted as a request."""
        try:
            yield
        except ServiceError as error:
            self._count(error, call, api)
            raise

    @contextlib.asynccontextmanager
    async def _accounted(self, call: Call, api: str) -> AsyncIterator[tuple[BatchedVersion, float]]:
        """Around a request: version, deadline, metrics, and a line in the log if it is refused."""
        start = time.monotonic()
        deadline = min(start + self.config.deadline_ms / 1000.0, call.deadline)
        self._under_way += 1
        try:
            if self._draining:
                raise Unavailable("The service is shutting down.")
            async with asyncio.timeout(deadline - start):
                with self._pinned(call) as pinned:
                    yield pinned, deadline
        except asyncio.CancelledError:
            self.metrics.cancelled(self._known(call.model), api)
            raise
        except Exception as error:
            refusal = _refusal(error, call.request_id)
            self._count(refusal, call, api)
            try:  # an error that refers to itself would hold the request
                if refusal is error:
                    raise
                raise refusal from error
            finally:
                del refusal
        else:
            seconds = time.monotonic() - start
            self.metrics.answered(call.model, api, call.entrypoint, seconds)
            if self.config.log_requests:
                fields = {name: getattr(call, name) for name in _LOGGED}
                event(_log, logging.INFO, "answered", api=api, seconds=seconds, **fields)
        finally:
            self._under_way -= 1

    def _pinned(self, call: Call) -> contextlib.AbstractContextManager[BatchedVersion]:
        return self._served.pinned(call.model, call.version, call.label)

    def _count(self, error: ServiceError, call: Call, api: str) -> None:
        model = self._known(call.model)
        self.metrics.refused(error, call.entrypoint, model, api, call.request_id)

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


def _refusal(error: Exception, request_id: str) -> ServiceError:
    """The error that the client gets for what a request raised.

    A refusal stays as it is. A timeout becomes DEADLINE_EXCEEDED, text that is not Unicode
    INVALID_ARGUMENT. All else is a fault of ours, INTERNAL: the log has the stack trace and the
    request id, the client only learns that the service failed.
    """
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, TimeoutError):
        return DeadlineExceeded("There was no result before the deadline.")
    if isinstance(error, UnicodeEncodeError):  # JSON may hold half of a surrogate pair
        return InvalidRequest(f"Text must be Unicode: {error.reason}.")
    _log.exception("Request %s failed.", request_id)
    return ServiceError("The service failed; its log says why.")


def request_id(given: str | None) -> str:
    """The client's id where it is safe to repeat, otherwise a new one."""
    return given if given and _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
