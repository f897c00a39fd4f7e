"""Kinds of values that name something: models, categories, paths, commands, devices, addresses."""

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from vllmd.config.kinds import SUBSTITUTION, Kind, Place, bad, each, ranged, text
from vllmd.config.problems import Substituted, quote

MODEL_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
NAME_RULE: Final = "lower-case letters, digits, ., _ and -, at most 63, the first a letter or digit"
_CATEGORY: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,30}")
ALIAS: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,126}")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_DEVICE: Final = re.compile(r"\d{1,3}|cpu|(GPU|MIG)-[A-Za-z0-9./-]{1,80}", re.ASCII)
_HOST: Final = re.compile(r"[a-z0-9]([a-z0-9._-]{0,251}[a-z0-9])?", re.ASCII)
_ORIGIN: Final = re.compile(r"https?://[a-z0-9._\[\]:-]{1,260}", re.ASCII)
_LISTEN: Final = re.compile(r"(\[[^]]*\]|[^][:]*):(\d{1,6})", re.ASCII)


def read_name(name: str) -> str:
    """The name of a model. Raises Bad with the rule, and with the name that was surely meant."""
    if not MODEL_NAME.fullmatch(name):
        meant = likely_name(name)
        raise bad(f"{quote(name)} is not a model's name", NAME_RULE + (f"; try {quote(meant)}" if meant else ""))
    return name


def likely_name(written: str) -> str:
    """The name of a model that comes closest to what was written; "" if none does."""
    small = "-".join(written.lower().split())
    return small if MODEL_NAME.fullmatch(small) else ""


def word(pattern: re.Pattern[str], what: str) -> Callable[[Any], str]:
    """A reader of a string that matches; names the lower-case spelling where that alone is missing."""

    def read(value: Any) -> str:
        string = text(value, what)
        if not pattern.fullmatch(string):
            fits = pattern.fullmatch(string.lower()) and not isinstance(string, Substituted)
            raise bad(f"{quote(value)} is not {what}", f"try {quote(string.lower())}" if fits else "")
        return str(string)

    return read


def words(pattern: re.Pattern[str], what: str, expects: str) -> Kind:
    """A list of such strings, or a single one."""

    def read(value: Any, _: Place) -> tuple[str, ...]:
        if isinstance(value, list):
            return each(value, word(pattern, what))
        return (word(pattern, what)(value),)

    one = {"type": "string", "pattern": f"^({pattern.pattern}|{SUBSTITUTION})$"}
    return Kind(expects, {"anyOf": [one, {"type": "array", "items": one}]}, read)


def anchor(value: str, place: Place) -> Path:
    """An absolute path: "~" is one's home, anything relative starts at the file's folder. Raises Bad for "~other"."""
    if value == "~" or value.startswith("~/"):
        return place.home / value[2:]
    if value.startswith("~"):
        raise bad(f"{quote(value)}: only one's own home can be written with ~", "write the whole path")
    return place.folder / value


def read_path(value: Any, place: Place) -> Path:
    if not text(value, "a path"):
        raise bad("a path cannot be empty")
    return anchor(value, place)


def read_model(value: Any, place: Place) -> str:
    """A hub id as it is, a path as an absolute one."""
    string = text(value, "a hub id or a path")
    if string in (".", "..") or string.startswith(("/", "./", "../", "~")):
        return str(anchor(string, place))
    if not _HUB_ID.fullmatch(string):
        hint = "owner/name, ./folder or /folder"
        raise bad(f"{quote(value)} is neither a hub id nor a path", hint)
    return str(string)


def read_command(value: Any, place: Place) -> str:
    """The name of a command, or a path where there is a slash in it."""
    string = text(value, "a command or a path")
    if not string or string.startswith("-"):
        raise bad(f"{quote(value)} is not a command or a path", 'try "vllm"')
    return str(anchor(string, place)) if "/" in string or string.startswith("~") else str(string)


# -- devices, replicas, addresses -------------------------------------------------------------------------------------


