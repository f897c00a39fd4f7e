"""Where each key of a TOML text stands. tomli tells what a file says but not where, and a message needs the line.

An own small scanner that never fails: on text that is not TOML it goes on at the next line. It decides nothing about
values; where it and tomli disagree, only a line number is wrong.
"""

import re
from bisect import bisect_right
from typing import Final

import tomli

from vllmd.config.problems import Key

_BLANK: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE: Final = re.compile(r"[ \t]*")
_BARE: Final = re.compile(r"[^\s.=\[\]{}\"',#]+")
_STRING: Final = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*(?:"""(?:""?(?!"))?|\Z)'
    r"|'''(?:[^']|'(?!''))*(?:'''(?:''?(?!'))?|\Z)"
    r'|"(?:[^"\\\n]|\\[^\n])*(?:"|(?=\n)|\Z)'
    r"|'[^'\n]*(?:'|(?=\n)|\Z)"
    r"|.",  # a string that ends nowhere: on to what follows its quote
    re.DOTALL,
)
_SCALAR: Final = re.compile(r"[^,\]}#\n]*")
_DEPTH: Final = 40  # length of a path beyond which nothing is noted: else the work would grow with its square


def positions(text: str) -> dict[Key, int]:
    """Key path -> line (from 1), for tables, keys, array elements. A table has the line where it is first mentioned."""
    return _Scan(text).lines


def statements(text: str) -> dict[int, Key]:
    """The line on which each header or key/value pair begins -> the path it names, () if there is none to see."""
    return _Scan(text).starts


class _Scan:
    """One pass over a text. `at` is the next character, `table` the path of the table that keys go to."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.breaks = [m.start() for m in re.finditer("\n", text)]
        self.lines: dict[Key, int] = {}
        self.starts: dict[int, Key] = {}
        self.table: Key = ()
        self.counts: dict[Key, int] = {}  # array of tables -> number of its elements so far
        while self.skip(_BLANK):
            self.statement()

    def line(self) -> int:
        return bisect_right(self.breaks, self.at - 1) + 1

    def skip(self, pattern: re.Pattern[str]) -> bool:
        """Pass over what matches here. False at the end of the text."""
        if match := pattern.match(self.text, self.at):
            self.at = match.end()
        return self.at < len(self.text)

    def next_is(self, sign: str) -> bool:
        return self.text.startswith(sign, self.at)

    def note(self, path: Key, line: int) -> None:
        for end in range(1, min(len(path), _DEPTH) + 1):
            self.lines.setdefault(path[:end], line)

    def statement(self) -> None:
        line = self.line()
        self.starts[line] = ()
        if self.next_is("["):
            double = self.next_is("[[")
            self.at += 2 if double else 1
            self.table = self.element(self.key(), double)
            self.note(self.table, line)
            self.starts[line] = self.table
        elif path := self.key():
            self.note(self.table + path, line)
            self.starts[line] = self.table + path
            self.skip(_SPACE)
            if self.next_is("="):
                self.at += 1
                self.skip(_SPACE)
                self.value(self.table + path)
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end + 1

    def element(self, path: Key, new: bool = False) -> Key:
        """The path with the index of the last element after each array of tables in it; `new` adds an element."""
        full: Key = ()
        for end, part in enumerate(path, 1):
            full = (*full, part)
            if new and end == len(path):
                self.note(full, self.line())
                self.counts[full] = self.counts.get(full, 0) + 1
            if full in self.counts:
                full = (*full, self.counts[full] - 1)
        return full

    def key(self) -> Key:
        """The dotted key here; () if there is none."""
        parts: list[str] = []
        while self.skip(_SPACE):
            if self.next_is('"') or self.next_is("'"):
                start = self.at
                self.skip(_STRING)
                parts.append(_unquote(self.text[start : self.at]))
            elif match := _BARE.match(self.text, self.at):
                parts.append(match[0])
                self.at = match.end()
            self.skip(_SPACE)
            if not self.next_is("."):
                break
            self.at += 1
        return tuple(parts[:_DEPTH])

    def value(self, path: Key) -> None:
        """Pass over the value here, noting what is inside it under `path`."""
        if self.next_is("[") or self.next_is("{"):
            if len(path) < _DEPTH:
                self.members(path, "]" if self.next_is("[") else "}")
            else:
                self.balance()
        elif self.next_is('"') or self.next_is("'"):
            self.skip(_STRING)
        else:
            self.skip(_SCALAR)

    def members(self, path: Key, end: str) -> None:
        """Pass over an array or an inline table. Each round either moves on or leaves."""
        self.at += 1
        index = 0
        while self.skip(_BLANK):
            before = self.at
            if self.next_is(end):
                self.at += 1
                return
            if self.next_is(","):
                self.at += 1
                continue
            if end == "]":
                inner: Key = (*path, index)
                self.note(inner, self.line())
                index += 1
                self.value(inner)
            elif name := self.key():
                self.note(path + name, self.line())
                self.skip(_SPACE)
                if self.next_is("="):
                    self.at += 1
                    self.skip(_SPACE)
                    self.value(path + name)
            if self.at == before:
                return

    def balance(self) -> None:
        """Pass over brackets nested too deeply to follow."""
        level = 0
        while self.at < len(self.text):
            sign = self.text[self.at]
            if sign in "\"'":
                self.skip(_STRING)
                continue
            self.at += 1
            level += (sign in "[{") - (sign in "]}")
            if level == 0:
                return


def _unquote(raw: str) -> str:
    """The text of a quoted key."""
    if "\\" in raw and raw[0] == '"':
        try:
            return str(tomli.loads("key = " + raw)["key"])
        except tomli.TOMLDecodeError:
            pass
    return raw[1:-1]
