"""`vllmctl key NAME`: make an API key. It is shown once; the configuration gets its hash."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys

from vllmd.ctl.call import print_json, print_lines
from vllmd.ctl.faults import OK, Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vllmd.ctl.call import Call

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
BYTES = 32  # of randomness


def run(call: Call) -> int:
    """Print the key and the lines that let it in. Asks no daemon."""
    args = call.args
    if not NAME.fullmatch(args.name):
        hint = "lower-case letters, digits, ., _ and -, at most 63, the first a letter or digit"
        raise Usage(f'cannot make a key called "{args.name}"', hint)
    key = f"vllmd-{secrets.token_urlsafe(BYTES)}"
    table = {"hash": f"sha256:{hashlib.sha256(key.encode()).hexdigest()}", "scopes": args.scope or ["infer"]}
    if args.model:
        table["models"] = args.model
    header = f'[keys."{args.name}"]' if "." in args.name else f"[keys.{args.name}]"
    lines = [header, *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
    if args.json:
        print_json({"name": args.name, "key": key, **table, "toml": "\n".join(lines)})
        return OK
    if sys.stdout.isatty():
        print_lines([f"The key of {args.name}, shown this once:", "", f"  {key}", ""])
        print_lines(["For vllmd.toml, then `vllmctl reload`:", "", *(f"  {line}" for line in lines)])
    else:  # `vllmctl key NAME >> vllmd.toml`: the file gets the hash, and only who looks on the key
        print(key, file=sys.stderr)
        print_lines(lines)
    return OK
