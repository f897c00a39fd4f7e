"""A vllmd made of a dict, on a unix socket, in threads: what vllmctl is tested against.

`routes` maps "GET /path" to raw bytes, to a JSON value, to (status, JSON value), or to a function of (connection, request).
Everything that was asked is in `asked`. An events route serves `snapshot()` and then whatever is put into `feed`.
"""

import json
import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Handler = Callable[[socket.socket, str], None]
LIMIT = 20.0


def answer(value: Any, status: int = 200) -> bytes:
    body = json.dumps(value).encode()
    return (
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(kind: str, data: Any, ident: int | None = None) -> bytes:
    head = "" if ident is None else f"id: {ident}\n"
    return chunk(f"{head}event: {kind}\ndata: {json.dumps(data)}\n\n".encode())


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(
    b"retry: 1000\n\n"
)


class Daemon:
    """A context manager: listening inside, gone after it."""

    def __init__(self, path: Path, routes: dict[str, Any] | None = None) -> None:
        self.path = path / "vllmd.sock"
        self.routes: dict[str, Any] = routes or {}
        self.asked: list[tuple[str, Any]] = []
        self.feed: queue.Queue[bytes | None] = queue.Queue()
        self.status: dict[str, Any] = {}
        self.streams = threading.Semaphore(0)  # released when a stream has been opened and its snapshot sent
        self.over = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX)
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Self:
        self._socket.bind(str(self.path))
        self._socket.listen(50)
        self._run(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self.feed.put(None)
        for each in (self._socket, *self._open):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            each.close()
        for thread in self._threads:
            thread.join(LIMIT)
        assert not any(thread.is_alive() for thread in self._threads)

    def _run(self, target: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._open.add(connection)
            self._run(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            self._reply(connection)
        except OSError:
            pass  # the client left
        finally:
            self._open.discard(connection)
            connection.close()

    def _reply(self, connection: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            if not (more := connection.recv(65536)):
                return
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = next((int(x[15:]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length:")), 0)
        while len(body) < length:
            body += connection.recv(65536)
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        self.asked.append((f"{method} {target}", json.loads(body) if body else None))
        route = self.routes.get(f"{method} {target}", self.routes.get(f"{method} {target.partition('?')[0]}"))
        match route:
            case None:
                missing = {"error": {"message": f"no such path: {target}", "code": "unknown-path", "hint": ""}}
                connection.sendall(answer(missing, 404))
            case bytes():
                connection.sendall(route)
            case (int(), _):
                connection.sendall(answer(route[1], route[0]))
            case _ if callable(route):
                route(connection, target)
            case _:
                connection.sendall(answer(route))

    def events(self, connection: socket.socket, _target: str) -> None:
        """A route: the snapshot of now, then what is fed; None ends the stream."""
        connection.sendall(STREAM + event("snapshot", self.status, 1))
        self.streams.release()
        while (data := self.feed.get()) is not None:
            connection.sendall(data)
        if self.over.is_set():
            self.feed.put(None)  # for the next stream
        else:
            connection.sendall(b"0\r\n\r\n")
