"""One HTTP request per connection over vllmd's unix socket, and its event stream.

Errors say what is wrong with the socket and what to do: most people meet them before anything else of vllmd.
"""

from __future__ import annotations

import json
import socket
import time

from vllmd.ctl.faults import Garbled, Refused, Unreachable
from vllmd.ctl.http import Event, EventReader, Response

TYPE_CHECKING = False  # typing.TYPE_CHECKING without the 4 ms of importing typing
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

BODY_LIMIT = 256 << 20
SYSTEM = "/run/vllmd.sock"


class Client:
    """Talks to the vllmd that listens on `path`. `timeout` (seconds) bounds each whole request."""

    def __init__(self, path: str, timeout: float = 30.0) -> None:
        self.path = path
        self.timeout = timeout

    def get(self, path: str) -> Any:
        """The JSON answer to GET. Raises Unreachable, Garbled, Refused."""
        return self.call("GET", path)

    def post(self, path: str, body: object = None, timeout: float | None = None) -> Any:
        """The JSON answer to POST. Raises as get()."""
        return self.call("POST", path, body if body is not None else {}, timeout)

    def call(self, method: str, path: str, body: object = None, timeout: float | None = None) -> Any:
        """The JSON answer; None where it is empty. Raises as get()."""
        response, raw = self.fetch(method, path, body, timeout)
        answer = parse(raw) if raw else None
        if response.status >= 400:
            raise refusal(response.status, answer)
        return answer

    def fetch(
        self, method: str, path: str, body: object = None, timeout: float | None = None
    ) -> tuple[Response, bytes]:
        """The answer and its whole body as bytes. Raises Unreachable, Garbled."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        response, parts, size = Response(), [], 0
        with self._connect(deadline) as connection:
            self._send(connection, method, path, body)
            while not response.done:
                data = self._receive(connection, deadline)
                if not data:
                    response.end()
                    break
                parts.append(response.feed(data))
                size += len(parts[-1])
                if size > BODY_LIMIT:
                    raise Garbled("cannot read the answer of vllmd: it has no end")
        return response, b"".join(parts)

    def stream(self, path: str, last_id: str = "", timeout: float = 10.0) -> Stream:
        """An open event stream, its head read. The caller closes it. Raises Unreachable, Garbled, Refused."""
        deadline = time.monotonic() + timeout
        response, rest = Response(), b""
        connection = self._connect(deadline)
        try:
            more = f"Accept: text/event-stream\r\nLast-Event-ID: {last_id}\r\n" if last_id else ""
            self._send(connection, "GET", path, None, more)
            while not response.begun or (response.status >= 400 and not response.done):
                data = self._receive(connection, deadline)
                if not data:
                    response.end()
                    break
                rest += response.feed(data)
            if response.status >= 400:
                raise refusal(response.status, parse(rest) if rest else None)
            return Stream(connection, response, rest)
        except BaseException:
            connection.close()
            raise

    def _connect(self, deadline: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.connect(self.path)
        except OSError as error:
            connection.close()
            raise explain(self.path, error) from None
        except BaseException:
            connection.close()
            raise
        return connection

    def _send(self, connection: socket.socket, method: str, path: str, body: object, more: str = "") -> None:
        payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        what = "text/plain" if isinstance(body, bytes) else "application/json"
        kind = f"Content-Type: {what}\r\nContent-Length: {len(payload)}\r\n" if body is not None else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: vllmd\r\nConnection: close\r\n{kind}{more}\r\n"
        try:
            connection.sendall(head.encode() + payload)
        except TimeoutError as error:
            raise explain(self.path, error) from None
        except OSError:
            pass  # whoever hangs up early may still have said why: the answer is read next

    def _receive(self, connection: socket.socket, deadline: float) -> bytes:
        try:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            return connection.recv(1 << 18)
        except TimeoutError as error:
            raise explain(self.path, error) from None
        except OSError as error:
            raise Unreachable(f"cannot hear vllmd: the connection broke ({error.strerror or error})") from None


class Stream:
    """Events of one connection. `fileno()` is for select; `read()` never waits longer than its socket has nothing."""

    def __init__(self, connection: socket.socket, response: Response, first: bytes) -> None:
        self._connection = connection
        self._response = response
        self._reader = EventReader()
        self._first = first
        self.open = True

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def pending(self) -> bool:
        """There are bytes that select() does not know of: call read() before waiting."""
        return bool(self._first)

    def read(self, timeout: float | None = None) -> list[Event]:
        """What one receive brings, after at most `timeout` seconds; `open` is False once the other side has ended.

        Raises Garbled, and TimeoutError when nothing came.
        """
        body, self._first = self._first, b""
        if not body:
            self._connection.settimeout(timeout)
            try:
                data = self._connection.recv(1 << 18)
            except (TimeoutError, BlockingIOError):  # the second with a timeout of 0
                raise TimeoutError from None
            except OSError:
                data = b""
            body = self._response.feed(data)
            self.open = bool(data) and not self._response.done
        return self._reader.feed(body)

    def events(self, silence: float = 15.0) -> Iterator[Event]:
        """Events until the stream ends. Raises Unreachable after `silence` seconds without even a keepalive."""
        while self.open:
            try:
                yield from self.read(silence)
            except TimeoutError:
                raise Unreachable(f"cannot hear vllmd: silent for {silence:.0f} s") from None

    def close(self) -> None:
        self._connection.close()


def parse(raw: bytes | str) -> Any:
    """JSON. Raises Garbled."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise Garbled("cannot read the answer of vllmd: it is not JSON") from None


