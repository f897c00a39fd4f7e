"""`vllmctl status --watch`: the status kept on the screen, redrawn from events at most twice a second.

What is shown is a function of the picture, the keys so far and the size of the terminal (`frame`). Where nobody
looks (a pipe), one line is printed per change of state.
"""

from __future__ import annotations

import json
import os
import sys
import time

from vllmd.ctl.bar import device_lines
from vllmd.ctl.call import print_lines
from vllmd.ctl.faults import INTERRUPTED, OK, Fault
from vllmd.ctl.feed import Feed
from vllmd.ctl.logs import clock, fetch_lines, line_text
from vllmd.ctl.look import DIM, RED, Look
from vllmd.ctl.table import device_trouble, empty, fold_ascii, in_order, problems, rows, status_text, summary
from vllmd.ctl.words import clean, clip, field, listed, nested, span

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vllmd.ctl.call import Call

REDRAW, TICK = 0.5, 1.0  # seconds: after an event, and for the clock
LOOKING = ("up/down pick", "l log", "w why", "/ filter", "q quit")
CHANGING = ("up/down pick", "s start", "x stop", "r restart", "l log", "w why", "/ filter", "q quit")


class Keys:
    """What has been typed so far. `pane` is "" | "log" | "why", `asking` the model whose stop waits for a word."""

    def __init__(self) -> None:
        self.picked = ""
        self.filter = ""
        self.typing = False
        self.asking = ""
        self.message = ""
        self.pane = ""
        self.text: list[str] = []


def watch(call: Call) -> int:
    """Until q, Ctrl-C, or the end of what it is written to."""
    if not call.look.lines or os.environ.get("TERM", "dumb") == "dumb" or call.args.json:
        return follow(call)
    from vllmd.ctl.screen import Ended, Screen

    feed = Feed(call.client, live=True)
    session = Session(call, feed)
    code = OK
    try:
        with Screen() as screen:
            session.run(screen)
    except KeyboardInterrupt:
        pass  # as q: nothing was asked for that could go on
    except Ended as end:
        code = 128 + end.number
    finally:
        feed.close()
    print_lines(status_text(feed.picture(), call.look, call.args.all))
    return code


def follow(call: Call) -> int:
    """One line per change of state; with --json the whole status, one object a line, at most twice a second."""
    feed = Feed(call.client)
    states: dict[str, str] = {}
    lost = False
    try:
        while True:
            picture = feed.picture()
            if call.args.json:
                print(json.dumps(picture))
            else:
                print_lines(changes(picture, states, call.look))
            if (feed.lost is not None) != lost:
                lost = not lost
                print_lines([f"{clock()} {'no connection to vllmd' if lost else 'vllmd is back'}"])
            sys.stdout.flush()
            drawn, events = time.monotonic(), False
            while not (events and time.monotonic() - drawn >= REDRAW) and (feed.lost is not None) == lost:
                pause = max(0.0, drawn + REDRAW - time.monotonic()) if events else 5.0
                events = any(kind in ("model", "snapshot") for kind, _ in feed.poll(pause)[0]) or events
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        feed.close()


def changes(picture: dict[str, Any], states: dict[str, str], look: Look) -> list[str]:
    """A line for each model whose state is not the one in `states`, which is brought up to date."""
    lines = []
    for model in listed(picture, "models"):
        name, state = clean(model.get("name")), clean(model.get("state"))
        if states.get(name) == state:
            continue
        before = f"{states[name]} {look.arrow} " if name in states else ""
        text = clean(nested(model, "why").get("text"))
        lines.append(fold_ascii(f"{clock()} {name}: {before}{state}{': ' + text if text else ''}", look))
        states[name] = state
    return lines


