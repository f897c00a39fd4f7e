"""Who listens at an engine's endpoint. A stranger that answers /health on our port must not pass for our engine.

A unix socket tells by SO_PEERCRED. A TCP port is looked up in /proc/net/tcp and tcp6, and its socket searched among the
files of the processes that should have it.
"""

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

_LISTEN, _ESTABLISHED = "0A", "01"  # states in /proc/net/tcp
_CONNECTED = "03"  # in /proc/net/unix


class Listener(NamedTuple):
    """One row of /proc/net/tcp*: the bound address and the socket's inode."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    inode: int


def listener_owner(endpoint: str, pids: Iterable[int], net: Path = Path("/proc/net")) -> frozenset[int] | None:
    """Those who own the socket that answers at "unix:/path" or "http://host:port"; None when nobody listens there.

    On TCP only `pids` are looked at, and the result is empty as soon as one listener there is none of theirs. On a unix
    socket it is the process that called listen(), whoever that is.
    """
    if endpoint.startswith("unix:"):
        return _unix_owner(endpoint.removeprefix("unix:"))
    parts = urlsplit(endpoint)
    address = ipaddress.ip_address("127.0.0.1" if parts.hostname in (None, "localhost") else parts.hostname)
    inodes = {row.inode for row in _answering(address, parts.port or 80, _rows(net, _LISTEN))}
    if not inodes:
        return None
    owned = {pid: _sockets(pid) & inodes for pid in pids}
    if inodes - frozenset().union(*owned.values()):
        return frozenset()
    return frozenset(pid for pid, own in owned.items() if own)


def connections(endpoint: str, net: Path = Path("/proc/net")) -> int:
    """How many clients are connected to "unix:/path" or "http://host:port" now."""
    if endpoint.startswith("unix:"):
        path = endpoint.removeprefix("unix:")
        try:
            rows = [line.split(maxsplit=7) for line in (net / "unix").read_text().splitlines()[1:]]
        except OSError:
            return 0
        return sum(len(row) == 8 and row[5] == _CONNECTED and row[7] == path for row in rows)
    port = urlsplit(endpoint).port or 80
    return sum(row.port == port for row in _rows(net, _ESTABLISHED))


def _unix_owner(path: str) -> frozenset[int] | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(path)
        except OSError:  # also a full backlog: it listens but cannot be asked now
            return None
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return frozenset({pid})


def _answering(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, rows: list[Listener]
) -> list[Listener]:
    """The listeners that get a connection to this address: the most exact bind wins."""
    here = [row for row in rows if row.port == port]
    mapped = ipaddress.ip_address(f"::ffff:{address}") if address.version == 4 else address
    wild = ipaddress.ip_address("0.0.0.0" if address.version == 4 else "::")
    for choice in (address, mapped, wild, ipaddress.ip_address("::")):
        if found := [row for row in here if row.address == choice]:
            return found
    return []


def _rows(net: Path, state: str) -> list[Listener]:
    rows = []
    for name in ("tcp", "tcp6"):
        try:
            lines = (net / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == state:
                address, _, port = fields[1].rpartition(":")
                rows.append(Listener(_address(address), int(port, 16), int(fields[9])))
    return rows


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The kernel prints 32-bit words of the address as numbers of this machine."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    return ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))


def _sockets(pid: int) -> frozenset[int]:
    found = set()
    try:
        for link in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(link.path)  # noqa: PTH115 - "socket:[123]" is no path
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    except OSError:
        return frozenset(found)
    return frozenset(found)
