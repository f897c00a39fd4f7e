"""The listeners: the control socket for who may change things, TCP for who may look.

What a hostile client can do is bounded here: connections, the time that a request may take to arrive (aiohttp's keep-
alive timer also ends a connection whose next request is not complete), the size of lines and headers, and answers to
what is not HTTP. The two kinds of listener count their connections apart, so that a flood on TCP leaves the control
socket free.
"""

import asyncio
import contextlib
import errno
import grp
import logging
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from vllmd.edge.backend import Backend, Refused
from vllmd.edge.gate import Gate, Limits, own_names, refuse
from vllmd.edge.stream import EventLog, encode
from vllmd.spec import HttpSpec

log = logging.getLogger("vllmd.http")

FULL = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nRetry-After: 5\r\n\r\n"
    + encode(Refused(503, "full", "there are too many connections", "try again in some seconds").body())
).encode()
BACKLOG = 512  # the default of 128 makes the rest of a burst wait a second for its SYN to be sent again


class ListenError(Exception):
    """A listener that cannot be opened: why, and what to do."""


class Connection(web.RequestHandler):
    """aiohttp's connection, but what is not HTTP gets our kind of error, and no traceback in the log."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what the parser or the handler could not take."""
        if status >= 500:
            log.error("cannot answer a request", exc_info=exc)
        what = (message or "").partition("\n")[0][:200] or "the request is malformed"
        response = refuse(Refused(status, "bad-request" if status < 500 else "internal", what))
        response.force_close()
        return response


class Full(asyncio.Protocol):
    """What a connection gets when there are too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say so and hang up."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(FULL)
        transport.close()


class Listeners:
    """All listeners of the daemon."""

    def __init__(
        self,
        backend: Backend,
        events: EventLog,
        path: Path | None,
        spec: HttpSpec,
        *,
        limits: Limits | None = None,
        group: str = "vllmd",
        given: Sequence[socket.socket] = (),
        tcp: Sequence[socket.socket] = (),
    ) -> None:
        """Listen on the unix socket `path` (None = not) and on `spec.listen`. `group`, if it exists, may use it.

        Sockets that systemd holds (`given` for control, `tcp`) are served instead, and stay when we go.
        """
        self._given, self._tcp = given, tcp
        self._backend = backend
        self._events = events
        self._path = path
        self._spec = spec
        self._limits = limits or Limits()
        self._group = group
        self._inode: tuple[int, int] | None = None
        self._servers: list[web.Server] = []
        self._open: list[asyncio.Server] = []

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """(host, port) of each TCP listener that is open."""
        names = [s.getsockname() for server in self._open for s in server.sockets if s.family != socket.AF_UNIX]
        return [(name[0], name[1]) for name in names]

    @property
    def connections(self) -> int:
        """How many clients are connected, on all listeners."""
        return sum(len(server.connections) for server in self._servers)

    async def start(self) -> None:
        """Open all, or none: raises ListenError."""
        loop = asyncio.get_running_loop()
        try:
            control = list(self._given)
            if self._path is not None and not control:
                sock, self._inode = await asyncio.to_thread(bind_unix, self._path, self._group)
                control = [sock]
            if control:
                factory = self._factory(Gate(self._backend, self._events, None, self._limits))
                for sock in control:
                    self._open.append(await loop.create_unix_server(factory, sock=sock, backlog=BACKLOG))
            if self._spec.listen or self._tcp:
                names = own_names([host for host, _ in self._spec.listen])
                factory = self._factory(Gate(self._backend, self._events, names, self._limits))
                for sock in self._tcp:
                    self._open.append(await loop.create_server(factory, sock=sock, backlog=BACKLOG))
                for host, port in () if self._tcp else self._spec.listen:
                    self._open.append(await open_tcp(factory, host, port))
        except BaseException:
            await self.stop()
            raise

    def _factory(self, gate: Gate) -> "Factory":
        # A client that leaves takes its handler with it: without this a stream to nobody would go on for ever.
        server = web.Server(gate, handler_cancellation=True)
        self._servers.append(server)
        return Factory(server, self._limits)

    async def stop(self) -> None:
        """Close all within a second: streams get their `bye`, requests in progress a moment, the socket file goes."""
        self._events.close()
        for listener in self._open:
            listener.close()
        self._open.clear()
        if self._path is not None and self._inode is not None:
            unlink(self._path, self._inode)
            self._inode = None
        for server in self._servers:
            transports = [c.transport for c in server.connections if c.transport is not None]
            server.pre_shutdown()
            await server.shutdown(self._limits.goodbye)
            for transport in transports:
                if transport.get_write_buffer_size():  # it does not read; closing would wait for it
                    transport.abort()
        self._servers.clear()


class Factory:
    """Makes what serves a new connection."""

    def __init__(self, server: web.Server, limits: Limits) -> None:
        self._server = server
        self._limits = limits

    def __call__(self) -> asyncio.Protocol:
        """A connection, or the refusal of one."""
        if len(self._server.connections) >= self._limits.connections:
            return Full()
        return Connection(
            self._server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=self._limits.request,
            lingering_time=1.0,
            auto_decompress=False,  # nobody sends a compressed body but who means harm
            access_log=None,  # type: ignore[arg-type]  # documented as "no access log"
        )


async def open_tcp(factory: Factory, host: str, port: int) -> asyncio.Server:
    """A listener on all addresses of `host`. Raises ListenError."""
    try:
        return await asyncio.get_running_loop().create_server(factory, host or None, port, backlog=BACKLOG)
    except OSError as error:
        hint = "change [http] listen"
        if error.errno == errno.EADDRINUSE:
            hint = f"ss -ltnp 'sport = :{port}' shows who has it; or {hint}"
        raise ListenError(f"cannot listen on {host}:{port}: {error.strerror or error} ({hint})") from None


def bind_unix(path: Path, group: str) -> tuple[socket.socket, tuple[int, int]]:
    """A bound, not yet listening socket at `path` for us and `group`, and its device and inode. Raises ListenError.

    Nobody can connect before it listens, so its mode is set in time. A file that is left of a dead daemon is replaced,
    one on which somebody answers is not.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        clear_stale(path)
        sock.bind(str(path))
        path.chmod(0o660 if give(path, group) else 0o600)
        sock.setblocking(False)
        made = path.stat()
    except OSError as error:
        sock.close()
        hint = "a path of at most 107 bytes is needed" if len(os.fsencode(path)) > 107 else "change [daemon] socket"
        raise ListenError(f"cannot listen on {path}: {error.strerror or error} ({hint})") from None
    except ListenError:
        sock.close()
        raise
    return sock, (made.st_dev, made.st_ino)


def clear_stale(path: Path) -> None:
    """Remove a socket file on which nobody answers. Raises ListenError where somebody does, or it is no socket."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListenError(f"cannot listen on {path}: it is no socket (move it away, or change [daemon] socket)")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
        raise ListenError(f"cannot listen on {path}: a running vllmd answers there (stop it first: vllmctl status)")


def give(path: Path, group: str) -> bool:
    """Give the file to `group`. Whether its group may be trusted with it: root's own may, another user's may not."""
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
    except (KeyError, PermissionError):
        return os.geteuid() == 0
    return True


def unlink(path: Path, inode: tuple[int, int]) -> None:
    """Remove our socket file, unless another daemon has put its own there."""
    with contextlib.suppress(OSError):
        found = path.lstat()
        if (found.st_dev, found.st_ino) == inode:
            path.unlink()
