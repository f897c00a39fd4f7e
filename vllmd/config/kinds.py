"""Kinds of values: how each is read from what TOML gives, what it is called in a message, and its JSON Schema.

A reader returns the typed value or raises Bad with every fault it found. It never asks the machine: whether a path
exists or a port is free is not the configuration's business.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vllmd.config.problems import Key, Substituted, quote
from vllmd.spec import Share
from vllmd.units import TIB, parse_duration, parse_size, spell_size

SUBSTITUTION: Final = r".*\$\{.*"
ROOT: Final = Path("/")
MAX_SIZE: Final = 1024 * TIB


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a value, or with the part of it at `at`."""

    message: str
    hint: str = ""
    at: Key = ()


class Bad(Exception):
    """A value cannot be used."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__(faults)
        self.faults = faults


def bad(message: str, hint: str = "") -> Bad:
    return Bad(Fault(message, hint))


@dataclass(frozen=True, slots=True)
class Place:
    """What a path may be relative to: the folder of the file it stands in, and the user's home."""

    folder: Path
    home: Path


@dataclass(frozen=True, slots=True)
class Kind:
    """`expects` completes "a value is ..."; `read` gives the typed value or raises Bad."""

    expects: str
    schema: dict[str, Any]
    read: Callable[[Any, Place], Any]


def text(value: Any, what: str = "a string") -> str:
    """`value` as a string that an argument or a variable can hold. Raises Bad."""
    if not isinstance(value, str):
        simple = isinstance(value, int | float)
        raise bad(f"{quote(value)} is not {what}", f'try "{quote(value)}"' if simple else "")
    if any((ord(c) < 32 and c not in "\t\n") or ord(c) == 127 for c in value):
        raise bad("holds a control character")
    return value


def each(values: Iterable[Any], read: Callable[[Any], Any]) -> tuple[Any, ...]:
    """All values read, or one Bad with the faults of all, each at its index."""
    done: list[Any] = []
    faults: list[Fault] = []
    for at, value in enumerate(values):
        try:
            done.append(read(value))
        except Bad as exc:
            faults += [Fault(f.message, f.hint, (at, *f.at)) for f in exc.faults]
        else:
            if done[-1] in done[:-1]:
                faults.append(Fault(f"{quote(value)} stands here twice", at=(at,)))
    if faults:
        raise Bad(*faults)
    return tuple(done)


def measure(value: Any, parse: Callable[[str], float], what: str, example: str) -> Any:
    """A number with a unit. A substituted value stays out of the message."""
    if isinstance(value, Substituted):
        try:
            return parse(value)
        except (ValueError, OverflowError):
            raise bad(f"{quote(value)} does not become {what}", f'such as "{example}"') from None
    if not isinstance(value, str):
        raise bad(f"{quote(value)} is not {what}", f'try "{example}"')
    try:
        return parse(value)
    except OverflowError:
        raise bad(f"{quote(value)} is too large") from None
    except ValueError as exc:
        hint = str(exc).rpartition(" (")[2].removesuffix(")")
        raise bad(f"{quote(value)} is not {what}", hint) from None


def ranged(value: Any, low: float, high: float, spelled: tuple[str, str]) -> Any:
    if not low <= value <= high:
        raise bad(f"out of range: must be from {spelled[0]} to {spelled[1]}")
    return value


# -- numbers ----------------------------------------------------------------------------------------------------------


def read_size(value: Any, least: int = 1) -> int:
    """Bytes. A bare number is refused: nobody knows its unit."""
    example = "9GiB"
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        example = spell_size(value) if 1 << 20 <= value <= MAX_SIZE else f"{min(value, 999)}GiB"
    size: int = measure(value, parse_size, "a size", example)
    return int(ranged(size, least, MAX_SIZE, (spell_size(least), spell_size(MAX_SIZE))))


