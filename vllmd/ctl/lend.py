"""`vllmctl lend`: have memory freed for something else, wait until it is, and give it back."""

from __future__ import annotations

import sys
import time

from vllmd.ctl.call import print_json, print_lines
from vllmd.ctl.faults import OK, Fault, Garbled, Usage
from vllmd.ctl.words import clean, field, listed, sized, span

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vllmd.ctl.call import Call

LOOK_EVERY = 0.5  # seconds between looks at who is still to go
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def run(call: Call) -> int:
    """Lend, and return when the memory is free; or take back."""
    args = call.args
    if args.end:
        if args.size:
            raise Usage("cannot lend and take back at once", "vllmctl lend --end")
        answer = call.client.post("/api/v1/lend", {"size": 0})
        return tell(call, answer, "nothing is lent any more")
    if not args.size or args.seconds is None:
        raise Usage("cannot lend: how much, and for how long?", "vllmctl lend 6GiB --for 2h")
    wish = {"size": bytes_of(args.size), "for": args.seconds} | ({"device": args.device} if args.device else {})
    answer = call.client.post("/api/v1/lend", wish)
    if not isinstance(answer, dict):
        raise Garbled("cannot read the answer of vllmd: it is no object")
    if answer.get("status") == 202 and not args.no_wait:
        wait(call, clean(answer.get("message")))
        answer = answer | {"status": 200, "message": f"{sized(wish['size'])} free for {span(args.seconds)}"}
    return tell(call, answer, "lent")


def tell(call: Call, answer: Any, words: str) -> int:
    """The answer of vllmd."""
    if call.args.json:
        print_json(answer)
    else:
        print_lines([clean(answer.get("message")) or words])
    return OK


def wait(call: Call, message: str) -> None:
    """Until no memory is missing any more. Ctrl-C leaves the loan as it is."""
    limit = None if call.args.timeout is None else time.monotonic() + call.args.timeout
    if not call.args.json:
        print(message, file=sys.stderr)
    while any(field(device, "lent_missing") > 0 for device in listed(call.status(), "devices")):
        if limit is not None and time.monotonic() > limit:
            raise Fault("the memory is not free yet; the loan goes on", "vllmctl status", "vllmctl lend --end")
        time.sleep(LOOK_EVERY)


def bytes_of(text: str) -> int:
    """ "6GiB", "6G", "500MiB" as bytes. Raises Usage."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        size = float(number.removesuffix(unit)) * UNITS[unit]
        if not 0 < size < 1 << 60:
            raise ValueError
    except (KeyError, ValueError, OverflowError):
        raise Usage(f'cannot lend "{text}": that is not a size', "vllmctl lend 6GiB --for 2h") from None
    return int(size)
