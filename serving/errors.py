"""What a service answers when it cannot answer: one exception for each kind of refusal."""

from __future__ import annotations

from collections.abc import Sequence

MAX_ID_LENGTH = 1 << 16


class ServiceError(Exception):
    """A request that gets no result; the message is for the client.

    Attributes:
      http: status code of the REST API.
      grpc: name of the status code of the gRPC API.
      reason: in the metrics, where the status does not say it.
    """

    http = 500
    grpc = "INTERNAL"
    reason = ""


class InvalidRequest(ServiceError, ValueError):  # noqa: N818 - names of answers, not of faults
    """The request itself is wrong; the same request fails again."""

    http, grpc = 400, "INVALID_ARGUMENT"


class NotFound(ServiceError):  # noqa: N818
    """There is no such model, version, signature or query."""

    http, grpc = 404, "NOT_FOUND"


class FailedPrecondition(ServiceError):  # noqa: N818
    """The request is right, but not with what is served or how."""

    http, grpc = 400, "FAILED_PRECONDITION"


class Aborted(ServiceError):  # noqa: N818
    """A later request of another client took its place."""

    http, grpc = 409, "ABORTED"


class Overloaded(ServiceError):  # noqa: N818
    """The queue is full; the client may try again later."""

    http, grpc, reason = 503, "UNAVAILABLE", "overloaded"


class OutOfMemory(ServiceError):  # noqa: N818
    """There was not enough memory for the request."""

    http, grpc = 429, "RESOURCE_EXHAUSTED"


class DeadlineExceeded(ServiceError):  # noqa: N818
    """The client's deadline, or the service's own, passed before there was a result."""

    http, grpc = 504, "DEADLINE_EXCEEDED"


class Unavailable(ServiceError):  # noqa: N818
    """No version is loaded yet, or the service is shutting down."""

    http, grpc = 503, "UNAVAILABLE"


class Refused(ServiceError):  # noqa: N818
    """A request that an API refuses before it means anything to the service."""

    def __init__(self, http: int, message: str, grpc: str = "INVALID_ARGUMENT") -> None:
        super().__init__(message)
        self.http, self.grpc = http, grpc


def check_ids(ids: Sequence[str | bytes]) -> None:
    """Raises InvalidRequest where one is longer than any id of an interaction log."""
    if max(map(len, ids), default=0) > MAX_ID_LENGTH:
        raise InvalidRequest(f"An id may be at most {MAX_ID_LENGTH} long.")


def check_rows(rows: int, max_rows: int) -> None:
    """Raises InvalidRequest where a request has too many rows to wait together."""
    if rows > max_rows:
        raise InvalidRequest(f"A request may have at most {max_rows} rows, got {rows}: split it.")
