"""Looking back into a log: its last lines, its first ones, or where to begin to read. From the end, so that size does not
matter. All of it may block: not on the loop."""

import os
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from vllmd.edge.logfile import older
from vllmd.edge.logtext import split

BLOCK = 64 << 10  # bytes read at once
MOST = 4 << 20  # bytes looked at in all

_STAMP = re.compile(rb"(?:(\d{4})-)?(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)")


class Start(NamedTuple):
    """Where to begin in an open file, where it ends now, and how many bytes before `at` were asked for as well, but are
    too much."""

    at: int = 0
    end: int = 0
    left_out: int = 0


def tail(path: Path, count: int, *, parts: int = 0, most: int = MOST) -> list[str]:
    """The last `count` lines of a log and the `parts` that were rotated away from it, of at most `most` bytes; empty when
    it cannot be read."""
    pieces: list[bytes] = []
    found = size = 0
    for number in range(parts + 1):
        for piece in _backwards(older(path, number), most - size):
            pieces.append(piece)
            size += len(piece)
            found += piece.count(b"\n")
            if found > count:
                break
        if found > count or size >= most:
            break
    lines = split(b"".join(reversed(pieces)))
    return lines[-count:] if count > 0 else []


def head(path: Path, size: int) -> list[str]:
    """The lines of the first `size` bytes; empty when it cannot be read."""
    try:
        with path.open("rb") as file:
            return split(file.read(size))
    except OSError:
        return []


def find_start(fd: int, *, count: int, since: float | None = None, most: int = MOST) -> Start:
    """Where the last `count` lines begin, none of them from before `since` (seconds since the epoch), at most `most` bytes
    before the end. A line without a time belongs to the one before. vLLM writes local time without a year: the file's own
    tells it. Raises OSError."""
    found = os.fstat(fd)
    end = found.st_size
    at = _of_last(fd, end, count)
    if since is not None:
        at = max(at, _of_time(fd, max(0, end - MOST), end, since, found.st_mtime))
    lowest = end - most
    if at >= lowest:
        return Start(at, end)
    behind = os.pread(fd, BLOCK, lowest - 1).find(b"\n")  # begin with a whole line
    begin = lowest + max(0, behind)
    return Start(begin, end, begin - at)


def _of_last(fd: int, end: int, count: int) -> int:
    """Where the last `count` lines begin, or MOST bytes before the end."""
    if count <= 0:
        return end
    at = end
    # The last line counts whether it has ended or not.
    left = count + (end > 0 and os.pread(fd, 1, end - 1) == b"\n")
    while at > 0 and end - at < MOST:
        step = min(BLOCK, at)
        block = os.pread(fd, step, at - step)
        seen = block.count(b"\n")
        if seen >= left:
            for _ in range(left):
                block = block[: block.rfind(b"\n")]
            return at - step + len(block) + 1
        left -= seen
        at -= step
    return at


def _of_time(fd: int, begin: int, end: int, since: float, written: float) -> int:
    """Where the lines from a time on begin; `end` when there are none."""
    try:
        wanted = datetime.fromtimestamp(max(0.0, since)).replace(microsecond=0)
        last = datetime.fromtimestamp(written)
    except (ValueError, OverflowError, OSError):  # a time that no calendar knows
        return end
    at, rest = begin, b""
    while block := os.pread(fd, max(0, min(BLOCK, end - at)), at):
        start = at - len(rest)
        at += len(block)
        *lines, rest = (rest + block).split(b"\n")
        for line in [*lines, rest] if at >= end else lines:
            if (stamp := _time(line[:200], last)) is not None and stamp >= wanted:
                return start
            start += len(line) + 1
    return end


def _backwards(path: Path, most: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            at = size = file.seek(0, 2)
            while at > 0 and size - at < most:
                step = min(BLOCK, at)
                at -= step
                file.seek(at)
                yield file.read(step)
    except OSError:
        return


def _time(text: bytes, written: datetime) -> datetime | None:
    match = _STAMP.search(text)
    if match is None:
        return None
    year, *rest = match.groups()
    month, day, hour, minute, second = map(int, rest)
    try:
        stamp = datetime(int(year or written.year), month, day, hour, minute, second)
        if not year and stamp > written + timedelta(days=1):  # written in December, looked at in January
            stamp = stamp.replace(year=written.year - 1)
    except (ValueError, OverflowError):
        return None
    return stamp
