"""The bytes of one file -> a Layer: what it says, where, and every syntax error in it.

tomli stops at the first error. So that a second one, and all the other mistakes, are reported in the same run, the
statement with the error is mended in memory and the text parsed again: its value becomes a mark, a broken header keeps
the name that can be guessed. Of several mends the one that lets tomli get furthest wins. What was marked is reported
once and then forgotten, so that no mistake is made up.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import tomli

from vllmd.config.positions import positions, statements
from vllmd.config.problems import Key, Problem, spell
from vllmd.config.syntax import explain

MAX_BYTES: Final = 1 << 19
_DEPTH: Final = 24
_TRIES: Final = 40
_EFFORT: Final = 1 << 20  # characters to parse again and again before giving up on a broken text
_MARK: Final = '"\\u0000"'  # stands for a value that could not be parsed; as TOML
_BROKEN: Final = "\0"  # the same, as parsed
_END: Final = 1 << 60  # a line beyond every file: nothing was wrong
_STRANGE: Final = re.compile("[\udc80-\udcff]")
_HEADER: Final = re.compile(r"\s*\[\[?\s*([^\]#]*)")
_NAME: Final = r"(?:[A-Za-z0-9_-]+|\"[^\"\\\n]*\"|'[^'\n]*')"
_DOTTED: Final = re.compile(rf"\s*({_NAME}(?:\s*\.\s*{_NAME})*)")


class _Attempt(NamedTuple):
    """A text as far as tomli gets with it: `error` is the line where it stopped, _END if nowhere; `column` from 0."""

    lines: list[str]
    error: int
    message: str = ""
    column: int = 0
    data: dict[str, Any] = {}  # noqa: RUF012


class _Mend(NamedTuple):
    """A text that was changed so as to get further, and the line that was. `torn` = the line is lost."""

    lines: list[str]
    line: int
    torn: bool


@dataclass
class Layer:
    """One file. `holes` are keys whose value could not be parsed; `torn` = something is missing, nobody knows what."""

    file: str
    folder: Path
    data: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    holes: set[Key] = field(default_factory=set)
    torn: bool = False
    text: str = ""

    @cached_property
    def lines(self) -> dict[Key, int]:
        return positions(self.text)

    def line(self, path: Key) -> int:
        """The line of a key, or of the nearest table around it; 0 where there is none."""
        return next((self.lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.lines), 0)


def parse(content: bytes, file: str, folder: Path) -> Layer:
    """The layer that `content` is. Raises nothing: what is wrong is in its problems."""
    layer = Layer(file, folder)
    if len(content) > MAX_BYTES:
        layer.problems.append(Problem(file, 0, "", "is longer than 512 KiB"))
        layer.torn = True
        return layer
    try:
        text = content.decode()
    except UnicodeDecodeError as exc:
        _read_strange(content, exc.start, layer)
    else:
        _recover(_plain(text), layer)
    return layer


def _plain(text: str) -> str:
    """The text without what only other systems write."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _read_strange(content: bytes, first: int, layer: Layer) -> None:
    """Fill the layer from bytes that are not UTF-8: one problem, at the `first` of them, and what the other lines say."""
    wrong = Problem(layer.file, content.count(b"\n", 0, first) + 1, "", "is not UTF-8", "save the file as UTF-8")
    if b"\0" in content:  # UTF-16, or no text at all
        layer.problems.append(wrong)
        layer.torn = True
        return
    odd = {number for number, line in enumerate(content.split(b"\n"), 1) if not line.isascii() and not _utf8(line)}
    # "_" is a letter of names and values alike: what follows it on other lines can still be checked.
    _recover(_plain(_STRANGE.sub("_", content.decode(errors="surrogateescape"))), layer)
    layer.problems = [wrong, *(problem for problem in layer.problems if problem.line not in odd)]
    lines = layer.text.split("\n")
    keys = {at: path for at, path in statements(layer.text).items() if not lines[at - 1].lstrip().startswith("[")}
    layer.holes |= {path for at, path in keys.items() if at in odd and path}


