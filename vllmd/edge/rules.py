"""The rules file that comes with vllmd (vllmd/data/rules.toml), read. vllmd/core/cause.py makes rules of it."""

from importlib.resources import files
from typing import Any

import tomli


def load_rules() -> dict[str, Any]:
    """The parsed file."""
    return tomli.loads((files("vllmd") / "data" / "rules.toml").read_text(encoding="utf-8"))
