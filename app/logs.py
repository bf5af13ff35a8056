"""Logs as JSON lines. They hold numbers, names and ids: never a text, never a header's value."""

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

request_log = logging.getLogger("app.request")


class JsonFormatter(logging.Formatter):
    """One record, one line of ASCII JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = describe_exception(record.exc_info[1])
        return json.dumps(line, default=str)


def describe_exception(exc: BaseException) -> dict[str, Any]:
    """Type and frames. The message stays out, as it may quote what a client sent."""
    frames = traceback.extract_tb(exc.__traceback__)
    return {
        "type": type(exc).__name__,
        "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }


def configure_logs(level: str) -> None:
    """Send all logs, uvicorn's too, to standard error as JSON lines."""
    # No line says who wrote it, so nobody needs to find out.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001 (as the manual of logging has it)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