def _utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _recover(text: str, layer: Layer) -> None:
    """Fill the layer with what `text` says, its broken statements mended, and their problems."""
    now = _attempt(text.split("\n"))
    errors: list[Problem] = []
    tries = max(4, min(_TRIES, _EFFORT // (len(text) + 1)))
    while now.error < _END and len(errors) < tries:
        known = statements("\n".join(now.lines))
        start = max((line for line in known if line <= now.error), default=now.error)
        mends = [(mend, _attempt(mend.lines)) for mend in _mends(now.lines, start, now.error)]
        mend, after = max(mends, key=lambda pair: pair[1].error)
        said = explain(now.message, now.lines[now.error - 1], now.column, mend.line < now.error)
        path = known.get(start, ()) if said.path is None else said.path
        errors.append(Problem(layer.file, now.error if said.here else mend.line, spell(path), said.message, said.hint))
        layer.torn |= mend.torn and not now.message.startswith("Cannot")  # what stands twice is not lost
        now = after
    layer.text = "\n".join(now.lines)
    if now.error < _END:
        said = explain(now.message, now.lines[now.error - 1], now.column, False)
        errors.append(Problem(layer.file, now.error, "", said.message, said.hint))
        layer.torn = True
    elif deep := _too_deep(now.data):
        layer.problems.append(Problem(layer.file, layer.line(deep), spell(deep[:3]), "is nested too deeply"))
        layer.torn = True
    else:
        layer.data = now.data
    if errors:
        layer.problems += errors
        _prune(layer.data, (), layer.holes)


def _attempt(lines: list[str]) -> _Attempt:
    text = "\n".join(lines)
    try:
        return _Attempt(lines, _END, data=tomli.loads(text))
    except tomli.TOMLDecodeError as exc:
        place = exc.pos
        if exc.msg.startswith("Expected \"'"):  # a string that ends nowhere: it began with the last of its quotes
            place = text.rfind(exc.msg.removeprefix("Expected ").strip('"'))
        line = min(text.count("\n", 0, place) + 1, len(lines))
        return _Attempt(lines, line, exc.msg, place - text.rfind("\n", 0, place) - 1)
    except (RecursionError, ValueError) as exc:
        # Hundreds of brackets, or a number of thousands of digits: tomli does not say where.
        line = max(range(len(lines)), key=lambda at: len(lines[at])) + 1
        words = "is nested too deeply" if isinstance(exc, RecursionError) else "the number is too long"
        return _Attempt(lines, line, words)


def _mends(lines: list[str], start: int, error: int) -> Iterator[_Mend]:
    """Texts in which the statement from `start` to the error is changed. Earlier ones lose less."""

    def changed(line: int, text: str, blank: range = range(0)) -> _Mend:
        copy = list(lines)
        copy[line - 1] = text
        for at in blank:
            copy[at - 1] = ""
        return _Mend(copy, line, not text)

    for text in _guesses(lines[start - 1], start):
        yield changed(start, text)
        if start < error - 1:
            yield changed(start, text, range(start + 1, error))
    if start < error:
        yield changed(error, "")
        yield changed(start, next(_guesses(lines[start - 1], start)), range(start + 1, error + 1))


def _guesses(line: str, number: int) -> Iterator[str]:
    """What could stand instead of a broken line: the header or key that it seems to have, in the end nothing."""
    if header := _HEADER.match(line):
        name = header[1].strip()
        yield f"[{name}]"
        section, dot, rest = name.partition(".")
        # The second table of a name is checked like the first; what follows NUL is cut off in messages.
        twin = rest.strip().strip("\"'").replace("\\", "").replace('"', "")
        if not rest.strip().endswith((".args", ".env", ".restart")):  # what is in those is no key of a model
            yield f'[{section}."{twin}\\u0000{number}"]' if dot else f'["\\u0000{number}"]'
        yield f'["\\u0000{number}"]'
    elif key := _DOTTED.match(line):
        yield f"{key[1]} = {_MARK}"
    yield ""


def _too_deep(data: dict[str, Any]) -> Key | None:
    """The path of something nested more deeply than any key of ours, found without recursion."""
    left: list[tuple[Key, Any]] = [((), data)]
    while left:
        path, value = left.pop()
        if len(path) > _DEPTH:
            return path
        if isinstance(value, dict | list):
            left += [((*path, key), v) for key, v in (value.items() if isinstance(value, dict) else enumerate(value))]
    return None


def _prune(table: dict[str, Any], at: Key, holes: set[Key]) -> None:
    """Drop the marks of mended statements, noting where they stood."""
    for key, value in list(table.items()):
        if value == _BROKEN or (key.startswith(_BROKEN) and not at):
            del table[key]
            holes.add((*at, key))
        elif isinstance(value, dict):
            _prune(value, (*at, key), holes)
