"""The JSON Schema (draft 2020-12) of a whole configuration, from the table of keys: for editors and other checks.

It says less than `load` does: rules between values, and what a path or an address is, are not in it.
"""

from collections.abc import Iterable
from typing import Any

from vllmd.config.names import MODEL_NAME
from vllmd.config.options import SECTIONS, Option, Section


def schema() -> dict[str, Any]:
    """A new dict with the schema."""
    models = _table(SECTIONS[Section.MODELS].values(), "One model.")
    defaults = _table(SECTIONS[Section.MODELS].values(), "What holds for every model that does not say otherwise.")
    devices = _table(SECTIONS[Section.DEVICES].values(), "Limits of one device.")
    keys = {**_table(SECTIONS[Section.KEYS].values(), "One API key."), "required": ["hash"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vllmd.toml",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "daemon": _table(SECTIONS[Section.DAEMON].values(), "The daemon itself."),
            "http": _table(SECTIONS[Section.HTTP].values(), "The gateway and the status API over TCP."),
            "devices": {
                "type": "object",
                "description": 'By index, UUID or "cpu"; "*" is for all without an own table.',
                "patternProperties": {r"^(\*|\d{1,3}|cpu|(GPU|MIG)-[A-Za-z0-9./-]{1,80})$": devices},
                "additionalProperties": False,
            },
            "defaults": defaults,
            "keys": {
                "type": "object",
                "description": "API keys by name.",
                "patternProperties": {f"^{MODEL_NAME.pattern}$": keys},
                "additionalProperties": False,
            },
            "models": {
                "type": "object",
                "description": "The models by name.",
                "patternProperties": {f"^{MODEL_NAME.pattern}$": models},
                "additionalProperties": False,
            },
        },
        # [defaults] may hold `model` too, odd as that is.
        "anyOf": [
            {"properties": {"defaults": {"required": ["model"]}}, "required": ["defaults"]},
            {"properties": {"models": {"additionalProperties": {"required": ["model"]}}}},
        ],
    }


def _table(options: Iterable[Option], description: str) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "additionalProperties": False,
        "properties": {option.key: _key(option) for option in options},
    }


def _key(option: Option) -> dict[str, Any]:
    later = f" (No effect in this version: {option.later}.)" if option.later else ""
    made = {**option.kind.schema, "description": option.doc + later}
    return made if option.default is None else {**made, "default": option.default}
