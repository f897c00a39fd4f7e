"""Ports of this machine: whether one is free, who has it, and one that nobody has.

vLLM binds its port with SO_REUSEADDR a minute before it listens, so two that load at once both succeed until the end. Hence
the test binds without it. That refuses more than it should: connections of the last server that linger in TIME_WAIT.
"""

import os
import pwd
import socket
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

LISTEN, TIME_WAIT = "0A", "06"
#: How often a free port is asked for before giving up.
TRIES = 64


@dataclass(frozen=True, slots=True)
class Row:
    """A line of /proc/net/tcp: state, owner and inode of a socket on our side of a connection."""

    state: str
    uid: int
    inode: int


def busy(port: int, proc: Path = Path("/proc")) -> str:
    """Who keeps 127.0.0.1:port from being bound ("python (pid 12)"), or "" when it is free."""
    if can_bind(port):
        return ""
    rows = [row for name in ("tcp", "tcp6") for row in read_rows(proc / "net" / name, port)]
    firm = sorted((row for row in rows if row.state != TIME_WAIT), key=lambda row: row.state != LISTEN)
    if not firm:
        # Bound but not listening shows in no table: with nothing lingering, somebody has it and is still loading.
        return "" if rows else "a process that does not listen yet"
    return holder(firm[0], proc)


def can_bind(port: int) -> bool:
    """Whether the port can be bound without SO_REUSEADDR."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def read_rows(table: Path, port: int) -> list[Row]:
    """Sockets whose own port is `port`."""
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return []
    end = f":{port:04X}"
    return [Row(w[3], int(w[7]), int(w[9])) for w in map(str.split, lines) if w[1].endswith(end)]


def holder(row: Row, proc: Path) -> str:
    """The process that has the socket, or at least its user: other users' descriptors cannot be read."""
    wanted = f"socket:[{row.inode}]"
    for folder in proc.glob("[0-9]*"):
        try:
            with os.scandir(folder / "fd") as entries:
                found = any(points_to(entry.path, wanted) for entry in entries)
            if found:
                return f"{(folder / 'comm').read_text().strip()} (pid {folder.name})"
        except OSError:
            continue
    try:
        return f"a process of user {pwd.getpwuid(row.uid).pw_name}"
    except KeyError:
        return f"a process of user {row.uid}"


def points_to(link: str, wanted: str) -> bool:
    """Whether a descriptor is this one; one that was just closed is not."""
    try:
        return os.readlink(link) == wanted  # noqa: PTH115 - hot
    except OSError:
        return False


def choose(taken: Container[int]) -> int:
    """A port that the kernel calls free and that is not in `taken`. Raises OSError when none is found."""
    for _ in range(TRIES):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port not in taken:
            return port
    raise OSError(f"cannot find a free port in {TRIES} tries")
