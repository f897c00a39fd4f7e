"""Looking back into a log: its last lines, or those since a time. Read from the end, so that size does not matter."""

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from vllmd.edge.logtext import split

BLOCK = 64 << 10  # bytes read at once
MOST = 4 << 20  # bytes looked at in all

_STAMP = re.compile(r"(?:(\d{4})-)?(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)")


def tail(path: Path, count: int) -> list[str]:
    """The last `count` lines, of at most MOST bytes; empty when it cannot be read."""
    pieces: list[bytes] = []
    found = 0
    for piece in _backwards(path):
        pieces.insert(0, piece)
        found += piece.count(b"\n")
        if found > count:
            break
    lines = split(b"".join(pieces))
    return lines[-count:] if count > 0 else []


def head(path: Path, size: int) -> list[str]:
    """The lines of the first `size` bytes; empty when it cannot be read."""
    try:
        with path.open("rb") as file:
            return split(file.read(size))
    except OSError:
        return []


def since(path: Path, when: float) -> list[str]:
    """The lines from `when` (seconds since the epoch) on, of at most MOST bytes. A line without a time belongs to the
    one before. vLLM writes local time without a year: the file's own tells it."""
    try:
        written = datetime.fromtimestamp(path.stat().st_mtime)
    except OSError:
        return []
    lines = split(b"".join(reversed(list(_backwards(path)))))
    wanted = datetime.fromtimestamp(when).replace(microsecond=0)
    start = next((at for at, text in enumerate(lines) if (stamp := _time(text, written)) and stamp >= wanted), None)
    return [] if start is None else lines[start:]


def _backwards(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            at = size = file.seek(0, 2)
            while at > 0 and size - at < MOST:
                step = min(BLOCK, at)
                at -= step
                file.seek(at)
                yield file.read(step)
    except OSError:
        return


def _time(text: str, written: datetime) -> datetime | None:
    match = _STAMP.search(text[:200])
    if match is None:
        return None
    year, *rest = match.groups()
    month, day, hour, minute, second = map(int, rest)
    try:
        stamp = datetime(int(year or written.year), month, day, hour, minute, second)
        if not year and stamp > written + timedelta(days=1):  # written in December, looked at in January
            stamp = stamp.replace(year=written.year - 1)
    except ValueError:
        return None
    return stamp
