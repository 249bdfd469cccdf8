"""What the OpenAPI description says of the routes, which read their bodies themselves."""

from __future__ import annotations

from typing import Any

from serving.rest.messages import ErrorAnswer, RetrieveAnswer
from serving.retrieval.requests import RetrieveRequest
from serving.version.names import MAX_VERSION

DESCRIPTION = (
    "Top-k retrieval. `:predict`, status and metadata are TensorFlow Serving's REST API; "
    "`:retrieve` is the richer one. A client may send X-Request-Id and X-Timeout-Ms; every answer "
    "has X-Request-Id and Server-Timing."
)

_NAME = {"type": "string", "pattern": "^[^/:]{1,200}$"}
_PARAMETERS = {
    "model": {**_NAME, "description": "Name of the model."},
    "version": {"type": "integer", "minimum": 0, "maximum": MAX_VERSION},
    "label": {**_NAME, "description": "Name of a version, set by a reload of the configuration."},
}
_VALUES = {"description": "A value or nested lists; binary is an object with the key b64."}
_PREDICT_BODY = {
    "type": "object",
    "properties": {
        "signature_name": {"type": "string", "default": "serving_default"},
        "instances": {
            "type": "array",
            "minItems": 1,
            "description": "Rows: values of the only input, or objects by name of input.",
            "example": [{"query_id": "user 1"}],
        },
        "inputs": {**_VALUES, "description": "Columns: of the only input, or by name of input."},
    },
    "oneOf": [{"required": ["instances"]}, {"required": ["inputs"]}],
}
_PREDICT_ANSWER = {
    "type": "object",
    "properties": {"predictions": {"type": "array"}, "outputs": _VALUES},
}
_REFUSALS = {
    400: "The request is not valid; the message says what is.",
    401: "The token is missing or wrong.",
    404: "There is no such model, version or query.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is compressed other than by gzip.",
    429: "There is not enough memory for the request.",
    503: "The queue is full, no version is loaded, or the service is shutting down.",
    504: "The deadline passed.",
}
_ON_READING = (400, 401, 404)


def _object(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


_JSON = _object({"type": "object"})
_TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}}
_HTML = {"content": {"text/html": {"schema": {"type": "string"}}}}


def _route(
    tag: str, summary: str, *refusals: int, answer: dict[str, Any] = _JSON, **extra: Any
) -> dict[str, Any]:
    errors = {code: {"model": ErrorAnswer, "description": _REFUSALS[code]} for code in refusals}
    return {
        "tags": [tag],
        "summary": summary,
        "responses": {200: {"description": "The answer.", **answer}, **errors},
        "openapi_extra": extra,
        "response_model": None,
    }


_SERVING, _RETRIEVAL, _OPERATION = "TensorFlow Serving", "Retrieval", "Operation"
_NUMBER = {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}
_LIMIT = {"name": "limit", "in": "query", "required": False, "schema": _NUMBER}
_QUERY = {"name": "query_id", "in": "query", "required": True, "schema": {"type": "string"}}

MODELS = _route(_OPERATION, "Names of the models", 401)
STATUS = _route(_SERVING, "State of all versions of a model, or of one", *_ON_READING)
METADATA = _route(_SERVING, "Signatures of the version that answers", *_ON_READING, 503)
PREDICT = _route(
    _SERVING,
    "Run a signature",
    *_REFUSALS,
    requestBody={**_object(_PREDICT_BODY), "required": True},
    answer=_object(_PREDICT_ANSWER),
)
RETRIEVE = _route(
    _RETRIEVAL,
    "The best candidates of each query, filtered",
    *_REFUSALS,
    requestBody={**_object(RetrieveRequest.model_json_schema()), "required": True},
    answer={"model": RetrieveAnswer},
)
ALIVE = _route(_OPERATION, "200 unless a restart is called for", 503, answer=_TEXT)
READY = _route(_OPERATION, "200 once every model can answer", 503, answer=_TEXT)
METRICS = _route(_OPERATION, "Metrics for Prometheus", 401, answer=_TEXT)
PAGE = _route(_OPERATION, "A page for people", answer=_HTML)
_KNOWS = "Queries that have a history, and what the model is"
SAMPLES = _route(_RETRIEVAL, _KNOWS, *_ON_READING, 503, parameters=[_LIMIT])
HISTORY = _route(
    _RETRIEVAL, "What a query had in training", *_ON_READING, 503, parameters=[_QUERY, _LIMIT]
)


def operation(path: str, route: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `FastAPI.add_api_route` that describe a route at a path."""
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": schema}
        for name, schema in _PARAMETERS.items()
        if f"{{{name}:" in path
    ]
    extra = route["openapi_extra"]
    parameters = in_path + extra.get("parameters", [])
    return {**route, "openapi_extra": {**extra, "parameters": parameters}}
