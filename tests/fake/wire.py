"""How the processes of the fake talk: JSON values, one a line, over a socket pair between each two neighbours."""

import json
import os
import signal
import socket
from collections.abc import Callable
from typing import Any


class Line:
    """One end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rest = b""

    def say(self, **message: Any) -> None:
        """Send one; a partner who is gone is no error here, reading tells."""
        try:
            self.sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def hear(self) -> list[dict[str, Any]]:
        """What has come, at least one message; [] at the end of the stream. Blocks."""
        while True:
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionError:
                return []
            if not data:
                return []
            *lines, self.rest = (self.rest + data).split(b"\n")
            if lines:
                return [json.loads(line) for line in lines]


def fork(run: Callable[[Line], None], *inherited: Line) -> tuple[int, Line]:
    """A child process that runs `run` and exits 1 should that return; its pid and our end of the line to it.

    `inherited` are closed in the child: an end left open there would keep its partner from seeing ours close.
    """
    ours, theirs = socket.socketpair()
    if pid := os.fork():
        theirs.close()
        return pid, Line(ours)
    for line in (Line(ours), *inherited):
        line.sock.close()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        run(Line(theirs))
    finally:
        os._exit(1)