def size(auto: bool = False, least: int = 1) -> Kind:
    """A size; with `auto` also "auto", which reads as None."""

    def read(value: Any, _: Place) -> int | None:
        return None if auto and value == "auto" else read_size(value, least)

    pattern = r"\d+(\.\d+)?([KMGT]i?)?B" + ("|auto" if auto else "")
    expects = 'a size ("9GiB", "512MiB")' + (' or "auto"' if auto else "")
    return Kind(expects, {"type": "string", "pattern": f"^({pattern}|{SUBSTITUTION})$"}, read)


def duration(low: str = "0s", high: str = "366d", off: bool = False) -> Kind:
    """Seconds, within bounds; with `off` also "off", which reads as None."""
    least, most = parse_duration(low), parse_duration(high)

    def read(value: Any, _: Place) -> float | None:
        if off and value == "off":
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        seconds = measure(value, parse_duration, "a duration", f"{value}s" if number else "180s")
        return float(ranged(seconds, least, most, (low, high)))

    pattern = r"(\d+(\.\d+)?(ms|min|s|m|h|d))+" + ("|off" if off else "")
    expects = f'a duration ("30s", "10m") from {low} to {high}' + (', or "off"' if off else "")
    return Kind(expects, {"type": "string", "pattern": f"^({pattern}|{SUBSTITUTION})$"}, read)


def whole(low: int, high: int, words: tuple[tuple[str, Any], ...] = ()) -> Kind:
    """A whole number within bounds, or one of `words` with what it means."""
    meaning = dict(words)
    expects = " or ".join([f"a whole number from {low} to {high}", *map(quote, meaning)])

    def read(value: Any, _: Place) -> Any:
        if isinstance(value, str) and value in meaning:
            return meaning[value]
        if not isinstance(value, int) or isinstance(value, bool):
            digits = isinstance(value, str) and not isinstance(value, Substituted) and value.isdecimal()
            raise bad(f"{quote(value)} is not {expects}", f"try {int(str(value)[:19])}" if digits else "")
        return ranged(value, low, high, (str(low), str(high)))

    number: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": high}
    return Kind(expects, {"anyOf": [number, {"enum": list(meaning)}]} if meaning else number, read)


def read_vram(value: Any, _: Place) -> int | Share | None:
    """Bytes, a part of the device's budget, or None for "auto"."""
    if value == "auto":
        return None
    part = value
    if isinstance(value, str) and re.fullmatch(r"\d{1,3}(\.\d{1,3})?%", value, re.ASCII):
        part = float(value[:-1]) / 100
    if isinstance(part, float):
        if not 0 < part <= 1:
            raise bad(f"{quote(value)} is not a part of the budget", 'from "1%" to "100%", or 0.01 to 1.0')
        return Share(part)
    return read_size(value)


# -- words ------------------------------------------------------------------------------------------------------------


def read_bool(value: Any, _: Place) -> bool:
    if not isinstance(value, bool):
        word = value.lower() if isinstance(value, str) and not isinstance(value, Substituted) else value
        hint = {"true": "true", "yes": "true", "on": "true", 1: "true", "false": "false", "no": "false", 0: "false"}
        known = isinstance(word, str | int) and hint.get(word)
        raise bad(f"{quote(value)} is not true or false", f"try {known}" if known else "")
    return value


def choice(*words: str) -> Kind:
    expects = ", ".join(map(quote, words[:-1])) + " or " + quote(words[-1])

    def read(value: Any, _: Place) -> str:
        if value not in words:
            raise bad(f"{quote(value)} is not one of them", expects)
        return str(value)

    return Kind(expects, {"enum": list(words)}, read)


SIZE, SIZE_OR_AUTO = size(), size(auto=True)
VRAM = Kind(
    'a size ("9GiB"), a part of the budget ("50%" or 0.5), or "auto"',
    {
        "anyOf": [
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            {"type": "string", "pattern": rf"^(\d+(\.\d+)?(([KMGT]i?)?B|%)|auto|{SUBSTITUTION})$"},
        ]
    },
    read_vram,
)
BOOL = Kind("true or false", {"type": "boolean"}, read_bool)
PORT = whole(1024, 65535, (("auto", 0),))
