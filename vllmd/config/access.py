"""Kinds of values of [keys.NAME], and of further names for models."""

import json
import re
from typing import Any, Final

from vllmd.config.kinds import Bad, Fault, Kind, Place, bad, each, text
from vllmd.config.names import ALIAS, MODEL_NAME, word
from vllmd.config.problems import quote
from vllmd.spec import Alias, Scope

_HASH: Final = re.compile(r"sha256:([0-9a-f]{64})")
_PARTS: Final = ("defaults", "force", "drop")
_MADE: Final = "`vllmctl key NAME` makes a key and prints the line"


def read_hash(value: Any, _: Place) -> str:
    """The digest. What is no digest may be a key: it stands in no message."""
    match = _HASH.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise bad('is not "sha256:" and 64 hex digits', _MADE)
    return match[1]


def read_scopes(value: Any, _: Place) -> frozenset[Scope]:
    if not isinstance(value, list) or not value:
        raise bad(f"{quote(value)} is not a list of scopes", 'try ["infer"]')
    known = [str(scope) for scope in Scope]

    def read(item: Any) -> Scope:
        if item not in known:
            raise bad(f"{quote(item)} is no scope", "infer, read or admin")
        return Scope(item)

    return frozenset(each(value, read))


def read_models(value: Any, _: Place) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise bad(f"{quote(value)} is not a list of models", f"try [{quote(value)}]" if isinstance(value, str) else "")
    return each(value, word(MODEL_NAME, "the name of a model"))


def read_aliases(value: Any, _: Place) -> tuple[Alias, ...]:
    """A name, a list of names, or a table of names with what each adds to a request."""
    read_word = word(ALIAS, "an alias")
    if isinstance(value, str):
        return (Alias(read_word(value)),)
    if isinstance(value, list):
        return tuple(Alias(name) for name in each(value, read_word))
    if not isinstance(value, dict):
        raise bad(f"{quote(value)} is neither a list of names nor a table", 'try ["gpt-4o"]')
    done: list[Alias] = []
    faults: list[Fault] = []
    for name, inner in value.items():
        try:
            done.append(read_alias(read_word(name), inner))
        except Bad as exc:
            faults += [Fault(f.message, f.hint, (name, *f.at)) for f in exc.faults]
    if faults:
        raise Bad(*faults)
    return tuple(done)


def read_alias(name: str, inner: Any) -> Alias:
    """One alias with its parameters. Raises Bad."""
    if not isinstance(inner, dict):
        raise bad(f"{quote(inner)} is not a table", "try {} or { defaults = { temperature = 0.2 } }")
    if strange := sorted(set(inner) - set(_PARTS)):
        raise bad(f"unknown key {quote(strange[0])}", "defaults, force, drop")
    for part in ("defaults", "force"):
        table = inner.get(part, {})
        if not isinstance(table, dict):
            raise bad(f"{part}: {quote(table)} is not a table", f"{part} = {{ temperature = 0.2 }}")
        if "model" in table:
            raise bad(f"{part}: the model is what an alias stands for")
        try:
            json.dumps(table, allow_nan=False)
        except (TypeError, ValueError):
            raise bad(f"{part}: holds what JSON has not (a date, nan)") from None
    drop = inner.get("drop", [])
    if not isinstance(drop, list):
        raise bad(f"drop: {quote(drop)} is not a list of names", 'drop = ["seed"]')
    names = each(drop, lambda item: text(item, "the name of a parameter"))
    return Alias(name, dict(inner.get("defaults", {})), dict(inner.get("force", {})), names)


_WORD: Final[dict[str, Any]] = {"type": "string", "pattern": f"^({ALIAS.pattern})$"}
_TABLE: Final[dict[str, Any]] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "defaults": {"type": "object", "description": "Filled in where a request leaves it out."},
        "force": {"type": "object", "description": "Put in place of what a request says."},
        "drop": {"type": "array", "items": {"type": "string"}, "description": "Taken out of a request."},
    },
}
ALIASES: Final = Kind(
    "a list of names, or a table of names with what each adds to a request",
    {
        "anyOf": [
            _WORD,
            {"type": "array", "items": _WORD},
            {"type": "object", "patternProperties": {f"^({ALIAS.pattern})$": _TABLE}, "additionalProperties": False},
        ]
    },
    read_aliases,
)
HASH: Final = Kind('"sha256:" and 64 hex digits', {"type": "string", "pattern": f"^{_HASH.pattern}$"}, read_hash)
SCOPES: Final = Kind(
    "a list of infer, read and admin",
    {"type": "array", "minItems": 1, "items": {"enum": [str(scope) for scope in Scope]}},
    read_scopes,
)
MODELS: Final = Kind(
    "a list of names of models",
    {"type": "array", "items": {"type": "string", "pattern": f"^{MODEL_NAME.pattern}$"}},
    read_models,
)
