"""A model's log for a reader: its last lines at first, then what comes, also across rotation and a new start."""

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllmd.edge.logfile import READ, failed_log, older
from vllmd.edge.logread import MOST, Start, find_start
from vllmd.edge.logtext import Line, Splitter
from vllmd.edge.tasks import in_thread

PATIENCE = 10.0  # seconds that the disk may take
WAITS = 2  # looks that a log which was cut short may take to show where it went


class Parts:
    """A log and what has been moved away from it, read as one: NAME.log.1 changes with each rotation and each new start, so
    it tells what was missed. Descriptors are kept, so that what is being read cannot be rotated away."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when it cannot be opened."""
        self.path = path
        self.begun = False  # the last read was the first of a new start
        self._first = _inode(older(path, 1))  # before the log is opened: a part too many is better than one too few
        self._files: deque[tuple[int, bool]] = deque([(_open(path), False)])  # and whether a start ends with its end
        self._at = 0  # in the first of them
        self._waited = 0

    @property
    def fd(self) -> int:
        """Of the file that is being read."""
        return self._files[0][0]

    def begin(self, at: int) -> None:
        """Go on at this offset."""
        self._at = at

    def read(self, most: int) -> bytes:
        """What comes next; b"" when there is nothing now. Raises OSError."""
        self._look()
        self.begun = False
        while not (data := os.pread(self.fd, most, self._at)) and len(self._files) > 1:
            fd, ends = self._files.popleft()
            os.close(fd)
            self.begun |= ends
            self._at = 0
        self._at += len(data)
        return data

    def close(self) -> None:
        """May be called twice."""
        while self._files:
            os.close(self._files.pop()[0])

    def _look(self) -> None:
        """Whether the log has begun anew, and what lies between."""
        first = _inode(older(self.path, 1))
        if first != self._first:
            self._waited = 0
            self._take_over(first)
        elif len(self._files) == 1 and os.fstat(self.fd).st_size < self._at:
            # Its content is being moved to NAME.log.1; or nothing is kept.
            self._waited += 1
            if self._waited > WAITS:
                self._at = self._waited = 0

    def _take_over(self, first: int) -> None:
        """The parts that are new, oldest first; the oldest is what was the log, moved or copied there."""
        numbers = [0]
        while _inode(older(self.path, numbers[-1] + 1)) not in (0, self._first):
            numbers.append(numbers[-1] + 1)
        self._first = first
        fds = [fd for number in reversed(numbers) if (fd := _try(older(self.path, number))) is not None]
        if not fds:
            return
        was, _ = self._files.pop()
        moved = len(fds) > 1 and os.path.sameopenfile(was, fds[0])  # a new start has taken its name
        os.close(was)
        self._files.extend((fd, moved and at == 0) for at, fd in enumerate(fds))


class LogView:
    """The LogReader of the API. None of the lines is lost or comes twice, unless the log is cut without being kept."""

    def __init__(
        self,
        path: Path,
        *,
        lines: int,
        since: float | None,
        follow: bool,
        slots: asyncio.Semaphore,
        most: int = MOST,
        conceal: Callable[[str], str] = str,
    ) -> None:
        """`since`: seconds ago. At most `most` bytes of what is there already are shown, and `slots` bounds how many look
        for them at once. `conceal` takes out what nobody must see. Without `follow` it ends where the log does now."""
        self._path = path
        self._lines, self._since, self._most = lines, since, most
        self._follow = follow
        self._slots = slots
        self._conceal = conceal
        self._parts: Parts | None = None
        self._splitter = Splitter()
        self._left = -1  # bytes of what was there at the beginning; -1: not looked yet
        self._got = 0  # bytes of the last piece
        self._note = ""

    async def read(self) -> Sequence[Mapping[str, Any]]:
        """The next lines."""
        if self._left < 0:
            async with self._slots:
                self._left = await in_thread(self._begin, PATIENCE, 0)
            if self._note:
                return [{"text": self._note}]
        while self._left > 0:
            async with self._slots:
                piece = await in_thread(self._piece, PATIENCE, None)
            if piece is None:  # the disk hangs
                self._left = 0
            elif piece:
                return self._rows(piece)
        if not self._follow or self._parts is None:
            return self._rows(self._splitter.end())
        try:
            while not (lines := self._next(READ)) and self._got:
                pass  # a piece in which no line ends
        except OSError:
            return []
        return self._rows(lines)

    def close(self) -> None:
        """Let go of the file."""
        if self._parts is not None:
            self._parts.close()
            self._parts = None

    def _begin(self) -> int:
        """Find where to begin; how many bytes there are from there."""
        parts = Parts(self._path)
        when = None if self._since is None else time.time() - self._since
        try:
            start: Start = find_start(parts.fd, count=self._lines, since=when, most=self._most)
        except OSError:
            parts.close()
            raise
        parts.begin(start.at)
        self._parts = parts
        if start.left_out:
            self._note = f"[{start.left_out} bytes before this are left out: at most {self._most} are shown]"
        return start.end - start.at

    def _piece(self) -> list[Line]:
        before, self._left = self._left, 0
        lines = self._next(min(READ, before))
        self._left = before - self._got if self._got else 0
        return lines

    def _next(self, most: int) -> list[Line]:
        assert self._parts is not None
        data = self._parts.read(most)
        self._got = len(data)
        last = self._splitter.end() if self._parts.begun else []
        return last + self._splitter.feed(data)

    def _rows(self, lines: Sequence[Line]) -> Sequence[Mapping[str, Any]]:
        return [{"text": self._conceal(line.text), "progress": line.progress} for line in lines]


def find_log(directory: Path, name: str, *, failed: bool, previous: bool) -> Path | None:
    """The file of this, the last failed or the previous start; None when there is none."""
    path = directory / f"{name}.log"
    path = failed_log(path) if failed else older(path, 1) if previous else path
    return path if path.is_file() else None


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)


def _try(path: Path) -> int | None:
    try:
        return _open(path)
    except OSError:
        return None


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0
