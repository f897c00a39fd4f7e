"""Strings and numbers of a status as text that is safe and fits: cleaned, measured in columns, cut, with units.

Whatever a daemon, a model or a process name brings along (escape sequences, newlines, text that turns the direction of
writing) leaves here as harmless characters. Numbers that are no numbers count as missing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

GIB = 1 << 30


def clean(value: object) -> str:
    """`value` as one line of printable text; control and direction characters become "\N{REPLACEMENT CHARACTER}"."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    if text.isascii() and text.isprintable():
        return text
    # str.isprintable is false for controls, formats (bidi, zero width), lone surrogates and all spaces but one
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def number(value: object) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and -1e18 < value < 1e18:
        return float(value)
    return None


def field(values: dict[str, Any], key: str) -> float:
    """The number under `key`, 0 where there is none."""
    return number(values.get(key)) or 0.0


def listed(values: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects in the list under `key`; whatever else stands there is left out."""
    found = values.get(key)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def nested(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`, empty where there is none."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def gib(size: float) -> str:
    """ "5.9", to stand before "GiB"."""
    return f"{size / GIB:.1f}"


def sized(size: float) -> str:
    """ "5.0 GiB", "40 MiB": small things must not read as 0.0."""
    return f"{size / (1 << 20):.0f} MiB" if 0 < size < 0.05 * GIB else f"{gib(size)} GiB"


def span(seconds: float) -> str:
    """ "42 s", "12 min", "2 h", "3 d": one unit is enough to know whether to worry."""
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < limit:
            return f"{max(0.0, seconds) / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def exact(seconds: float) -> str:
    """A time that somebody has set: "90 s", "3 min", "100 ms", with nothing rounded away."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1000:g} ms" if 0 < seconds < 1 else f"{seconds:g} s"


def seconds_of(text: str) -> float:
    """Seconds of "90", "90s", "10m", "1h30m", "2d". Raises ValueError with a spelling that works."""
    import re

    if text.isascii() and text.isdigit():
        return float(text)
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|min|s|m|h|d)", text)
    if not parts or "".join(figure + unit for figure, unit in parts) != text:
        raise ValueError(f'"{text}" is not a duration (try "90s", "10m" or "1h30m")')
    return sum(float(figure) * units[unit] for figure, unit in parts)


def width(text: str) -> int:
    """Columns that `text` takes on a terminal: wide characters two, combining ones none."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    return sum(0 if category(c) in ("Mn", "Me") else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def pad(text: str, columns: int, right: bool = False) -> str:
    """`text` filled with spaces to `columns`."""
    space = " " * (columns - width(text))
    return space + text if right else text + space


def clip(text: str, columns: int, dots: str = "…") -> str:
    """`text` cut at its end to fit `columns`."""
    if width(text) <= columns:
        return text
    return _head(text, columns - 1) + dots if columns > 0 else ""


def shorten(text: str, columns: int, dots: str = "…") -> str:
    """`text` cut in its middle to fit `columns`: of a name, the beginning and the end tell models apart."""
    if width(text) <= columns:
        return text
    if columns < 3:
        return clip(text, columns, dots)
    tail = _head(text[::-1], (columns - 1) // 2)[::-1]
    return _head(text, columns - 1 - width(tail)) + dots + tail


def _head(text: str, columns: int) -> str:
    """The longest beginning of `text` that fits."""
    if text.isascii():
        return text[:columns]
    used = 0
    for at, letter in enumerate(text):
        used += width(letter)
        if used > columns:
            return text[:at]
    return text


def wrap(text: str, columns: int, indent: str = "  ") -> list[str]:
    """`text` in lines of at most `columns`, broken between words, later lines indented. No columns, no breaks."""
    if columns <= 0 or width(text) <= columns:
        return [text]
    bare = text.lstrip(" ")
    lines, line = [], text[: len(text) - len(bare)]
    for word in bare.split(" "):
        joined = f"{line} {word}" if line.strip() else line + word
        if line.strip() and width(joined) > columns:
            lines.append(line)
            joined = indent + word
        line = joined
    return [*lines, line]