def read_device(value: Any) -> str:
    """An index, a UUID or "cpu" as a string."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1000:
        return str(value)
    if isinstance(value, str) and _DEVICE.fullmatch(value):
        return str(value)
    raise bad(f"{quote(value)} is not a device", 'an index, a UUID ("GPU-...", "MIG-...") or "cpu"')


def read_gpus(value: Any, _: Place) -> int | tuple[str, ...] | None:
    if value == "auto":
        return None
    if isinstance(value, list) and value:
        names = each(value, read_device)
        if "cpu" in names and len(names) > 1:
            raise bad('"cpu" cannot be mixed with GPUs')
        return names
    if isinstance(value, int) and not isinstance(value, bool):
        return int(ranged(value, 1, 64, ("1", "64")))
    one = isinstance(value, str) and not isinstance(value, Substituted) and _DEVICE.fullmatch(value)
    hint = f"try [{quote(value)}]" if one else '"auto", a count, or a list of indices and UUIDs'
    raise bad(f"{quote(value) if value != [] else 'an empty list'} does not name GPUs", hint)


def read_replicas(value: Any, _: Place) -> tuple[int, int]:
    """(min, max); a single number is both."""
    numbers = {"min": value, "max": value} if not isinstance(value, dict) else value
    strange = set(numbers) - {"min", "max"}
    if strange or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers.values()):
        raise bad(f"{quote(value)} is not a number of replicas", "a whole number, or { min = 1, max = 2 }")
    low, high = numbers.get("min", 1), numbers.get("max", max(1, numbers.get("min", 1)))
    if not (0 <= low <= high and 1 <= high <= 64):
        raise bad("out of range: 0 <= min <= max, and max from 1 to 64")
    return low, high


def read_listen(value: Any, _: Place) -> tuple[tuple[str, int], ...]:
    """(host, port) of each address. Port 0 = any free one."""
    if not isinstance(value, list):
        hint = f"try [{quote(value)}]" if isinstance(value, str) else 'try ["127.0.0.1:8400"]'
        raise bad(f"{quote(value)} is not a list of addresses", hint)
    return each(value, read_address)


def read_address(value: Any) -> tuple[str, int]:
    match = _LISTEN.fullmatch(text(value, "an address"))
    if not match or int(match[2]) > 65535:
        raise bad(f"{quote(value)} is not an address", '"127.0.0.1:8400" or "[::1]:8400"')
    host, port = match[1].strip("[]"), int(match[2])
    host = "127.0.0.1" if host == "localhost" else host
    try:
        if host:  # without one: all addresses
            ipaddress.ip_address(host)
    except ValueError:
        raise bad(f"{quote(value)} is not an address", 'an IP address: "127.0.0.1:8400" or "[::1]:8400"') from None
    return host, port


def is_loopback(host: str) -> bool:
    """Whether only this machine can come in there."""
    return bool(host) and ipaddress.ip_address(host).is_loopback


def read_host(value: Any) -> str:
    """A name under which a machine is asked."""
    string = text(value, "a host's name").lower()
    if not _HOST.fullmatch(string):
        raise bad(f"{quote(value)} is not a host's name", 'such as "models.example.org", without a port')
    return str(string)


def read_origin(value: Any) -> str:
    """Scheme, host and port of a page, as browsers say it."""
    string = text(value, "an origin").lower().rstrip("/")
    if not _ORIGIN.fullmatch(string):
        raise bad(f"{quote(value)} is not an origin", 'such as "https://ui.example.org"')
    return str(string)


def listing(read: Callable[[Any], Any], what: str) -> Kind:
    """A list of such values."""

    def read_list(value: Any, _: Place) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise bad(f"{quote(value)} is not {what}", f"try [{quote(value)}]" if isinstance(value, str) else "")
        return each(value, read)

    return Kind(what, {"type": "array", "items": {"type": "string"}}, read_list)


STRING = Kind("a string", {"type": "string"}, lambda value, _: str(text(value)))
PATH = Kind("a path", {"type": "string", "minLength": 1}, read_path)
MODEL = Kind("a hub id (owner/name) or a path (./folder, /folder)", {"type": "string", "minLength": 1}, read_model)
COMMAND = Kind("a command or a path", {"type": "string", "minLength": 1}, read_command)
CATEGORIES = words(_CATEGORY, "a category in lower case", "a list of categories")
ENVIRONMENT = Kind(
    "the name of an environment",
    {"type": "string", "pattern": MODEL_NAME.pattern},
    lambda value, _: word(MODEL_NAME, "the name of an environment")(value),
)
_DEVICE_SCHEMA: Final[dict[str, Any]] = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}
GPUS = Kind(
    '"auto", a count, or a list of indices and UUIDs',
    {
        "anyOf": [
            {"const": "auto"},
            {"type": "integer", "minimum": 1, "maximum": 64},
            {"type": "array", "minItems": 1, "items": _DEVICE_SCHEMA},
        ]
    },
    read_gpus,
)
_COUNT: Final = {"type": "integer", "minimum": 0, "maximum": 64}
_RANGE: Final = {"type": "object", "properties": {"min": _COUNT, "max": _COUNT}, "additionalProperties": False}
REPLICAS = Kind(
    "a whole number, or { min, max }",
    {"anyOf": [_COUNT, _RANGE]},
    read_replicas,
)
LISTEN = Kind('a list of addresses ("127.0.0.1:8400")', {"type": "array", "items": {"type": "string"}}, read_listen)
HOSTS = listing(read_host, 'a list of host names ("models.example.org")')
ORIGINS = listing(read_origin, 'a list of origins ("https://ui.example.org")')
