"""The way to an engine: a pool of HTTP/1.1 connections to one endpoint, and an exchange on each.

An exchange wakes whoever waits for it once: when a small answer is all there, or when the head of a large or endless one is.
From then on bytes go to a sink as they come, with no task in between. What is sent is always framed anew with our own length,
so that nothing a client wrote can be taken for the beginning of another request.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

import httptools

SMALL: Final = 256 << 10  # bytes of an answer that is waited for as a whole
IDLE_MAX: Final = 3.0  # seconds that a connection is kept: vLLM's server closes its own after 5
KEPT: Final = 1024  # idle connections
CONNECT_LIMIT: Final = 10.0  # seconds
HEADERS_MAX: Final = 64 << 10  # bytes


class EngineGone(Exception):
    """The engine did not answer, or not to the end. `begun`: bytes of its answer had come."""

    def __init__(self, why: str, *, begun: bool) -> None:
        super().__init__(why)
        self.begun = begun


class Exchange:
    """One request and its answer. `status` and `headers` (names in lower case) are there once `ready` has resolved."""

    __slots__ = ("complete", "connection", "error", "full", "headers", "pieces", "ready", "sink", "status", "whole")

    def __init__(self, connection: "Connection", loop: asyncio.AbstractEventLoop) -> None:
        self.connection: Connection = connection
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.pieces: list[bytes] = []
        self.whole = False  # the answer is small and came as a whole
        self.complete = False
        self.error: EngineGone | None = None
        self.ready: asyncio.Future[None] = loop.create_future()
        self.sink: Callable[[bytes], bool] | None = None  # takes bytes; False = full, stop reading
        self.full: asyncio.Future[None] | None = None

    def header(self, name: bytes) -> bytes:
        """The value of a header, b"" without one."""
        return next((value for key, value in self.headers if key == name), b"")

    def take(self) -> bytes:
        """What has come of the body and was not taken yet."""
        data = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces = []
        return data

    async def pour(self, sink: Callable[[bytes], bool], drain: Callable[[], Awaitable[None]]) -> None:
        """Give the rest of the body to `sink` as it comes, until its end. When the sink is full `drain` is waited for, and the
        engine not read meanwhile. Raises EngineGone where the answer is cut, and what `drain` raises."""
        self.sink = sink
        if self.pieces and not sink(self.take()):
            await self._hold(drain)
        while not self.complete:
            if self.error is not None:
                raise self.error
            self.full = self.connection.loop.create_future()
            await self.full
            if not self.complete and self.error is None:
                await self._hold(drain)

    async def _hold(self, drain: Callable[[], Awaitable[None]]) -> None:
        if self.complete:  # the connection may be another's by now
            await drain()
            return
        self.connection.pause()
        await drain()
        if not self.complete:
            self.connection.resume()

    def abort(self) -> None:
        """Nobody wants the rest: the engine is told by the end of its connection."""
        if not self.complete:
            self.connection.close()


class Connection(asyncio.Protocol):
    """One connection to an engine, with at most one exchange at a time."""

    def __init__(self, pool: "Pool", loop: asyncio.AbstractEventLoop) -> None:
        self.pool, self.loop = pool, loop
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.used = 0  # exchanges so far
        self.idle_since = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._keep = True
        self._framed = False
        self._head = 0
        self._paused = False

    # -- what the pool asks

    def begin(self, head: bytes, body: bytes) -> Exchange:
        """Send a request. The connection must be idle."""
        assert self.transport is not None
        self.exchange = exchange = Exchange(self, self.loop)
        self.used += 1
        self._head = 0
        if len(body) < 1 << 16:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        return exchange

    def close(self) -> None:
        """End it now; an exchange that is not complete is cut."""
        if self.transport is not None:
            self.transport.abort()

    def pause(self) -> None:
        if not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self.transport is not None and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:  # nobody asked
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"its answer cannot be read ({error})")
            return
        if exchange.sink is not None and exchange.pieces and not exchange.sink(exchange.take()):
            self.pause()
            if exchange.full is not None and not exchange.full.done():
                exchange.full.set_result(None)
        if exchange.complete:
            self._finish(exchange)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.pool.forget(self)
        exchange = self.exchange
        if exchange is None or exchange.complete:
            return
        if exchange.status and not self._framed and exc is None:
            exchange.complete = True  # the end of the connection is the end of the answer
            self._finish(exchange)
        else:
            self._fail(f"the connection broke{f' ({exc})' if exc else ''}")

    def _fail(self, why: str) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.error = EngineGone(why, begun=exchange.status > 0)
            if not exchange.ready.done():
                exchange.ready.set_exception(exchange.error)
            elif exchange.full is not None and not exchange.full.done():
                exchange.full.set_result(None)
        self.close()

    def _finish(self, exchange: Exchange) -> None:
        self.exchange = None
        if not exchange.ready.done():
            exchange.whole = True
            exchange.ready.set_result(None)
        elif exchange.full is not None and not exchange.full.done():
            exchange.full.set_result(None)
        if self._keep and self.transport is not None and not self.transport.is_closing():
            self.resume()
            self.pool.give_back(self)
        else:
            self.close()

    # -- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head += len(name) + len(value)
        if self.exchange is not None and self._head <= HEADERS_MAX:
            self.exchange.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue and its like come before the answer
            exchange.headers.clear()
            return
        exchange.status = status
        self._keep = self._parser.should_keep_alive()
        length = exchange.header(b"content-length")
        chunked = exchange.header(b"transfer-encoding").lower() == b"chunked"
        self._framed = chunked or bool(length)
        endless = exchange.header(b"content-type").startswith(b"text/event-stream")
        if endless or not length.isdigit() or int(length) > SMALL:
            exchange.ready.set_result(None)

    def on_body(self, body: bytes) -> None:
        if self.exchange is not None:
            self.exchange.pieces.append(body)

    def on_message_complete(self) -> None:
        if self.exchange is not None and self.exchange.status:
            self.exchange.complete = True


class Pool:
    """Connections to one engine's endpoint ("http://127.0.0.1:8000" or "unix:/path")."""

    def __init__(self, endpoint: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._path = endpoint.removeprefix("unix:") if endpoint.startswith("unix:") else None
        address = urlsplit(endpoint)
        self._host, self._port = address.hostname or "", address.port or 0
        self._idle: deque[Connection] = deque()
        self._closed = False

    async def ask(self, head: bytes, body: bytes) -> Exchange:
        """Send a request; returns when its answer is there, or its head. Raises EngineGone. A connection that the engine closed
        while it was idle is no death of the engine: the request goes out on a new one."""
        connection = self._reuse()
        if connection is not None:
            exchange = connection.begin(head, body)
            try:
                await _arrive(exchange)
                return exchange
            except EngineGone as gone:
                if gone.begun or connection.used < 2:
                    raise
        exchange = (await self._connect()).begin(head, body)
        await _arrive(exchange)
        return exchange

    def _reuse(self) -> Connection | None:
        oldest = self._loop.time() - IDLE_MAX
        while self._idle:
            connection = self._idle.pop()  # the last that was used: the others may go idle
            transport = connection.transport
            if connection.idle_since >= oldest and transport is not None and not transport.is_closing():
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        try:
            async with asyncio.timeout(CONNECT_LIMIT):
                if self._path is not None:
                    _, made = await self._loop.create_unix_connection(lambda: Connection(self, self._loop), self._path)
                else:
                    _, made = await self._loop.create_connection(
                        lambda: Connection(self, self._loop), self._host, self._port
                    )
        except (OSError, TimeoutError) as error:
            raise EngineGone(f"cannot be reached ({error or 'no answer'})", begun=False) from None
        return made

    def give_back(self, connection: Connection) -> None:
        """An exchange is over and the connection still good."""
        if self._closed or len(self._idle) >= KEPT:
            connection.close()
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """The connection is no more."""
        if connection.exchange is None and self._idle:
            with contextlib.suppress(ValueError):
                self._idle.remove(connection)

    def close(self) -> None:
        """No more requests: idle connections end, those in use when they are done."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


async def _arrive(exchange: Exchange) -> None:
    """Wait for the answer; whoever stops waiting closes the connection, so that the engine stops as well."""
    try:
        await exchange.ready
    except asyncio.CancelledError:
        exchange.abort()
        raise
