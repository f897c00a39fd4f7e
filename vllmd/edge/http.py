"""The listeners: the control socket for who may change things, TCP for who may look.

What a hostile client can do is bounded here: connections, the time that a request may take to arrive (aiohttp's keep-
alive timer also ends a connection whose next request is not complete), the size of lines and headers, and answers to
what is not HTTP. The two kinds of listener count their connections apart, so that a flood on TCP leaves the control
socket free.
"""

import asyncio
import fcntl
import logging
import socket
import ssl
import struct
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from vllmd.edge.auth import Guard
from vllmd.edge.backend import Backend, Front, Refused
from vllmd.edge.bind import BACKLOG, bind_aside, bind_tcp, make_tls, read_certificate, unlink
from vllmd.edge.bind import ListenError as ListenError  # what `open` raises
from vllmd.edge.gate import Gate, Limits, own_names, refuse
from vllmd.edge.stream import EventLog, encode
from vllmd.spec import ApiKey, HttpSpec

log = logging.getLogger("vllmd.http")

FULL = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nRetry-After: 5\r\n\r\n"
    + encode(Refused(503, "full", "there are too many connections", "try again in some seconds").body())
).encode()
READ_AHEAD = 1 << 20  # bytes of a body that are taken from the kernel before somebody reads them
ACCEPTED = 5  # turns of the loop until what it has accepted is a connection
HEAR_EVERY = 0.005  # seconds


