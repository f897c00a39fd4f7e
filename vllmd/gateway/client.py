"""The client's end of one request: the answer is written to its connection as HTTP/1.1, in as few writes as there are.

aiohttp has read the request and minds the connection; its responses cost as much as all the rest of a request here, so the
head of an answer is put together by hand. What is returned to aiohttp says that all has been sent.
"""

import asyncio
import fcntl
import struct
import termios
from http import HTTPStatus
from typing import Final

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

PATIENCE: Final = 30.0  # seconds that a client may take nothing of what it is sent
STREAM: Final = b"text/event-stream"
EXPOSED: Final = "Access-Control-Expose-Headers: Retry-After, X-Request-Id\r\n"
EVENTS: Final = STREAM + b"; charset=utf-8"
JSON: Final = b"application/json"
_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class Sent(web.StreamResponse):
    """An answer that is on its way already."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Nothing is left to do."""
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to do."""


class Client:
    """Who asked, and what has been told. `ident` is the request's id, `origin` a page that may read the answer, or ""."""

    __slots__ = ("_chunked", "_keep", "_protocol", "_request", "_tail", "begun", "events", "ident", "model")

    def __init__(self, request: web.BaseRequest, ident: str, origin: str) -> None:
        self._request = request
        self._protocol = request.protocol
        self.ident = ident
        self.model = ""  # which is asked for, once that is known
        self.begun = False  # the head of an answer is out
        self.events = False  # ... and it is a stream of events that goes on
        self._chunked = request.version >= HttpVersion11
        self._keep = self._chunked and request.keep_alive
        cors = f"Access-Control-Allow-Origin: {origin}\r\n{EXPOSED}Vary: Origin\r\n" if origin else ""
        self._tail = f"X-Request-Id: {ident}\r\nServer: vllmd\r\nCache-Control: no-store\r\n{cors}".encode()

    @property
    def _transport(self) -> asyncio.Transport:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        assert isinstance(transport, asyncio.Transport)
        return transport

    def whole(self, status: int, kind: bytes, body: bytes, more: bytes = b"") -> None:
        """A whole answer in one write. `more`: further header lines, each with its line end."""
        if not self._request.content.is_eof():
            self._keep = False  # what is left of the body must not be taken for a request
        end = b"\r\n" if self._keep else b"Connection: close\r\n\r\n"
        self.begun = True
        head = b"%bContent-Type: %b\r\nContent-Length: %d\r\n%b%b%b" % (
            _LINES.get(status) or f"HTTP/1.1 {status} \r\n".encode(), kind, len(body), more, self._tail, end,
        )  # fmt: skip
        if self._request.method == "HEAD":
            self._transport.write(head)
        elif len(body) < 1 << 16:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    def begin(self, status: int, kind: bytes, more: bytes = b"") -> None:
        """The head of an answer whose length is not known yet."""
        self.begun, self.events = True, kind.startswith(STREAM)
        self._keep = self._keep and self._request.content.is_eof()
        frame = b"Transfer-Encoding: chunked\r\n" if self._chunked else b""
        end = b"\r\n" if self._keep else b"Connection: close\r\n\r\n"
        line = _LINES.get(status) or f"HTTP/1.1 {status} \r\n".encode()
        self._transport.write(
            b"%bContent-Type: %b\r\nX-Accel-Buffering: no\r\n%b%b%b%b" % (line, kind, frame, more, self._tail, end)
        )

    def write(self, data: bytes) -> bool:
        """A piece of an answer that was begun; False when no more should be written until `drain`. Of a client that is gone
        nothing is heard here: its request is cancelled."""
        protocol = self._protocol
        transport = protocol.transport
        if transport is None or not data:
            return True
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return not protocol.writing_paused

    @property
    def behind(self) -> bool:
        """Whether it has more to take than it should."""
        return self._protocol.transport is not None and self._protocol.writing_paused

    async def drain(self) -> None:
        """Wait until the client has taken most of it. One that takes nothing for PATIENCE is cut: then ConnectionError is
        raised, or the request cancelled. A slow one may take its time."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle
        left = self._untaken()

        def look() -> None:
            nonlocal left, timer
            before, left = left, self._untaken()
            if left < before:
                timer = loop.call_later(PATIENCE, look)
            else:
                self.cut()

        timer = loop.call_later(PATIENCE, look)
        try:
            await self._request.writer.drain()
        finally:
            timer.cancel()

    def _untaken(self) -> int:
        """Bytes that were written and that its machine has not taken. Those in the kernel count, which may be millions: it
        takes more from us only when a good part of them is gone."""
        transport = self._protocol.transport
        if transport is None:
            return 0
        assert isinstance(transport, asyncio.Transport)
        sock = transport.get_extra_info("socket")
        try:
            queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
        except OSError:  # it was closed just now
            queued = bytes(4)
        return transport.get_write_buffer_size() + int(struct.unpack("i", queued)[0])

    def end(self) -> None:
        """The end of an answer that was begun."""
        self.events = False
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")

    def cut(self) -> None:
        """Break the connection: the only way to say that a plain answer is not whole."""
        self._keep = False
        if self._request.transport is not None:
            self._request.transport.abort()

    def sent(self) -> Sent:
        """What aiohttp is given back."""
        return _KEEP if self._keep else _CLOSE


def _sent(*, keep: bool) -> Sent:
    response = Sent()
    response._keep_alive = keep
    return response


_KEEP: Final = _sent(keep=True)
_CLOSE: Final = _sent(keep=False)
