"""`vllmctl logs` and `events`: lines as they come, until they end or Ctrl-C."""

from __future__ import annotations

import json
import sys
import time

from vllmd.ctl.call import print_lines
from vllmd.ctl.client import parse, refusal
from vllmd.ctl.faults import OK, Unreachable
from vllmd.ctl.words import clean, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vllmd.ctl.call import Call


def run(call: Call) -> int:
    """A model's log; with --follow what is added to it too."""
    args = call.args
    query = f"n={args.lines}"
    query += f"&since={args.since:g}" if args.since is not None else ""
    query += "&failed=1" if args.failed else ""
    query += "&previous=1" if args.previous else ""
    path = call.path(f"/logs?{query}")
    if not args.follow:
        for line in fetch_lines(call, path):
            show_line(line, args.json)
        return OK
    stream = call.client.stream(f"{path}&follow=1")
    try:
        for event in stream.events():
            if event.kind == "line":
                show_line(parse(event.data), args.json)
                sys.stdout.flush()
            elif event.kind == "bye":
                raise Unreachable(
                    "the log ends here: vllmd has ended; the model may go on", f"vllmctl logs -f {args.model}"
                )
    finally:
        stream.close()
    raise Unreachable("the log ends here: the connection to vllmd broke", f"vllmctl logs -f {args.model}")


def fetch_lines(call: Call, path: str) -> list[Any]:
    """The lines that are there. Raises Refused, Unreachable, Garbled."""
    response, raw = call.client.fetch("GET", path)
    if response.status >= 400:
        raise refusal(response.status, parse(raw) if raw else None)
    return [parse(line) for line in raw.splitlines() if line.strip()]


def line_text(line: object) -> str:
    """The printable text of one line; tabs become spaces, as on a terminal."""
    text = line.get("text") if isinstance(line, dict) else line
    return clean(text.expandtabs() if isinstance(text, str) else text)


def show_line(line: object, as_json: bool) -> None:
    """Print one line. The states of a progress bar are left out for people: its last one comes as a line of its own."""
    if as_json:
        print(json.dumps(line))
    elif not (isinstance(line, dict) and line.get("progress")):
        print_lines([line_text(line)])


def events(call: Call) -> int:
    """Notes in sentences; with --json every event, one object a line."""
    after = call.args.since_id
    stream = call.client.stream(f"/api/v1/events?after={after}" if after else "/api/v1/events")
    try:
        for event in stream.events():
            if not event.kind or event.kind == "clock":
                continue
            data = parse(event.data) if event.data else None
            if call.args.json:
                print(json.dumps({"id": event.id or None, "event": event.kind, "data": data}))
            elif line := event_line(event.kind, data, after):
                print_lines([line])
            sys.stdout.flush()
            if event.kind == "bye":
                return OK
    finally:
        stream.close()
    raise Unreachable("the events end here: the connection to vllmd broke")


def event_line(kind: str, data: Any, after: str | None = None) -> str:
    """ "05:12:41 qwen3-vl: waiting → starting"; "" for what only programs want. `after` = where the reader began."""
    if kind == "bye":
        return f"{clock()} vllmd ends"
    if kind == "lost":
        if after and isinstance(data, dict) and data.get("after") == int(after):
            return f"{clock()} vllmd does not remember event {int(after)} (too old, or of an earlier run): on from now"
        return f"{clock()} some events were lost: this reader is too slow"
    if kind != "note" or not isinstance(data, dict):
        return ""
    level = clean(data.get("level"))
    text = clean(data.get("text"))
    name = clean(data.get("model"))
    mark = f"{level}: " if level in ("warning", "error") else ""
    return f"{clock(number(data.get('time')))} {mark}{name + ': ' if name and not text.startswith(name) else ''}{text}"


def clock(at: float | None = None) -> str:
    """Local time of day; `at` in seconds since the epoch."""
    try:
        return time.strftime("%H:%M:%S", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return "??:??:??"
