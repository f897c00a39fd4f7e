"""A connection to an engine, HTTP/1.1 on httptools, and the exchanges on it, one at a time.

An exchange wakes whoever waits for it once: when a small answer is all there, or when the head of a large or endless one is.
From then on bytes go to a sink as they come, with no task in between. What is sent is always framed anew with our own length,
so that nothing a client wrote can be taken for the beginning of another request.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import httptools

SMALL: Final = 256 << 10  # bytes of an answer that is waited for as a whole
HEADERS_MAX: Final = 64 << 10  # bytes
SLICE: Final = 1 << 17  # bytes of a large body that are written at once
HANDED_ON: Final = frozenset({b"retry-after", b"content-disposition"})


class EngineGone(Exception):
    """The engine did not answer, or not to the end. `begun`: bytes of its answer had come; `asked`: it may have read the
    request."""

    def __init__(self, why: str, *, begun: bool, asked: bool = True) -> None:
        super().__init__(why)
        self.begun, self.asked = begun, asked


class Exchange:
    """One request and its answer. `status`, `kind` (its content type) and `more` (header lines that mean something to a client)
    are there once `ready` has resolved."""

    __slots__ = (
        "complete", "connection", "error", "full", "kind", "length", "more", "pieces", "ready", "sink", "status", "whole",
    )  # fmt: skip

    def __init__(self, connection: "Connection", loop: asyncio.AbstractEventLoop) -> None:
        self.connection: Connection = connection
        self.status = 0
        self.kind = b""
        self.length = b""
        self.more = b""
        self.pieces: list[bytes] = []
        self.whole = False  # the answer is small and came as a whole
        self.complete = False
        self.error: EngineGone | None = None
        self.ready: asyncio.Future[None] = loop.create_future()
        self.sink: Callable[[bytes], bool] | None = None  # takes bytes; False = full, stop reading
        self.full: asyncio.Future[None] | None = None

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


class Owner(Protocol):
    """Whose the connections are."""

    def give_back(self, connection: "Connection") -> None:
        """An exchange is over and the connection still good."""

    def forget(self, connection: "Connection") -> None:
        """The connection is no more."""


class Connection(asyncio.Protocol):
    """One connection to an engine, with at most one exchange at a time."""

    def __init__(self, pool: "Owner", loop: asyncio.AbstractEventLoop) -> None:
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
        self._full = False  # the engine takes no more at the moment
        self._rest: memoryview = memoryview(b"")  # of a body, to be sent

    # -- what the pool asks

    def begin(self, head: bytes, body: bytes) -> Exchange:
        """Send a request. The connection must be idle."""
        assert self.transport is not None
        self.exchange = exchange = Exchange(self, self.loop)
        self.used += 1
        self._head, self._framed = 0, False
        if len(body) < SLICE:
            self.transport.write(head + body)
        else:
            self._rest = memoryview(body)
            self.transport.write(head)
            self._send_on()
        return exchange

    def _send_on(self) -> None:
        """A large body slice by slice, as the engine takes it: asyncio moves all that it holds with each part it sends."""
        while self._rest and not self._full and self.transport is not None:
            piece, self._rest = self._rest[:SLICE], self._rest[SLICE:]
            self.transport.write(piece)

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

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._send_on()

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:  # nobody asked
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not exchange.complete:
                self._fail(f"its answer cannot be read ({error})")
                return
            self._keep = False  # what stands behind an answer is nobody's
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
        self._rest = memoryview(b"")
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
        if self._rest:  # answered before it had all: what it has not read must not be taken for a request
            self._rest, self._keep = memoryview(b""), False
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

    def on_message_begin(self) -> None:
        if self.exchange is None:  # an answer behind the answer: nobody may get it, nor what follows
            self._keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        exchange = self.exchange
        self._head += len(name) + len(value)
        if exchange is None or self._head > HEADERS_MAX:
            return
        low = name.lower()
        if low == b"content-type":
            exchange.kind = value
        elif low == b"content-length":
            exchange.length = value
        elif low == b"transfer-encoding":
            self._framed = True
        elif low in HANDED_ON:
            exchange.more += b"%b: %b\r\n" % (name, value)

    def on_headers_complete(self) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue and its like come before the answer
            exchange.kind = exchange.length = exchange.more = b""
            return
        exchange.status = status
        self._keep = self._parser.should_keep_alive()
        length = exchange.length
        if length:
            self._framed = True
        if status in (204, 304):
            return  # its end follows at once
        if not length.isdigit() or int(length) > SMALL or exchange.kind.startswith(b"text/event-stream"):
            exchange.ready.set_result(None)

    def on_body(self, body: bytes) -> None:
        if self.exchange is not None:
            self.exchange.pieces.append(body)

    def on_message_complete(self) -> None:
        if self.exchange is not None and self.exchange.status:
            self.exchange.complete = True
            self.exchange = None  # nothing that follows is part of it
