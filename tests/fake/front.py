"""HTTP/1.1 as uvicorn speaks it, a thread for each connection: idle ones sleep in the kernel.

A request is a value, an answer is bytes or an iterator of chunks; what the paths mean is api.py's. A client that goes
away is seen at once, by its hang-up, while the engine works for it.
"""

import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

from tests.fake.texts import write

REASONS: Final = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed",
    500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip
JSON: Final = "application/json"


class ClientGone(Exception):
    """The client hung up before its answer was complete."""


class Request(NamedTuple):
    """One request, with the connection for whoever has to watch it."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes
    sock: socket.socket


class Answer(NamedTuple):
    """A body at once, or chunk by chunk."""

    status: int = 200
    body: bytes | Iterator[bytes] = b""
    kind: str = JSON


class Inbox:
    """What the engine says about one request; waiting on it ends with the client."""

    def __init__(self) -> None:
        self.messages: deque[dict[str, Any]] = deque()
        self.bell = os.eventfd(0)

    def put(self, message: dict[str, Any]) -> None:
        """Called by the thread that hears the engine."""
        self.messages.append(message)
        os.eventfd_write(self.bell, 1)

    def get(self, client: socket.socket) -> dict[str, Any]:
        """The next message; ClientGone when the client hangs up first."""
        while not self.messages:
            poll = select.poll()
            poll.register(self.bell, select.POLLIN)
            poll.register(client, select.POLLRDHUP)
            if any(fd != self.bell for fd, _ in poll.poll()):
                raise ClientGone
            os.eventfd_read(self.bell)
        return self.messages.popleft()


class Site(Protocol):
    """Who answers."""

    def answer(self, request: Request) -> Answer:
        """Any request's answer."""

    def sent(self) -> None:
        """The last answer is out, or its client gone."""


def accept(listener: socket.socket, site: Site, quiet: Callable[[str], bool]) -> None:
    """Serve until the process ends. `quiet` says whose access line is left out."""
    threading.stack_size(256 << 10)
    while True:
        sock, peer = listener.accept()
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else ""
        threading.Thread(target=converse, args=(sock, name, site, quiet), daemon=True).start()


def converse(sock: socket.socket, peer: str, site: Site, quiet: Callable[[str], bool]) -> None:
    """One connection, request after request, closed when idle as uvicorn does."""
    idle = float(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "5"))
    try:
        with sock, sock.makefile("rb") as reader:
            while True:
                sock.settimeout(idle)
                if (request := read(sock, reader)) is None:
                    return
                sock.settimeout(None)
                try:
                    reply = site.answer(request)
                    if not quiet(request.path):
                        line = f"{request.method} {request.path} HTTP/1.1"
                        write(1, f'INFO:     {peer} - "{line}" {reply.status} {REASONS[reply.status]}\n')
                    send(sock, reply)
                finally:
                    site.sent()
                if request.headers.get("connection", "").lower() == "close":
                    return
    except (OSError, ValueError, IndexError, ClientGone):
        return


def read(sock: socket.socket, reader: BinaryIO) -> Request | None:
    """The next request; None at the end of the connection. ValueError or IndexError when it is not HTTP."""
    if not (line := reader.readline(1 << 16).decode("latin-1").strip()):
        return None
    method, target, _ = line.split(" ")
    headers: dict[str, str] = {}
    while row := reader.readline(1 << 16).decode("latin-1").strip():
        name, _, value = row.partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b"".join(chunks(reader))
    else:
        body = reader.read(int(headers.get("content-length", "0")))
    path, _, query = target.partition("?")
    return Request(method, path, query, headers, body, sock)


def chunks(reader: BinaryIO) -> Iterator[bytes]:
    """The pieces of a chunked body."""
    while size := int(reader.readline().split(b";")[0], 16):
        yield reader.read(size)
        reader.readline()
    while reader.readline().strip():
        pass


def send(sock: socket.socket, reply: Answer) -> None:
    """Write the answer; what the iterator still holds when the client is gone is closed with it."""
    head = f"HTTP/1.1 {reply.status} {REASONS[reply.status]}\r\nserver: uvicorn\r\ncontent-type: {reply.kind}\r\n"
    if isinstance(reply.body, bytes):
        sock.sendall(f"{head}content-length: {len(reply.body)}\r\n\r\n".encode() + reply.body)
        return
    sock.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
    pieces = reply.body
    try:
        for piece in pieces:
            sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        sock.sendall(b"0\r\n\r\n")
    finally:
        getattr(pieces, "close", lambda: None)()
