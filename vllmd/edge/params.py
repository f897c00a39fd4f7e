"""What a request may carry: parameters, declared once per route, read from the query or a JSON body, checked by kind.

An unknown parameter is refused by name: a misspelt `?folow=1` must not look as if it had worked.
"""

import asyncio
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from aiohttp import web

from vllmd.edge.backend import Refused
from vllmd.units import parse_duration, parse_size

BODY_MAX = 1 << 20  # bytes; the limit that aiohttp's read() has by default
NAMES_MAX = 1000
INTEGER_MAX = 1 << 53  # what a browser's number holds


class Kind(StrEnum):
    """How a parameter is written."""

    FLAG = "flag"  # true, false, 1, 0, yes, no; in a query also nothing at all
    INTEGER = "integer"
    SIZE = "size"  # "6GiB", or a number of bytes
    DURATION = "duration"  # "10m", or a number of seconds
    STRING = "string"
    NAMES = "names"  # a list of strings; in a query separated by commas


class Body(StrEnum):
    """What a route takes as its body."""

    NONE = "none"
    JSON = "json"  # an object with parameters; may be missing
    TOML = "toml"


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter. `default` is what a handler gets when it is not given."""

    name: str
    kind: Kind
    meaning: str
    default: Any = None

    def read(self, value: Any) -> Any:
        """The value in its type. Raises Refused(400)."""
        try:
            return READERS[self.kind](value)
        except (ValueError, TypeError, OverflowError):
            given = json.dumps(value)[:80]
            raise Refused(
                400, "bad-parameter", f"cannot read {self.name} = {given}: it must be {WORDS[self.kind]}"
            ) from None


def read_flag(value: Any) -> bool:
    """True or false from JSON or a query's word."""
    match value.lower() if isinstance(value, str) else value:
        case True | "" | "1" | "true" | "yes":
            return True
        case False | "0" | "false" | "no":
            return False
    raise ValueError(value)


def read_integer(value: Any) -> int:
    """A whole number from 0 to INTEGER_MAX."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,16}", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= INTEGER_MAX:
        return value
    raise ValueError(value)


def read_size(value: Any) -> int:
    """Bytes of "6GiB", "600" or 600; from 0 to INTEGER_MAX."""
    spelt = isinstance(value, str) and re.search(r"[A-Za-z]", value)
    return read_integer(parse_size(value) if spelt else value)


def read_seconds(value: Any) -> float:
    """Seconds of "10m", "600" or 600."""
    if isinstance(value, bool):
        raise ValueError(value)
    spelt = isinstance(value, str) and re.search(r"[a-z]", value)
    seconds = parse_duration(value) if spelt else float(value)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(value)
    return seconds


def read_string(value: Any) -> str:
    """Text of sensible length."""
    if isinstance(value, str) and len(value) <= 1000:
        return value
    raise ValueError(value)


def read_names(value: Any) -> tuple[str, ...]:
    """Names, each once, in their order."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list) and len(value) <= NAMES_MAX:
        return tuple(dict.fromkeys(read_string(name) for name in value))
    raise ValueError(value)


READERS = {
    Kind.FLAG: read_flag,
    Kind.INTEGER: read_integer,
    Kind.SIZE: read_size,
    Kind.DURATION: read_seconds,
    Kind.STRING: read_string,
    Kind.NAMES: read_names,
}
WORDS = {
    Kind.FLAG: "true or false",
    Kind.INTEGER: "a whole number, 0 or more",
    Kind.SIZE: 'a size such as "6GiB", or bytes',
    Kind.DURATION: 'a duration such as "10m", or seconds',
    Kind.STRING: "a text of at most 1000 characters",
    Kind.NAMES: f"a list of at most {NAMES_MAX} names",
}


def read_params(params: Sequence[Param], query: Mapping[str, str], body: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters by name, the body's before the query's, missing ones with their defaults. Raises Refused(400)."""
    known = {param.name: param for param in params}
    given = {**query, **body}
    for name in given:
        if name not in known:
            hint = f"known here: {', '.join(known)}" if known else "this route takes none"
            raise Refused(400, "unknown-parameter", f"unknown parameter {json.dumps(name[:80])}", hint)
    return {name: param.read(given[name]) if name in given else param.default for name, param in known.items()}


async def read_text(request: web.BaseRequest, patience: float) -> str:
    """The whole body. Raises Refused: 413 above 1 MiB, 408 when not here in `patience` seconds, 400 when broken."""
    if (request.content_length or 0) > BODY_MAX:
        raise Refused(413, "too-large", "the body is larger than 1 MiB")
    try:
        async with asyncio.timeout(patience):
            return (await request.read()).decode()
    except TimeoutError:
        raise Refused(408, "timeout", f"the body did not arrive within {patience:g} s") from None
    except web.HTTPRequestEntityTooLarge:
        raise Refused(413, "too-large", "the body is larger than 1 MiB") from None
    except UnicodeDecodeError:
        raise Refused(400, "bad-body", "the body is not UTF-8") from None
    except web.RequestPayloadError as error:
        raise Refused(400, "bad-body", f"cannot read the body: {str(error)[:200]}") from None


def read_object(text: str) -> dict[str, Any]:
    """A JSON object; nothing at all is the empty one. Raises Refused(400)."""
    try:
        value = json.loads(text) if text.strip() else {}
    except RecursionError:
        raise Refused(400, "bad-json", "the body is nested too deeply") from None
    except ValueError as error:
        raise Refused(400, "bad-json", f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise Refused(400, "bad-json", "the body must be a JSON object", 'such as {"models": ["NAME"]}')
    return value
