"""The terminal while something is kept on it: alternate screen, single keys, and both given back however it ends."""

from __future__ import annotations

import os
import signal
import sys
import termios
import tty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
NAMED = {
    "\x1b[A": "up", "\x1bOA": "up", "\x1b[B": "down", "\x1bOB": "down", "\x1b": "escape", "\r": "enter", "\n": "enter",
    "\x7f": "backspace", "\x08": "backspace", "\x03": "quit", "\x04": "quit",
}  # fmt: skip


class Ended(BaseException):
    """A signal asks us to end; a BaseException like KeyboardInterrupt, so that nothing on the way swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Screen:
    """A context manager; `keys` is the descriptor to wait on, None where nobody can type."""

    def __init__(self) -> None:
        self.keys: int | None = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._modes: list[Any] | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Screen:
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._old[number] = signal.signal(number, _end)
        self._old[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        self._give_back()

    def draw(self, lines: list[str]) -> None:
        """Show `lines`, each shorter than the screen is wide. Written over the old ones, so that nothing flickers."""
        coding = sys.stdout.encoding or "ascii"
        text = "\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[K\x1b[J"
        sys.stdout.write(text.encode(coding, "replace").decode(coding))
        sys.stdout.flush()

    def read(self) -> list[str]:
        """The keys that were pressed: "up", "enter", "quit" ..., or the character."""
        if self.keys is None:
            return []
        data = os.read(self.keys, 1024)
        if not data:  # the terminal is gone
            return ["quit"]
        return split_keys(data.decode("utf-8", "ignore"))

    def _take(self) -> None:
        if self.keys is not None:
            self._modes = termios.tcgetattr(self.keys)
            tty.setcbreak(self.keys, termios.TCSADRAIN)
        sys.stdout.write(ENTER)
        sys.stdout.flush()

    def _give_back(self) -> None:
        try:
            sys.stdout.write(LEAVE)
            sys.stdout.flush()
            if self.keys is not None and self._modes is not None:
                termios.tcsetattr(self.keys, termios.TCSADRAIN, self._modes)
        except (OSError, termios.error):
            pass  # the terminal is gone

    def _pause(self, _number: int, _frame: FrameType | None) -> None:
        """Ctrl-Z: the shell gets its screen back, and we ours when it lets us go on."""
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()


def split_keys(text: str) -> list[str]:
    """Characters and escape sequences as key names; sequences that we do not know are no keys."""
    keys = []
    while text:
        size = 1
        if text[0] == "\x1b" and len(text) > 1 and text[1] in "[O":
            size = 2
            while size < len(text) and not (size > 1 and text[size].isalpha()) and text[size] != "~":
                size += 1
            size += 1
        key, text = text[:size], text[size:]
        if key in NAMED:
            keys.append(NAMED[key])
        elif len(key) == 1 and key.isprintable():
            keys.append(key)
    return keys


def _end(number: int, _frame: FrameType | None) -> None:
    raise Ended(number)
