"""A child's log: one file that it writes itself, so that it goes on without us; followed, kept small, kept on failure.

NAME.log is the running child's; NAME.log.1 ... are older parts, whether a start or its size began a new one;
NAME.log.failed is the last start that failed: no model can be named so that its own files collide with these. Every call
is bounded and none raises for a full disk or missing rights: an engine must not fail because its log does. What went wrong
is told in `trouble` or as the returned sentence.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vllmd.edge.logtext import Line, Splitter

READ = 64 << 10  # bytes read at once: what is made of them on the event loop takes some milliseconds
CHUNK = 1 << 20  # bytes copied at once
BACKLOG = 256 << 10  # bytes not yet read that are still read when the log is rotated; more is left out
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
        self.more = False  # the last read stopped at READ: there is more at once
        self.inode = 0
        self.line_start = 0  # offset behind the last line that ended: whoever begins there misses nothing
        self._fd = -1
        self._at = 0
        self._lines = Splitter()

    @property
    def at(self) -> int:
        """How far it has read."""
        return self._at

    @property
    def size(self) -> int:
        """Bytes in the file now; 0 when there is none."""
        try:
            return os.fstat(self._fd).st_size if self._fd >= 0 else 0
        except OSError:
            return 0

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
        """The lines added since the last call, of at most READ bytes. Follows a new file of that name, and one that
        was cut short."""
        self.more = False
        try:
            if self._fd < 0:
                self._open()
            if os.fstat(self._fd).st_size < self._at:
                self._at = self.line_start = 0
            data = os.pread(self._fd, READ, self._at)
            if not data and self.path.stat().st_ino != self.inode:  # a new start took the name
                last = self._lines.end()
                self.close()
                return last + self.read_new()
        except FileNotFoundError:
            return []
        except OSError as error:
            self.trouble = f"cannot read {self.path}: {error.strerror}"
            return []
        self.trouble = ""
        if (end := data.rfind(b"\n")) >= 0:
            self.line_start = self._at + end + 1
        self._at += len(data)
        self.more = len(data) == READ
        return self._lines.feed(data)

    def rotated(self, done: "Rotated") -> list[Line]:
        """Go on behind a rotation; returns the lines that had not been read, or how much of them is left out."""
        self._at, self.line_start, self.trouble, self.more = 0, 0, done.trouble, False
        if not done.skipped:
            return self._lines.feed(done.unread)
        left_out = Line(f"[{done.skipped} bytes of output left out: they came faster than they can be read]")
        return [*self._lines.end(), left_out]

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


class Rotated(NamedTuple):
    """What a rotation came to. `unread`: what the follower has not seen of the part that was moved; `skipped`: how much that
    is, when it is too much to be given. `done` is False when the log is as it was."""

    unread: bytes = b""
    skipped: int = 0
    trouble: str = ""
    done: bool = True


def rotate(path: Path, at: int, keep: int) -> Rotated:
    """Move what is in a log to NAME.log.1 while its child goes on writing. May block: not on the loop.

    The child keeps its descriptor, so the file is copied and cut: what is there at the beginning, and a bit of what comes
    meanwhile. A child that writes faster than that loses what it wrote in between, and the copy ends with how much.
    Without room for the copy the oldest copies go, and then the content: a log never fills a disk. `at` is how far the
    follower has read, who must not read meanwhile.
    """
    try:
        with path.open("r+b", buffering=0) as log:
            trouble, copied = _copy_out(log, path, keep)
            size = os.fstat(log.fileno()).st_size
            unread = max(0, size - at)
            data = os.pread(log.fileno(), unread, at) if unread <= BACKLOG else b""
            log.truncate(0)
    except OSError as error:
        return Rotated(trouble=f"cannot rotate {path}: {error.strerror}", done=False)
    if copied >= 0:
        # Only now: who sees the new NAME.log.1 knows that NAME.log begins anew.
        trouble = _move_up(path, keep, size - copied)
    return Rotated(data, unread - len(data), trouble)


def older(path: Path, number: int) -> Path:
    """The name of a log's part: 0 is the log itself, 1 the one before."""
    return path.with_name(f"{path.name}.{number}") if number > 0 else path


