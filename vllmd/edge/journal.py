"""vllmd's own log: short fixed phrases with keys, for a console or as JSON lines on standard error."""

import logging
import sys
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

Log = structlog.typing.FilteringBoundLogger

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def configure(level: str = "info", form: str = "auto", stream: TextIO | None = None) -> Log:
    """Set up logging for the whole process and return vllmd's logger. `form` is "console", "json" or "auto": console."""
    stream = stream or sys.stderr
    if form == "json":
        last: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        last = [structlog.processors.format_exc_info, render]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso" if form == "json" else "%H:%M:%S", utc=form == "json"),
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, handlers=[Relay()], force=True)
    log: Log = structlog.get_logger()
    return log


def render(_: WrappedLogger, __: str, event: EventDict) -> str:
    """ "02:01:55 warning ocr: uses 0.4 GiB more than its 9.0 GiB": one line, the model first, other keys behind."""
    when, level, text = event.pop("timestamp", ""), event.pop("level", ""), str(event.pop("event", ""))
    who, kind = event.pop("model", None), event.pop("kind", None)
    exception = event.pop("exception", None)
    head = f"{when} " + (f"{level}: " if level in ("warning", "error", "critical") else "")
    body = f"{who}: {text}" if who else text
    if kind in (None, "state"):
        kind = None
    rest = "".join(f" {key}={value}" for key, value in event.items() if value is not None and key != "attempt")
    return head + body + rest + (f"\n{exception}" if exception else "")


class Relay(logging.Handler):
    """What libraries say through the standard logging module (aiohttp, asyncio), in our log."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        level = "error" if record.levelno >= logging.ERROR else "warning"
        getattr(log, level)(record.getMessage(), library=record.name, exc_info=record.exc_info or None)
