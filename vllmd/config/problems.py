"""What is wrong with a configuration, in words that name the place and the way out.

Problems are collected, never thrown one by one: whoever mends a file wants all of them at once.
"""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

#: The way to a value: ("models", "ocr", "vram"); an int is a position in an array.
Key = tuple[str | int, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake. `line` 0 = the file as a whole; `key` is the dotted path, "" = not about one key."""

    file: str
    line: int
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        key = f"{self.key}: " if self.key else ""
        return f"{place}: {key}{self.message}" + (f" ({self.hint})" if self.hint else "")


class ConfigError(Exception):
    """A configuration that cannot be used. `problems` holds every one of all its files, by file and line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems)))
        super().__init__("\n".join(map(str, self.problems)))


class Substituted(str):
    """A string in which ${...} was filled in. `raw` is what the file says: messages show that, never the value."""

    __slots__ = ("raw",)
    raw: str

    @classmethod
    def of(cls, value: str, raw: str) -> "Substituted":
        made = cls(value)
        made.raw = raw
        return made


def spell(path: Key) -> str:
    """A path as one would write it in TOML: models."a b".listen[0]. A part's tail after NUL is a parser's mark."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part.partition("\0")[0]
            text += ("." if text else "") + (name if _BARE.fullmatch(name) else _quoted(name))
    return text


def quote(value: Any) -> str:
    """A value for a message, short, and without what a substitution put into it."""
    match value:
        case Substituted():
            text = _quoted(value.raw)
        case bool():
            text = str(value).lower()
        case str():
            text = _quoted(value)
        case dict():
            return "a table"
        case list():
            return "an array"
        case _:
            text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _quoted(text: str) -> str:
    """In quotes, with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in json.dumps(text, ensure_ascii=False))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was surely meant to be, if there is one."""
    if len(name) > 60:
        return None
    spellings = {k.lower().replace("-", "_"): k for k in known}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), spellings, n=1, cutoff=0.6)
    return spellings[found[0]] if found else None
