"""Bytes of a log -> lines to show. The same bytes give the same lines, however they are cut into reads.

A progress bar is drawn over itself with carriage returns and ends with a newline: while it is drawn its latest state is
given with `progress` set, and once it has ended its last state is an ordinary line. Escape sequences and control
characters go: a log is shown on terminals and in browsers, and a model's output may be in it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

LONGEST = 16 << 10  # bytes of one line

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
# C0 without tab, DEL, C1, and what else starts a new line or turns the direction of writing
_CONTROLS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_ENDS = re.compile(rb"[\r\n]")


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its end. `progress`: a bar's state that will be drawn over."""

    text: str
    progress: bool = False


@dataclass(slots=True)
class Splitter:
    """Takes bytes as they come, gives lines as they end."""

    _now: bytearray = field(default_factory=bytearray)  # since the last \r or \n, at most LONGEST
    _cut: int = 0  # bytes of it that were dropped
    _drawn: str = ""  # the bar's last whole state on this line
    _bar: bool = False  # a \r has been seen on this line
    _shown: str = ""  # the state last given

    def feed(self, data: bytes) -> list[Line]:
        """The lines that ended, and, last, the state of a bar that has changed."""
        lines: list[Line] = []
        at = 0
        for end in _ENDS.finditer(data):
            self._add(data[at : end.start()])
            at = end.end()
            if end[0] == b"\n":
                lines.append(Line(self._take() or self._drawn))
                self._drawn, self._bar, self._shown = "", False, ""
            else:
                self._drawn = self._take() or self._drawn
                self._bar = True
        self._add(data[at:])
        if self._bar and (state := _clean(self._now, self._cut) or self._drawn) != self._shown:
            self._shown = state
            lines.append(Line(state, progress=True))
        return lines

    def end(self) -> list[Line]:
        """What is there without a newline, when no more can come."""
        text = self._take() or self._drawn
        self._drawn, self._bar, self._shown = "", False, ""
        return [Line(text)] if text else []

    def _add(self, data: bytes) -> None:
        room = LONGEST - len(self._now)
        self._now += data[:room]
        self._cut += max(0, len(data) - room)

    def _take(self) -> str:
        text = _clean(self._now, self._cut)
        self._now.clear()
        self._cut = 0
        return text


def split(data: bytes) -> list[str]:
    """All lines of a whole piece of log."""
    splitter = Splitter()
    return [line.text for line in [*splitter.feed(data), *splitter.end()] if not line.progress]


def _clean(data: Iterable[int], cut: int) -> str:
    text = _CONTROLS.sub("", _ESCAPES.sub("", bytes(data).decode(errors="replace"))).rstrip()
    return f"{text} [... {cut} bytes cut]" if cut else text
