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
        payload = b"" if body is None else json.dumps(body).encode()
        kind = f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n" if body is not None else ""
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
    """The socket to use: the one named, $VLLMD_SOCKET, the system's, or the user's own; the first that exists."""
    import os

    named = wanted or os.environ.get("VLLMD_SOCKET")
    if named:
        return named
    system = "/run/vllmd.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    own = f"{runtime}/vllmd/vllmd.sock" if runtime else ""
    # pathlib costs 5 ms of imports
    return own if own and not os.path.exists(system) and os.path.exists(own) else system  # noqa: PTH110


def explain(path: str, error: OSError) -> Unreachable:
    """Why the socket cannot be used, as seen from here, and what to do."""
    import os
    import stat

    runtime = os.environ.get("XDG_RUNTIME_DIR")
    user = bool(runtime) and path.startswith(f"{runtime}/")
    start = f"systemctl {'--user ' if user else ''}start vllmd"
    head = f"cannot reach vllmd on {path}"
    if isinstance(error, TimeoutError):
        return Unreachable(
            f"{head}: connected, but no answer in time (is it stopped or overloaded?)", "journalctl -u vllmd -n 50"
        )
    try:
        info = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return Unreachable(
            f"{head}: no such file, so vllmd does not run there",
            start,
            "vllmctl --socket PATH, or VLLMD_SOCKET=PATH, if it listens elsewhere",
        )
    except PermissionError:
        return Unreachable(
            f"{head}: you may not enter its directory", "run it as the user whose vllmd it is, or with sudo"
        )
    except OSError as wrong:
        return Unreachable(f"{head}: {wrong.strerror}")
    if not stat.S_ISSOCK(info.st_mode):
        return Unreachable(f"{head}: that is not a socket")
    match error:
        case PermissionError():
            return Unreachable(
                f"{head}: permission denied ({_owner(info)})",
                "sudo usermod -aG vllmd $USER, then log in again",
                "or run it with sudo",
            )
        case ConnectionRefusedError():
            return Unreachable(
                f"{head}: the file is there, but nobody listens: vllmd has ended", start, "journalctl -u vllmd -n 50"
            )
    return Unreachable(f"{head}: {error.strerror or error}")


def _owner(info: object) -> str:
    """ "root:vllmd 0660" of a stat result, ids where there is no name."""
    import grp
    import pwd

    uid, gid, mode = getattr(info, "st_uid", 0), getattr(info, "st_gid", 0), getattr(info, "st_mode", 0)
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    try:
        group = grp.getgrgid(gid).gr_name
    except KeyError:
        group = str(gid)
    return f"owner {user}, group {group}, mode {mode & 0o777:04o}"