class Connection(web.RequestHandler):
    """aiohttp's connection, but what is not HTTP gets our kind of error, and no traceback in the log."""

    __slots__ = ("_begun",)

    def __init__(self, server: web.Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._begun = False  # a request has begun to arrive, and is not complete

    def data_received(self, data: bytes) -> None:
        """As always, and keep in mind whether somebody is in the middle of asking."""
        count = self._request_count
        super().data_received(data)
        self._begun = self._request_count == count and not self._request_in_progress

    @property
    def owed(self) -> bool:
        """Whether a request is on its way here, or has come and is not yet being answered. Somebody who has just connected
        is about to ask."""
        if self.transport is None or self._request_in_progress:
            return False
        idle = self._waiter is not None and not self._waiter.done()
        return not idle or self._begun or self._request_count == 0 or unread(self.transport)

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
        front: Front | None = None,
        keys: Mapping[str, ApiKey] | None = None,
    ) -> None:
        """Listen on the unix socket `path` (None = not) and on `spec.listen`. `group`, if it exists, may use it. `front`
        answers what is for models, over TCP to who has one of the `keys` or comes from this machine.

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
        self._control: list[socket.socket] = []
        self._web: list[socket.socket] = []
        self._bound = False
        self._front = front
        self._guard = Guard(spec, keys or {})
        self._gates: list[Gate] = []
        self._tls: ssl.SSLContext | None = None
        self._servers: list[web.Server] = []
        self._open: list[asyncio.Server] = []

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """(host, port) of each TCP listener that is open."""
        names = [s.getsockname() for server in self._open for s in server.sockets if s.family != socket.AF_UNIX]
        return [(name[0], name[1]) for name in names]

    @property
    def urls(self) -> list[str]:
        """Where the gateway and the API are, as a client on this machine writes it."""
        scheme = "http" if self._tls is None else "https"
        return [f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}" for host, port in self.addresses]

    @property
    def connections(self) -> int:
        """How many clients are connected, on all listeners."""
        return sum(len(server.connections) for server in self._servers)

    async def open(self) -> None:
        """Take all addresses, or none: raises ListenError. Who connects from now on waits until `start`."""
        self._bound = True
        self._tls = make_tls(self._spec)
        try:
            self._control, self._web = list(self._given), list(self._tcp)
            if self._path is not None and not self._given:
                sock, self._inode = await bind_aside(self._path, self._group)
                self._control = [sock]
            for host, port in () if self._tcp else self._spec.listen:
                self._web += await bind_tcp(host, port)
        except BaseException:
            await self.stop()
            raise

    async def start(self) -> None:
        """Serve, and before that `open` if it has not been done."""
        if not self._bound:
            await self.open()
        loop = asyncio.get_running_loop()
        try:
            if self._control:
                factory = self._factory(None, self._limits.connections)
                while self._control:
                    server = await loop.create_unix_server(factory, sock=self._control[0], backlog=BACKLOG)
                    self._open.append(server)
                    del self._control[0]
            if self._web:
                names = own_names([host for host, _ in self._spec.listen])
                factory = self._factory(names, self._limits.web_connections)
                within = None if self._tls is None else self._limits.handshake
                while self._web:
                    server = await loop.create_server(
                        factory, sock=self._web[0], backlog=BACKLOG, ssl=self._tls, ssl_handshake_timeout=within
                    )
                    self._open.append(server)
                    del self._web[0]
        except BaseException:
            await self.stop()
            raise

    def _factory(self, names: frozenset[str] | None, most: int) -> "Factory":
        gate = Gate(self._backend, self._events, names, self._limits, guard=self._guard, front=self._front)
        gate.reconfigure(self._spec)
        self._gates.append(gate)
        # A client that leaves takes its handler with it: without this a stream to nobody would go on for ever.
        server = web.Server(gate, handler_cancellation=True)
        self._servers.append(server)
        return Factory(server, self._limits, most)

    def reconfigure(self, spec: HttpSpec, keys: Mapping[str, ApiKey]) -> str:
        """A reloaded configuration: keys, names and origins, and the certificate read again, for who connects from now on. What
        is wrong with TLS, which is then as before, else ""."""
        self._spec = spec
        self._guard.reconfigure(spec, keys)
        for gate in self._gates:
            gate.reconfigure(spec)
        if (self._tls is None) != (spec.tls_cert is None):
            return f"a restart of vllmd is needed to {'end' if self._tls else 'begin'} TLS; until then it is as before"
        if self._tls is None:
            return ""
        try:
            make_tls(spec)  # a trial: half a certificate in the one that is in use would be worse than the old one
            read_certificate(self._tls, spec)
        except ListenError as error:
            return f"{error}; the old certificate stays"
        return ""

    async def stop(self) -> None:
        """Close all within a second: streams get their `bye`, requests in progress a moment, the socket file goes. Who has
        been let in is heard out: the socket may stay, and its clients do not know that they were a moment too early."""
        self._events.close()
        await self._accept_no_more()
        for listener in self._open:
            listener.close()
        for sock in (*self._control, *self._web):
            sock.close()
        self._open, self._control, self._web = [], [], []
        if self._path is not None and self._inode is not None:
            unlink(self._path, self._inode)
            self._inode = None
        await self._hear_out()
        for server in self._servers:
            transports = [c.transport for c in server.connections if c.transport is not None]
            server.pre_shutdown()
            await server.shutdown(self._limits.goodbye)
            for transport in transports:
                if transport.get_write_buffer_size():  # it does not read; closing would wait for it
                    transport.abort()
        self._servers.clear()

    async def _accept_no_more(self) -> None:
        """Let in who waits already, and nobody else; each of them is a connection then. A listener that is closed while one is
        on its way to that would lose it: neither served nor closed."""
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTED):
            await asyncio.sleep(0)
        for sock in (sock for listener in self._open for sock in listener.sockets):
            loop.remove_reader(sock.fileno())
        for _ in range(ACCEPTED):
            await asyncio.sleep(0)

    async def _hear_out(self) -> None:
        """Until every request that is on its way has come, but not for long."""
        end = asyncio.get_running_loop().time() + self._limits.grace
        while asyncio.get_running_loop().time() < end:
            connections = [c for server in self._servers for c in server.connections]
            if not any(isinstance(each, Connection) and each.owed for each in connections):
                return
            await asyncio.sleep(HEAR_EVERY)


def unread(transport: asyncio.BaseTransport) -> bool:
    """Whether the kernel has bytes of this client that the loop has not read yet."""
    sock = transport.get_extra_info("socket")
    if sock is None or transport.is_closing():
        return False
    try:
        count = fcntl.ioctl(sock.fileno(), termios.FIONREAD, struct.pack("i", 0))
    except (OSError, ValueError):
        return False
    return bool(struct.unpack("i", count)[0])


class Factory:
    """Makes what serves a new connection."""

    def __init__(self, server: web.Server, limits: Limits, most: int) -> None:
        self._server = server
        self._limits = limits
        self._most = most

    def __call__(self) -> asyncio.Protocol:
        """A connection, or the refusal of one."""
        if len(self._server.connections) >= self._most:
            return Full()
        return Connection(
            self._server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=self._limits.request,
            lingering_time=1.0,
            read_bufsize=READ_AHEAD,
            auto_decompress=False,  # nobody sends a compressed body but who means harm
            access_log=None,  # documented as "no access log"
        )
