"""vllmd's own log: short fixed phrases with keys. In the journal with its fields, or on standard error for a console or
as JSON lines. What models print goes to the journal beside it, under the model's name."""

import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

from vllmd.edge.journald import SOCKET, Journald, available, is_there, priority

Log = structlog.typing.FilteringBoundLogger

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
IDENTIFIER = "vllmd"

_NO_FIELD = re.compile(r"[^A-Z0-9_]")


def configure(level: str = "info", form: str = "auto", stream: TextIO | None = None, socket: Path = SOCKET) -> Log:
    """Set up logging for the whole process and return vllmd's logger.

    `form` is "console", "json", "journal", or "auto": the journal where systemd connected standard error to it. Without
    a journal both are a console. A given `stream` is written to, unless `form` is "journal".
    """
    journal = find_journal(form, socket) if stream is None or form == "journal" else None
    printed = Printed(sys.stderr if stream is None else stream, as_json=form == "json")
    if journal is not None:
        processors: list[Any] = [structlog.processors.format_exc_info, as_fields]
    elif form == "json":
        stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
        processors = [stamp, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        processors = [stamp, structlog.processors.format_exc_info, render]
    structlog.configure(
        processors=[structlog.processors.add_log_level, *processors],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: _Entries(journal) if journal is not None else printed,
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, handlers=[Relay()], force=True)
    log: Log = structlog.get_logger()
    return log


def find_journal(form: str, socket: Path = SOCKET) -> Journald | None:
    """The journal that a log of this form goes to; None for a console and JSON, or when there is no journal."""
    there = available(os.environ, path=socket) if form == "auto" else form == "journal" and is_there(socket)
    return Journald(socket) if there else None


def render(_: WrappedLogger, __: str, event: EventDict) -> str:
    """ "02:01:55 warning ocr: uses 0.4 GiB more than its 9.0 GiB": one line, the model first, other keys behind."""
    when, level = event.pop("timestamp", ""), event.pop("level", "")
    return f"{when} " + (f"{level}: " if level in ("warning", "error", "critical") else "") + _words(event)


def as_fields(_: WrappedLogger, __: str, event: EventDict) -> dict[str, str | int]:
    """The entry for the journal: the words of the console as MESSAGE, each key as VLLMD_KEY."""
    level = event.pop("level", "")
    keys = {_NO_FIELD.sub("_", key.upper())[:58]: value for key, value in event.items() if value is not None}
    for own in ("EVENT", "EXCEPTION"):
        keys.pop(own, None)
    return {
        "MESSAGE": _words(event), "PRIORITY": priority(level), "SYSLOG_IDENTIFIER": IDENTIFIER,
        **{f"VLLMD_{key}": value if isinstance(value, int) else str(value) for key, value in keys.items()},
    }  # fmt: skip


def _words(event: EventDict) -> str:
    text, who, exception = str(event.pop("event", "")), event.pop("model", None), event.pop("exception", None)
    rest = "".join(f" {key}={value}" for key, value in event.items() if value is not None and key not in _SILENT)
    return (f"{who}: {text}" if who else text) + rest + (f"\n{exception}" if exception else "")


_SILENT = ("attempt", "kind")  # said by the words already, or of use to programs only


class Printed:
    """structlog's last station for a console: what cannot be written there (a pipe that nobody reads any more, a full disk)
    is dropped and counted, since a log must not end what it is about. How much it was is said once writing works again."""

    def __init__(self, stream: TextIO | None, *, as_json: bool) -> None:
        self.lost = 0
        self._stream = stream
        self._as_json = as_json

    def msg(self, text: str) -> None:
        told = self._told()
        try:
            self._write(f"{told}{text}\n")
            self.lost = 0
        except (OSError, ValueError):  # ValueError: the stream is closed
            self.lost += 1

    log = debug = info = warn = warning = error = exception = critical = fatal = failure = err = msg

    def _told(self) -> str:
        if not self.lost:
            return ""
        said = f"{self.lost} lines of this log could not be written"
        return (json.dumps({"event": said, "level": "warning"}) if self._as_json else f"warning: {said}") + "\n"

    def _write(self, text: str) -> None:
        if self._stream is None:  # started without one
            return
        try:
            fd = self._stream.fileno()
        except (OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()
            return
        # Not through the stream: what it cannot write it keeps, and fails with it once more at the end of the program.
        data = text.encode(errors="replace")
        while data:
            data = data[os.write(fd, data) :]


class _Entries:
    """structlog's last station: a method per level, each taking an entry's fields."""

    def __init__(self, journal: Journald) -> None:
        self._journal = journal

    def msg(self, **fields: str | int) -> None:
        self._journal.send(fields)

    log = debug = info = warn = warning = error = exception = critical = fatal = failure = err = msg


class Lines:
    """What models print, in the journal: `journalctl -t vllmd/NAME`, or VLLMD_MODEL=NAME together with our events."""

    def __init__(self, journal: Journald) -> None:
        self.journal = journal

    def send(self, text: str, *, model: str, attempt: int, phase: str | None, priority: int) -> bool:
        """One line; a blank one is passed over, as journald itself does. False when it was lost (`journal.lost`)."""
        if not text.strip():
            return True
        fields: dict[str, str | int] = {
            "MESSAGE": text, "PRIORITY": priority, "SYSLOG_IDENTIFIER": f"{IDENTIFIER}/{model}",
            "VLLMD_MODEL": model, "VLLMD_ATTEMPT": attempt,
        }  # fmt: skip
        return self.journal.send(fields | ({"VLLMD_PHASE": str(phase)} if phase else {}))


class Relay(logging.Handler):
    """What libraries say through the standard logging module (aiohttp, asyncio), in our log."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        level = "error" if record.levelno >= logging.ERROR else "warning"
        getattr(log, level)(record.getMessage(), library=record.name, exc_info=record.exc_info or None)
