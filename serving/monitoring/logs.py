"""Log lines as JSON objects, one a line, with fields that a machine can search."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import logging.handlers
import queue
import sys
from collections.abc import Iterator
from typing import Any

REQUESTS = "serving.requests"  # the logger of what is refused

_FIELDS = "fields"  # attribute of a log record
_MOST_A_SECOND = 100  # lines of REQUESTS
_STOPPING_SECONDS = 1.0
_MOST_WAITING = 10_000  # lines, where nobody reads them; more are lost


def event(log: logging.Logger, level: int, message: str, **fields: Any) -> None:
    """Logs a message with fields such as `request_id`; empty ones are left out."""
    if log.isEnabledFor(level):
        kept = {name: value for name, value in fields.items() if value not in ("", None)}
        log.log(level, message, extra={_FIELDS: kept})


class JsonFormatter(logging.Formatter):
    """Time (UTC), level, logger and message, and whatever fields `event` was given."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        content = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)


class _Queued(logging.handlers.QueueHandler):
    """Leaves formatting and writing to a thread; nobody waits for a reader who is slow."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


class Writing(logging.handlers.QueueListener):
    """The thread that writes; `stop` it to have the last lines."""

    def enqueue_sentinel(self) -> None:
        """Tells it to end; where nobody reads, after some of the lines that wait."""
        waiting = self.queue
        assert isinstance(waiting, queue.Queue)
        with contextlib.suppress(queue.Full):
            return waiting.put(None, timeout=_STOPPING_SECONDS)
        with waiting.mutex:
            waiting.queue.clear()
            waiting.queue.append(None)


class Sampled(logging.Filter):
    """Lets a number of lines a second pass; the first of the next second says how many it did not.

    Who refuses thousands of requests a second must not be held up by telling each of them.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._second, self._count = 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        if int(record.created) != self._second:
            left_out = max(0, self._count - self._most)
            self._second, self._count = int(record.created), 0
            if left_out:
                setattr(record, _FIELDS, {**getattr(record, _FIELDS, {}), "left_out": left_out})
        self._count += 1
        return self._count <= self._most


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Writes all that is logged to standard output as JSON lines, in place of other handlers.

    A thread writes; the last lines are there at the end, and the handlers are as they were.
    """
    root, requests = logging.getLogger(), logging.getLogger(REQUESTS)
    before, sampled = root.handlers, Sampled(_MOST_A_SECOND)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    queued = _Queued(queue.Queue(_MOST_WAITING))
    root.handlers = [queued]
    requests.addFilter(sampled)
    writing = Writing(queued.queue, handler)
    writing.start()
    try:
        yield
    finally:
        writing.stop()
        root.handlers = before
        requests.removeFilter(sampled)
