"""Requests to a model's own endpoint, as its clients send them."""

import http.client
import json
import socket
import threading
import time
from types import TracebackType
from typing import Any, Self

LIMIT = 120.0  # seconds


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=LIMIT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LIMIT)
        self.sock.connect(self._path)


def connect(endpoint: str) -> http.client.HTTPConnection:
    """A connection to what status calls `endpoint`."""
    if endpoint.startswith("unix:"):
        return UnixConnection(endpoint.removeprefix("unix:"))
    return http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=LIMIT)


def ask(model: dict[str, Any], **more: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """Send one chat request. The caller closes the connection."""
    body = {"model": model["name"], "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, **more}
    connection = connect(model["endpoint"])
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def answers(model: dict[str, Any]) -> bool:
    """Whether it answers a chat request with at least one token."""
    connection, response = ask(model)
    try:
        answer = json.loads(response.read())
    finally:
        connection.close()
    return response.status == 200 and int(answer["usage"]["completion_tokens"]) > 0


class Talk:
    """Streams answers one after another, in a thread, until told to end, with `rest` seconds between them; `pauses` are
    the seconds between the pieces of each. Without rest a tiny model keeps two cores busy."""

    def __init__(self, model: dict[str, Any], tokens: int, rest: float = 0.0) -> None:
        self._model, self._tokens, self._rest = model, tokens, rest
        self._over = threading.Event()
        self.begun = threading.Event()
        self.pauses: list[float] = []
        self.reasons: list[str] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._stream()
                self._over.wait(self._rest)
        except BaseException as error:
            self.error = error
        finally:
            self.begun.set()

    def _stream(self) -> None:
        connection, response = ask(self._model, max_tokens=self._tokens, stream=True, ignore_eos=True)
        try:
            assert response.status == 200
            before = time.monotonic()
            for line in response:
                if line.startswith(b"data: {"):
                    now = time.monotonic()
                    self.pauses.append(now - before)
                    before = now
                    reason = json.loads(line[6:])["choices"][0]["finish_reason"]
                    self.reasons += [reason] if reason else []
                    self.begun.set()
        finally:
            connection.close()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self.begun.wait(LIMIT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()
