"""The journal's own protocol: an entry is a datagram of fields, and what is too large for one goes as a sealed file.

journald may be slow, full or gone, and must not slow the daemon: a send gives up after a few milliseconds, and while
journald stays stuck the next ones do not wait at all. What is given up is counted.
"""

import errno
import fcntl
import os
import re
import socket
import stat
import struct
import time
from array import array
from collections.abc import Mapping
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")
BUFFER = 8 << 20  # bytes that may be on their way; the kernel may allow less
PAUSES = (0.0002, 0.0005, 0.001, 0.002)  # seconds between tries, all of them on the event loop
INFO = 6

_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")  # journald drops other names; a leading "_" is for what it knows by itself
_PRIORITIES = {
    "debug": 7, "info": INFO, "warn": 4, "warning": 4, "error": 3, "exception": 3, "critical": 2, "fatal": 2,
}  # fmt: skip
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Journald:
    """A way into the journal. `lost` counts the entries that it did not take.

    Each entry is sent to the path anew, so a journald that comes back is found again.
    """

    def __init__(self, path: Path = SOCKET) -> None:
        self.path = path
        self.lost = 0
        self._sock: socket.socket | None = None
        self._stuck = False

    def send(self, fields: Mapping[str, str | int]) -> bool:
        """One entry; at most about 4 ms, and True when journald has it. Raises ValueError for a name that is no field's."""
        data = encode(fields)
        try:
            sent = self._push(data)
        except OSError as error:
            sent = error.errno in (errno.EMSGSIZE, errno.ENOBUFS) and self._push_file(data)
        if not sent:
            self.lost += 1
        return sent

    def close(self) -> None:
        """May be called twice; a later `send` opens it again."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def __del__(self) -> None:
        self.close()  # logging is configured anew at a reload: the former way just goes

    def _push(self, data: bytes, *fds: int) -> bool:
        """False when journald was busy all the time. Raises OSError for everything else."""
        if self._sock is None:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        for pause in (0.0, *(() if self._stuck else PAUSES)):
            if pause:
                time.sleep(pause)
            try:
                self._sock.sendmsg([data], rights, 0, str(self.path))
            except BlockingIOError:
                continue
            self._stuck = False
            return True
        self._stuck = True
        return False

    def _push_file(self, data: bytes) -> bool:
        """journald reads only what nobody can change any more."""
        try:
            fd = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:
            return False
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return self._push(b"", fd)
        except OSError:
            return False
        finally:
            os.close(fd)


def encode(fields: Mapping[str, str | int]) -> bytes:
    """The entry as journald reads it. Raises ValueError for a name that is no field's: A-Z, 0-9 and _, a letter first."""
    parts: list[bytes] = []
    for name, value in fields.items():
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no name of a journal field")
        data = str(value).encode(errors="replace")
        if b"\n" in data:
            parts += (name.encode(), b"\n", struct.pack("<Q", len(data)), data, b"\n")
        else:
            parts += (name.encode(), b"=", data, b"\n")
    return b"".join(parts)


def available(environ: Mapping[str, str], stderr_fd: int = 2, path: Path = SOCKET) -> bool:
    """Whether standard error goes into the journal, by the word of systemd (JOURNAL_STREAM), so that fields can too."""
    try:
        status = os.fstat(stderr_fd)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}" and is_there(path)


def is_there(path: Path = SOCKET) -> bool:
    """Whether there is a journal to write to."""
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def priority(level: str) -> int:
    """syslog's number of a structlog level; 6 (info) for words that are none."""
    return _PRIORITIES.get(level.lower(), INFO)