def refusal(status: int, answer: object) -> Refused:
    """vllmd's error answer as a fault, with its hint and remedies."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        return Refused(status, f"vllmd refused: HTTP {status}", body=answer)
    remedies = error.get("remedies")
    texts = [str(each) for each in remedies] if isinstance(remedies, list) else []
    hint = str(error.get("hint") or "")
    said = texts if hint == "; ".join(texts) else dict.fromkeys([hint, *texts])  # without a hint vllmd joins them
    message = str(error.get("message") or f"vllmd refused: HTTP {status}")
    return Refused(status, message, *said, kind=str(error.get("code") or ""), body=answer)


def choose_socket(wanted: str | None) -> str:
    """The socket to use: the one named, $VLLMD_SOCKET, or the first place where there is one that we may use."""
    import os

    named = wanted or os.environ.get("VLLMD_SOCKET")
    if named:
        return named
    # pathlib costs 5 ms of imports
    system, *own = places()
    there = [system] if os.path.exists(system) else []  # noqa: PTH110
    there += [path for path in own if _is_ours(path)]
    return next((path for path in there if os.access(path, os.W_OK)), there[0] if there else system)


def places() -> list[str]:
    """Where a vllmd listens unless told otherwise (vllmd/config/paths.py): the system's, then those of this user."""
    import os

    uid, env = os.geteuid(), os.environ
    folders = [f"{env.get('XDG_RUNTIME_DIR', '')}/vllmd", f"/run/user/{uid}/vllmd"]
    # without XDG_RUNTIME_DIR it is Python's directory for temporary files; /run/user is where a session would have it
    folders += [
        f"{os.path.abspath(temp)}/vllmd-{uid}"  # noqa: PTH100
        for temp in (env.get("TMPDIR"), env.get("TEMP"), env.get("TMP"), "/tmp", "/var/tmp")
        if temp
    ]
    found = [f"{folder}/vllmd.sock" for folder in folders if folder.startswith("/") and folder != "/vllmd"]
    return [SYSTEM, *(dict.fromkeys(found) if uid else ())]


def _is_ours(path: str) -> bool:
    """Whether it is there and belongs to us: in a directory for all, anybody could have put it there."""
    import os

    try:
        return os.stat(path).st_uid == os.geteuid()  # noqa: PTH116
    except OSError:
        return False


def explain(path: str, error: OSError) -> Unreachable:
    """Why the socket cannot be used, as seen from here, and what to do."""
    from vllmd.ctl.trouble import explain

    return explain(path, error)
