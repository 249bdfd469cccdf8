"""Log lines as JSON objects, one a line, with fields that a machine can search."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any

_FIELDS = "fields"  # attribute of a log record


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


def install() -> None:
    """Writes all that is logged to standard output as JSON lines, in place of other handlers."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.getLogger().handlers = [handler]
