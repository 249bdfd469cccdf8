"""What is known of a request beside its content, the same for REST and gRPC."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator
from typing import NamedTuple

from serving.errors import ServiceError
from serving.runtime.service import Service

REQUEST_ID = "x-request-id"  # header of a request and of its answer

_SAFE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # nothing that could forge a line of a log


class Call(NamedTuple):
    """Arguments that every method of the service takes."""

    entrypoint: str  # "REST" or "GRPC"
    deadline: float | None  # time.monotonic() seconds, None where the client set none
    request_id: str


def request_id(given: str | None) -> str:
    """The client's id where it is safe to repeat, otherwise a new one."""
    return given if given and _SAFE_ID.fullmatch(given) else uuid.uuid4().hex


def whole_number(text: str, most: int) -> int | None:
    """What the digits say where it is at most `most`; None for anything else.

    >>> whole_number("0042", 100), whole_number("9" * 5000, 100), whole_number("-1", 100)
    (42, None, None)
    """
    digits = text.lstrip("0") or text[:1]
    if not (text.isascii() and text.isdecimal()) or len(digits) > len(str(most)):
        return None  # Python refuses to read thousands of digits
    return number if (number := int(digits)) <= most else None


@contextlib.contextmanager
def counted(service: Service, call: Call, api: str, model: str = "") -> Iterator[None]:
    """Counts and logs what is refused inside, for what the service does not count itself."""
    try:
        yield
    except ServiceError as error:
        known = model if model in service.models else ""  # clients must not make up labels
        service.metrics.refused(error, call.entrypoint, known, api, call.request_id)
        raise
