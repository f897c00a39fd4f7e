"""What every command gets: its arguments, the connection, the look of the terminal."""

from __future__ import annotations

import json
import sys

from vllmd.ctl.faults import Garbled
from vllmd.ctl.look import Look, look_at, spell
from vllmd.ctl.words import clean, listed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

    from vllmd.ctl.client import Client


class Call:
    """One run of vllmctl."""

    def __init__(self, args: Namespace, client: Client) -> None:
        self.args = args
        self.client = client

    @property
    def look(self) -> Look:
        """How to draw on standard output."""
        return look_at(sys.stdout, self.args.color)

    def status(self) -> dict[str, Any]:
        """The status. Raises Garbled if it is none."""
        return checked(self.client.get("/api/v1/status"))

    def path(self, tail: str = "") -> str:
        """The API path of the model on the command line."""
        from urllib.parse import quote

        return f"/api/v1/models/{quote(self.args.model, safe='')}{tail}"


def checked(answer: object) -> dict[str, Any]:
    """`answer` if it looks like a status. Raises Garbled."""
    if not isinstance(answer, dict) or not isinstance(answer.get("daemon"), dict):
        raise Garbled("cannot read the status: it is not one (does something else listen there?)")
    return answer


def print_json(value: object) -> None:
    """To people indented, to programs on one line. ASCII, so that nothing in it can reach the terminal."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def print_lines(lines: list[str]) -> None:
    """Text that is clean already, in whatever the terminal can encode."""
    print(spell("\n".join(lines), sys.stdout))


def complain(message: str, *hints: str) -> None:
    """A fault on standard error, its hints below."""
    lines = [f"vllmctl: {clean(message)}", *(f"  {advice(clean(hint))}" for hint in hints)]
    print(spell("\n".join(lines), sys.stderr), file=sys.stderr)


def advice(hint: str) -> str:
    """ "try: vllmctl start x"; what is a question or a list ("did you mean x?", "configured: a, b") stands by itself."""
    first = hint.partition(" ")[0]
    return hint if hint.endswith("?") or first.endswith(":") or first in ("try", "or") else f"try: {hint}"


def names_of(status: dict[str, Any]) -> list[str]:
    """The configured models."""
    return [name for model in listed(status, "models") if (name := clean(model.get("name")))]
