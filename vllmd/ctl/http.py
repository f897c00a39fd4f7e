"""Reading HTTP/1.1 answers and server-sent events, as they come in, byte by byte if need be. No I/O.

The standard library's http.client costs 30 ms of imports; this is the part of it that one trusted server needs.
Whatever is not HTTP raises Garbled.
"""

from vllmd.ctl.faults import Garbled

HEAD_LIMIT = 64 << 10
LINE_LIMIT = 64 << 20  # one event may be a status with hundreds of models


class Response:
    """One answer: feed it what the socket gives, get what of it is body."""

    __slots__ = ("_buffer", "_left", "_state", "headers", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._buffer = b""
        self._state = "head"
        self._left = 0  # bytes of body or chunk still to come

    @property
    def begun(self) -> bool:
        """The head is complete: status and headers are known."""
        return self._state != "head"

    @property
    def done(self) -> bool:
        """The body is complete."""
        return self._state == "done"

    def feed(self, data: bytes) -> bytes:
        """Body bytes that `data` completes. Raises Garbled."""
        self._buffer += data
        body: list[bytes] = []
        while self._step(body):
            pass
        return b"".join(body)

    def end(self) -> None:
        """The connection is closed. Raises Garbled if that cuts the answer short."""
        if self._state == "close":
            self._state = "done"
        if self._state != "done":
            raise Garbled("cannot read the answer of vllmd: the connection broke in the middle of it")

    def _step(self, body: list[bytes]) -> bool:
        """One move of the machine; False when it needs more bytes."""
        match self._state:
            case "head":
                return self._head()
            case "close":
                body.append(self._buffer)
                self._buffer = b""
                return False
            case "length" | "chunk":
                taken = self._buffer[: self._left]
                body.append(taken)
                self._buffer = self._buffer[len(taken) :]
                self._left -= len(taken)
                if self._left == 0:
                    self._state = "done" if self._state == "length" else "after"
                return self._left == 0
            case "after" | "size" | "trailer":
                return self._line()
        return False

    def _head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if not b"HTTP/1.".startswith(self._buffer[:7]) or (end < 0 and len(self._buffer) > HEAD_LIMIT):
            raise Garbled("cannot read the answer of vllmd: it is not HTTP (does something else listen there?)")
        if end < 0:
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        self._buffer = self._buffer[end + 4 :]
        words = first.split(" ", 2)
        if len(words) < 2 or not (words[1].isascii() and words[1].isdigit()) or len(words[1]) != 3:
            raise Garbled("cannot read the answer of vllmd: its first line is not HTTP")
        self.status = int(words[1])
        self.headers = {name.strip().lower(): value.strip() for name, _, value in (at.partition(":") for at in lines)}
        length = self.headers.get("content-length")
        if self.status in (204, 304):
            self._state = "done"
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._state = "size"
        elif length is None:
            self._state = "close"
        else:
            self._left = _number(length, 10)
            self._state = "length" if self._left else "done"
        return True

    def _line(self) -> bool:
        """Between chunks: the end of one, the size of the next, or what follows the last."""
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_LIMIT:
                raise Garbled("cannot read the answer of vllmd: endless line between chunks")
            return False
        line = self._buffer[:end].decode("latin-1")
        self._buffer = self._buffer[end + 2 :]
        match self._state:
            case "after":
                if line:
                    raise Garbled("cannot read the answer of vllmd: a chunk is longer than it says")
                self._state = "size"
            case "size":
                self._left = _number(line.partition(";")[0].strip(), 16)
                self._state = "chunk" if self._left else "trailer"
            case "trailer" if not line:
                self._state = "done"
        return True


def _number(text: str, base: int) -> int:
    """A length. int() alone would take signs, underscores and other scripts' digits."""
    digits = "0123456789abcdef"[:base]
    if not 0 < len(text) <= 15 or any(letter not in digits for letter in text.lower()):
        raise Garbled("cannot read the answer of vllmd: a length is not a number")
    return int(text, base)


class Event:
    """One server-sent event; `kind` is "" for a keepalive comment."""

    __slots__ = ("data", "id", "kind")

    def __init__(self, kind: str, data: str, ident: str) -> None:
        self.kind = kind
        self.data = data
        self.id = ident


class EventReader:
    """Bytes to events. An event is whole when its blank line is there; comments come out as kind ""."""

    __slots__ = ("_buffer", "_data", "_kind", "id")

    def __init__(self) -> None:
        self.id = ""
        self._kind = ""
        self._data: list[str] = []
        self._buffer = b""

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes. Raises Garbled on an endless line."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > LINE_LIMIT:
            raise Garbled("cannot read the events of vllmd: a line has no end")
        events = []
        for raw in lines:
            line = raw.rstrip(b"\r").decode("utf-8", "replace")
            if line.startswith(":"):
                events.append(Event("", line[1:].strip(), self.id))
            elif line:
                self._field(line)
            elif self._data:
                events.append(Event(self._kind or "message", "\n".join(self._data), self.id))
                self._kind, self._data = "", []
            else:
                self._kind = ""
        return events

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "event":
                self._kind = value
            case "data":
                self._data.append(value)
            case "id":
                self.id = value