def keep_failed(directory: Path, name: str, parts: int = 0) -> str:
    """Keep NAME.log, and the `parts` that were rotated away from it, as NAME.log.failed; at most FAILED bytes, beginning
    and end. The child must be gone. May block: not on the loop.

    Returns what went wrong, or "".
    """
    path = directory / f"{name}.log"
    kept, draft = failed_log(path), directory / f".{name}.failed"
    try:
        draft.unlink(missing_ok=True)
        sources = [source for number in range(parts, -1, -1) if (source := older(path, number)).exists()]
        size = sum(source.stat().st_size for source in sources)
        if len(sources) > 1 or size > FAILED:
            _copy_ends(sources, draft, size)
        else:
            _link(path, draft)
        draft.replace(kept)
    except OSError as error:
        return f"cannot keep {path} as {kept.name}: {error.strerror}"
    return ""


def failed_log(path: Path) -> Path:
    """The name under which a log is kept when its start failed."""
    return path.with_name(f"{path.name}.failed")


def _link(path: Path, draft: Path) -> None:
    try:
        draft.hardlink_to(path)  # nobody writes there any more: the next start takes a new file
    except OSError:  # a file system without hard links
        shutil.copy(path, draft)


def _copy_ends(sources: Sequence[Path], draft: Path, size: int) -> None:
    """All of them one behind the other, without the middle if that is too much."""
    with draft.open("wb") as target:
        begin, gap = 0, (HEAD, size - (FAILED - HEAD)) if size > FAILED else (size, size)
        for path in sources:
            with path.open("rb") as source:
                end = begin + os.fstat(source.fileno()).st_size
                _copy(source, target, min(gap[0], end) - begin)
                if begin <= gap[0] < end and gap[0] < gap[1]:
                    target.write(f"\n[{gap[1] - gap[0]} bytes left out]\n".encode())
                if end > gap[1]:
                    source.seek(max(0, gap[1] - begin))
                    _copy(source, target, end - max(begin, gap[1]))
                begin = end
    draft.chmod(0o640)


def _shift(path: Path, keep: int) -> None:
    """NAME.log -> .1 -> .2 ...; the one beyond `keep` goes."""
    if not path.exists():
        return
    older(path, keep).unlink(missing_ok=True)
    for number in range(keep - 1, -1, -1):
        if older(path, number).exists():
            older(path, number).rename(older(path, number + 1))


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> int:
    """At most `size` bytes from where the source stands. Returns how many."""
    left = size
    while left > 0 and (chunk := source.read(min(left, CHUNK))):
        target.write(chunk)
        left -= len(chunk)
    return max(0, size) - max(0, left)


def _copy_out(log: BinaryIO, path: Path, keep: int) -> tuple[str, int]:
    """Copy to a draft. Returns why there is none, or "", and how many bytes it has; -1 for no draft."""
    if keep <= 0:
        return "", -1
    draft = _draft(path)
    for oldest in range(keep, -1, -1):
        try:
            with draft.open("wb") as target:
                log.seek(0)
                copied = _copy(log, target, os.fstat(log.fileno()).st_size)
                copied += _copy(log, target, CHUNK)  # what came meanwhile
            draft.chmod(0o640)
            return "", copied
        except OSError as error:
            draft.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or oldest == 0:
                return f"cannot keep the older part of {path}: {error.strerror}", -1
            older(path, oldest).unlink(missing_ok=True)
    return "", -1


def _move_up(path: Path, keep: int, lost: int) -> str:
    """The draft becomes NAME.log.1. Returns what went wrong, or ""."""
    try:
        if lost > 0:
            with _draft(path).open("ab") as target:
                target.write(f"\n[{lost} bytes left out]\n".encode())
        older(path, keep).unlink(missing_ok=True)
        for number in range(keep - 1, 0, -1):
            if older(path, number).exists():
                older(path, number).rename(older(path, number + 1))
        _draft(path).rename(older(path, 1))
    except OSError as error:
        return f"cannot keep the older part of {path}: {error.strerror}"
    return ""


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.draft")
