"""A child's log: one file that it writes itself, so that it goes on without us; followed, kept small, kept on failure.

NAME.log is the running child's; NAME.log.1 ... are older parts, whether a start or its size began a new one;
NAME.failed.log is the last start that failed. Every call is bounded and none raises for a full disk or missing rights:
an engine must not fail because its log does. What went wrong is told in `trouble` or as the returned sentence.
"""

import errno
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from vllmd.edge.logtext import Line, Splitter

CHUNK = 1 << 20  # bytes read at once
HEAD = 256 << 10  # bytes kept of the beginning of a failed start: its flags and first errors
FAILED = 20 << 20  # bytes kept of a failed start in all


class Log(NamedTuple):
    """An opened log. `fd` is the caller's to close; /dev/null when `trouble` says why there can be no file."""

    fd: int
    path: Path
    trouble: str = ""


def open_log(directory: Path, name: str, keep: int) -> Log:
    """A new, empty NAME.log for appending, mode 0640; older ones move up, `keep` of them stay."""
    path = directory / f"{name}.log"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _shift(path, keep)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        os.fchmod(fd, 0o640)
        return Log(fd, path)
    except OSError as error:
        trouble = f"cannot write {path}: {error.strerror} (the engine runs without a log)"
        return Log(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), path, trouble)


class Follower:
    """Reads what a child adds to its log. `trouble` is why nothing can be read or kept just now, or ""."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""
        self.more = False  # the last read stopped at CHUNK: there is more at once
        self.inode = 0
        self.line_start = 0  # offset behind the last line that ended: whoever begins there misses nothing
        self._fd = -1
        self._at = 0
        self._lines = Splitter()

    def begin(self, at: int, inode: int) -> int:
        """Begin at `at`, if the file is still the one with this inode and that long; else at its start. Returns where."""
        try:
            self._open()
            if self.inode == inode and os.fstat(self._fd).st_size >= at:
                self._at = self.line_start = at
        except OSError:
            return 0
        return self._at

    def read_new(self) -> list[Line]:
        """The lines added since the last call, of at most CHUNK bytes. Follows a new file of that name, and one that
        was cut short."""
        try:
            if self._fd < 0:
                self._open()
            if os.fstat(self._fd).st_size < self._at:
                self._at = self.line_start = 0
            data = os.pread(self._fd, CHUNK, self._at)
            if not data and self.path.stat().st_ino != self.inode:  # a new start took the name
                self.close()
                return self.read_new()
        except FileNotFoundError:
            return []
        except OSError as error:
            self.trouble = f"cannot read {self.path}: {error.strerror}"
            return []
        self.trouble = ""
        if (end := data.rfind(b"\n")) >= 0:
            self.line_start = self._at + end + 1
        self._at += len(data)
        self.more = len(data) == CHUNK
        return self._lines.feed(data)

    def skip(self) -> None:
        """Begin at the present end; nothing there yet is fine."""
        try:
            self._open()
            self._at = self.line_start = os.fstat(self._fd).st_size
        except OSError:
            return

    def rotate(self, size: int, keep: int) -> list[Line]:
        """Move what is there to NAME.log.1 if it is larger than `size` bytes; returns lines not yet read.

        The child keeps its descriptor, so the file is copied and cut. What it writes between the last look at the size
        and the cut, some microseconds, is lost. Without room for the copy the oldest copies go, and then the content:
        a log never fills a disk.
        """
        try:
            if self.path.stat().st_size <= size:
                return []
            lines = self.read_new()
            while self.more:
                lines += self.read_new()
            trouble = _copy_out(self.path, keep)
            lines += self.read_new()
            os.truncate(self.path, 0)
        except OSError as error:
            self.trouble = f"cannot rotate {self.path}: {error.strerror}"
            return []
        self._at, self.line_start, self.trouble = 0, 0, trouble
        return lines

    def rest(self) -> list[Line]:
        """The last words: a line without an end. For when the child is gone."""
        return self._lines.end()

    def close(self) -> None:
        """May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self.inode, self._at, self.line_start = os.fstat(self._fd).st_ino, 0, 0


def keep_failed(directory: Path, name: str) -> str:
    """Keep NAME.log as NAME.failed.log; at most FAILED bytes of it, beginning and end. The child must be gone.

    Returns what went wrong, or "".
    """
    path, kept, draft = directory / f"{name}.log", directory / f"{name}.failed.log", directory / f".{name}.failed"
    try:
        draft.unlink(missing_ok=True)
        size = path.stat().st_size
        if size > FAILED:
            _copy_ends(path, draft, size)
        else:
            _link(path, draft)
        draft.replace(kept)
    except OSError as error:
        return f"cannot keep {path} as {kept.name}: {error.strerror}"
    return ""


def _link(path: Path, draft: Path) -> None:
    try:
        draft.hardlink_to(path)  # nobody writes there any more: the next start takes a new file
    except OSError:  # a file system without hard links
        shutil.copy(path, draft)


def _copy_ends(path: Path, draft: Path, size: int) -> None:
    with path.open("rb") as source, draft.open("wb") as target:
        target.write(source.read(HEAD))
        target.write(f"\n[{size - FAILED} bytes left out]\n".encode())
        source.seek(size - (FAILED - HEAD))
        shutil.copyfileobj(source, target, CHUNK)
    draft.chmod(0o640)


def _shift(path: Path, keep: int) -> None:
    """NAME.log -> .1 -> .2 ...; the one beyond `keep` goes."""
    if not path.exists():
        return
    _older(path, keep).unlink(missing_ok=True)
    for number in range(keep - 1, -1, -1):
        if _older(path, number).exists():
            _older(path, number).rename(_older(path, number + 1))


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number > 0 else path


def _copy_out(path: Path, keep: int) -> str:
    """Copy to a draft that becomes NAME.log.1. Returns why no copy was made, or ""."""
    if keep <= 0:
        return ""
    draft = path.with_name(f".{path.name}.draft")
    for oldest in range(keep, -1, -1):
        try:
            with path.open("rb") as source, draft.open("wb") as target:
                while chunk := source.read(CHUNK):  # also what comes while we copy
                    target.write(chunk)
            draft.chmod(0o640)
            break
        except OSError as error:
            draft.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or oldest == 0:
                return f"cannot keep the older part of {path}: {error.strerror}"
            _older(path, oldest).unlink(missing_ok=True)
    _older(path, keep).unlink(missing_ok=True)
    for number in range(keep - 1, 0, -1):
        if _older(path, number).exists():
            _older(path, number).rename(_older(path, number + 1))
    draft.rename(_older(path, 1))
    return ""
