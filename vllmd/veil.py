"""What nobody must see: values under a name that means a secret, secrets that are known, passwords in addresses.

A secret may come back from anywhere: an engine prints its environment, an exception quotes a header. So everything that an
engine said goes through a Veil before it is shown, logged or kept.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vllmd.edge.backend import HIDDEN

LEAST = 6  # characters of a secret that is looked for in other text: shorter ones are words of any sentence

_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH|CRED|ACCESS")
_HARMLESS = re.compile(r"TOKENIZER|ACCESS[-_]LOG")
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20}://)[^/?#\s]*@")


class Veil:
    """Takes known secrets, and passwords in addresses, out of a text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        forms = {form for secret in secrets for form in _forms(secret) if len(form) >= LEAST}
        longest = sorted(forms, key=lambda form: (-len(form), form))
        self._pattern = re.compile("|".join(map(re.escape, longest))) if longest else None

    def __call__(self, text: str) -> str:
        if self._pattern is not None:
            text = self._pattern.sub(HIDDEN, text)
        return _USERINFO.sub(rf"\1{HIDDEN}@", text) if "://" in text else text


def secrets_in(*tables: Mapping[str, str]) -> frozenset[str]:
    """The values in environments whose names mean a secret."""
    return frozenset(
        value for table in tables for name, value in table.items() if looks_secret(name) and value != HIDDEN
    )


def looks_secret(name: str) -> bool:
    """Whether a value of this name is to be hidden. `key` alone is a name of ours."""
    return name.upper() != "KEY" and _SECRET.search(_HARMLESS.sub("", name.upper())) is not None


def hide(value: Any, secrets: frozenset[str]) -> Any:
    """The value as JSON, with everything secret replaced: known secrets, and what has a secret's name."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    match value:
        case Mapping():
            return {
                key: HIDDEN if looks_secret(str(key)) and isinstance(item, str) else hide(item, secrets)
                for key, item in value.items()
            }
        case list() | tuple():
            return [hide(item, secrets) for item in value]
        case str() if any(value == secret or (len(secret) >= LEAST and secret in value) for secret in secrets):
            return HIDDEN
        case str():
            return _USERINFO.sub(rf"\1{HIDDEN}@", value)
        case Path():
            return str(value)
    return value


def _forms(secret: str) -> Iterable[str]:
    """A secret as it may be printed: whole, by line, quoted by Python, JSON or for an address."""
    yield from (secret, *secret.splitlines(), repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe=""))