def frame(picture: dict[str, Any], keys: Keys, look: Look, lost: float | None, may: bool) -> list[str]:
    """The screen: at most `look.lines` lines. The rows scroll to keep the picked one in sight."""
    told = f"lost {span(lost)}" if lost is not None else clock()
    top = [summary(picture, look, told, lost is not None), *device_lines(picture, look), ""]
    foot = footer(keys, look, may)
    room = max(1, look.lines - len(top) - len(foot))
    if keys.pane:
        return [*top, *fill(keys.text[-room:], room), *foot]
    models = chosen(picture, keys)
    if not models:
        text = ["No model matches."] if keys.filter else empty(picture, look)
        return [*top, *fill(text[:room], room), *foot]
    below = [*problems(models, look), *device_trouble(picture, look)]
    # rows and sentences share what is left; neither may push the other out
    share = min(1 + len(below), max(room - 1 - len(models), room // 3))
    if 1 < share <= len(below):
        rest = f"  {look.dots} {len(below) - share + 2} more lines: vllmctl status"
        below = [*below[: share - 2], look.paint(DIM, clip(rest, look.columns, look.dots))]
    below = ["", *below] if below and share > 1 else []
    head, *lines = rows(models, look, picked=keys.picked)
    shown = max(1, room - 1 - len(below))
    at = next((at for at, model in enumerate(models) if clean(model.get("name")) == keys.picked), 0)
    first = max(0, min(at - shown // 2, len(lines) - shown))
    if len(lines) > shown:
        head = head.rstrip() + look.paint(DIM, f"  {first + 1}-{first + shown} of {len(lines)}")
    return [*top, *fill([head, *lines[first : first + shown], *below], room), *foot]


def fill(lines: list[str], room: int) -> list[str]:
    return lines + [""] * (room - len(lines))


def footer(keys: Keys, look: Look, may: bool) -> list[str]:
    """A message if there is one, and the keys that work now."""
    lines = [look.paint(RED, clip(fold_ascii(keys.message, look), look.columns, look.dots))] if keys.message else []
    if keys.asking:
        hint = f"{keys.asking} has requests: d drain and stop   n stop now   any other key keeps it"
    elif keys.typing:
        hint = f"/{keys.filter}_   enter keep   escape clear"
    elif keys.pane:
        hint = f"{keys.pane} of {keys.picked}   escape back   q quit"
    else:
        hint = "   ".join(CHANGING if may else LOOKING)
        hint = f"[{keys.filter}]   {hint}" if keys.filter else hint
    return [*lines, clip(fold_ascii(hint, look), look.columns, look.dots)]


def chosen(picture: dict[str, Any], keys: Keys) -> list[dict[str, Any]]:
    """The rows: in order, those that match the filter by name, category or state."""
    wanted = keys.filter.lower()
    models = in_order(listed(picture, "models"))
    return [m for m in models if any(wanted in clean(m.get(key)).lower() for key in ("name", "state", "category"))]


class Session:
    """The loop: events and keys in, frames out, wishes to vllmd."""

    def __init__(self, call: Call, feed: Feed) -> None:
        self._call = call
        self._feed = feed
        self._keys = Keys()
        self._over = False

    def run(self, screen: Any) -> None:
        """Until q."""
        self._pick(0)
        drawn, stale = 0.0, True
        while not self._over:
            due = drawn + (REDRAW if stale else TICK)
            if time.monotonic() >= due:
                self._refresh()
                self._draw(screen)
                drawn, stale = time.monotonic(), False
                due = drawn + TICK
            events, typed = self._feed.poll(max(0.0, due - time.monotonic()), screen.keys)
            stale = stale or any(kind in ("model", "device", "snapshot") for kind, _ in events)
            for key in screen.read() if typed else ():
                self._press(key)
            if typed and not self._over:
                self._draw(screen)

    @property
    def _may(self) -> bool:
        """Whether keys may change things: the socket grants it, and nobody asked otherwise."""
        access = nested(self._feed.picture(), "daemon").get("access")
        return access == "admin" and not self._call.args.readonly and self._feed.lost is None

    def _draw(self, screen: Any) -> None:
        screen.draw(frame(self._feed.picture(), self._keys, self._call.look, self._feed.lost, self._may))

    def _pick(self, step: int) -> None:
        names = [clean(model.get("name")) for model in chosen(self._feed.picture(), self._keys)]
        at = names.index(self._keys.picked) + step if self._keys.picked in names else 0
        self._keys.picked = names[max(0, min(at, len(names) - 1))] if names else ""

    def _press(self, key: str) -> None:
        keys = self._keys
        keys.message = ""
        if key == "quit":
            self._over = True
        elif keys.asking:
            name, keys.asking = keys.asking, ""
            if key in ("d", "n"):
                self._wish("stop", name, key == "n")
        elif keys.typing:
            self._type(key)
        elif key == "q":
            self._over = True
        elif key == "escape" or (keys.pane and key in (keys.pane[0], "enter")):
            keys.pane = ""
        elif key in ("up", "k", "down", "j"):
            self._pick(-1 if key in ("up", "k") else 1)
        elif key == "/":
            keys.typing, keys.pane = True, ""
        elif key in ("l", "w") and keys.picked:
            keys.pane = "log" if key == "l" else "why"
            self._refresh()
        elif key in ("s", "x", "r") and keys.picked and self._may:
            self._change({"s": "start", "x": "stop", "r": "restart"}[key], keys.picked)

    def _type(self, key: str) -> None:
        keys = self._keys
        if key in ("enter", "escape"):
            keys.typing = False
            keys.filter = "" if key == "escape" else keys.filter
        elif key == "backspace":
            keys.filter = keys.filter[:-1]
        elif len(key) == 1:
            keys.filter += key
        self._pick(0)

    def _change(self, verb: str, name: str) -> None:
        """Do it, or ask first: a stop or restart of a model with requests on it."""
        model = self._feed.model(name) or {}
        if verb == "stop" and field(model, "requests_running") + field(model, "requests_waiting") >= 1:
            self._keys.asking = name
        else:
            self._wish(verb, name, False)

    def _wish(self, verb: str, name: str, now: bool) -> None:
        from urllib.parse import quote

        try:
            body = {"now": True} if now else {}
            self._call.client.post(f"/api/v1/models/{quote(name, safe='')}/{verb}", body, timeout=10.0)
        except Fault as fault:
            self._keys.message = clean(fault.message)

    def _refresh(self) -> None:
        """What the pane shows, asked anew."""
        from urllib.parse import quote

        keys, client, look = self._keys, self._call.client, self._call.look
        if not keys.pane or self._feed.lost is not None:
            return
        path = f"/api/v1/models/{quote(keys.picked, safe='')}"
        try:
            if keys.pane == "log":
                found = fetch_lines(self._call, f"{path}/logs?n={look.lines}")
                keys.text = [clip(fold_ascii(line_text(line), look), look.columns, look.dots) for line in found]
            else:
                from vllmd.ctl.details import why_lines

                answer = client.get(f"{path}/why")
                lines = why_lines(answer, look) if isinstance(answer, dict) else []
                keys.text = [line if "\x1b" in line else clip(line, look.columns, look.dots) for line in lines]
        except Fault as fault:
            keys.text = [clip(fold_ascii(clean(fault.message), look), look.columns, look.dots)]
