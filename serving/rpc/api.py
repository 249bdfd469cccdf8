"""TensorFlow Serving's gRPC API: `PredictionService`, `ModelService` and `grpc.health.v1`.

Reference: the .proto files of the package tensorflow-serving-api. Message sizes are limited by
`max_body_mb`; a client's deadline and its cancellation reach the queue of the service.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2_grpc
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from serving.errors import InvalidRequest, Refused
from serving.rpc import codec
from serving.rpc.guard import Guard, Health
from serving.runtime.batched_version import PREDICT
from serving.runtime.configuration import from_proto
from serving.runtime.process import BYTES_A_VALUE, aside
from serving.runtime.service import DEFAULT_SIGNATURE, Call, Inputs, Prediction, Service
from serving.runtime.signature import Signature

_MAX_STREAMS = 100  # calls at the same time on one connection; more wait in the client
_RELOAD_SECONDS = 300.0  # for a reload whose client sets no deadline


def build(service: Service) -> grpc.aio.Server:
    """A server with all the services; it has no port yet and is not started."""
    options = [
        # Only workers share a port; otherwise clients of two services would get either.
        ("grpc.so_reuseport", int(service.config.workers > 1)),
        ("grpc.max_receive_message_length", service.config.max_body_mb << 20),
        ("grpc.max_send_message_length", -1),
        ("grpc.per_message_decompression", 0),  # `Guard` does it, with a limit
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        ("grpc.max_metadata_size", 16 << 10),
    ]
    server = grpc.aio.server(interceptors=[Guard(service)], options=options)
    api = _GrpcApi(service)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(api, server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(api, server)
    health_pb2_grpc.add_HealthServicer_to_server(Health(service), server)
    return server


def _unimplemented(method: str) -> Callable[..., Awaitable[None]]:

    async def refuse(self: object, request: object, call: Call) -> None:
        text = "is not implemented: a retrieval model has no such signature, call Predict."
        raise Refused(501, f"{method} {text}", "UNIMPLEMENTED")

    return refuse


class _GrpcApi(
    prediction_service_pb2_grpc.PredictionServiceServicer,
    model_service_pb2_grpc.ModelServiceServicer,
):
    """`PredictionService`, but for the methods on tf.Example, and `ModelService`.

    `Guard` calls the methods; it has a `Call` for them in place of a context.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        # A reload ends those that wait: there is always a thread for the next one.
        self._reloads = ThreadPoolExecutor(2, "reload")

    async def Predict(  # noqa: N802 - names of the .proto
        self, request: predict_pb2.PredictRequest, call: Call
    ) -> bytes:
        spec, wanted = request.model_spec, request.output_filter
        with self._service.counted(call, PREDICT):
            call = _of_model(call, spec)
        max_rows = self._service.config.max_rows

        async def decode(signature: Signature) -> Inputs:
            codec.check_output_filter(wanted, signature)
            size = request.ByteSize() // BYTES_A_VALUE
            return await aside(
                size, lambda: codec.decode_inputs(request.inputs, signature, max_rows)
            )

        async def encode(prediction: Prediction, _: float) -> bytes:
            write = functools.partial(codec.encode_prediction, spec.name, prediction, wanted)
            return await aside(prediction.num_written, write)

        name = spec.signature_name or DEFAULT_SIGNATURE
        return await self._service.predict(call, decode, signature=name, encode=encode)

    async def GetModelMetadata(  # noqa: N802
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, call: Call
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        spec = request.model_spec
        with self._service.counted(call._replace(model=spec.name), "GetModelMetadata"):
            if set(request.metadata_field) != {codec.SIGNATURE_DEF}:
                raise InvalidRequest(
                    f"metadata_field must be {codec.SIGNATURE_DEF!r}, "
                    f"got {str(list(request.metadata_field))[:80]}."
                )
            version, signatures = self._service.metadata(_of_model(call, spec))
        return codec.encode_metadata(spec.name, version, signatures)

    Classify = _unimplemented("Classify")
    Regress = _unimplemented("Regress")
    MultiInference = _unimplemented("MultiInference")

    async def GetModelStatus(  # noqa: N802
        self, request: get_model_status_pb2.GetModelStatusRequest, call: Call
    ) -> get_model_status_pb2.GetModelStatusResponse:
        spec = request.model_spec
        with self._service.counted(call._replace(model=spec.name), "GetModelStatus"):
            return codec.encode_status(self._service.status(_of_model(call, spec)))

    async def HandleReloadConfigRequest(  # noqa: N802
        self, request: model_management_pb2.ReloadConfigRequest, call: Call
    ) -> model_management_pb2.ReloadConfigResponse:
        seconds = call.deadline - time.monotonic()
        seconds = _RELOAD_SECONDS if math.isinf(seconds) else max(0.0, seconds)
        with self._service.counted(call, "ReloadConfig"):
            configs = from_proto(request.config)
            work = functools.partial(self._service.reload, configs, seconds)
            await asyncio.get_running_loop().run_in_executor(self._reloads, work)
        return model_management_pb2.ReloadConfigResponse()  # its status says OK


def _of_model(call: Call, spec: model_pb2.ModelSpec) -> Call:
    """A call with the model and the version or label that its message names."""
    if not spec.name:
        raise InvalidRequest("model_spec must name a model, got none.")
    choice = spec.WhichOneof("version_choice")
    version = spec.version.value if choice == "version" else None
    label = spec.version_label if choice == "version_label" else None
    return call._replace(model=spec.name, version=version, label=label)
