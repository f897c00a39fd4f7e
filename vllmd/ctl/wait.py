"""`vllmctl start|stop|restart`: ask, then show how it goes until it is done.

The wish is vllmd's once it has answered; waiting only watches. So the events are opened after the answer: their first
snapshot already shows the wish, and no state from before it can be mistaken for its end. Ctrl-C and --timeout end the
waiting, never the start. Progress goes to standard error, results to standard output.
"""

from __future__ import annotations

import sys
import time

from vllmd.ctl.call import complain, print_json, print_lines
from vllmd.ctl.faults import BY_HAND, FAILED, INTERRUPTED, NO_ROOM, OK, TIMEOUT, Fault, Garbled, Unreachable, Usage
from vllmd.ctl.feed import Feed
from vllmd.ctl.look import Look, look_at
from vllmd.ctl.table import fold_ascii, remark, rows
from vllmd.ctl.words import GIB, clean, field, gib, listed, nested, number, sized, span

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vllmd.ctl.call import Call

PATIENCE = 30.0  # seconds that a vllmd may be away (its restart) before waiting for it is given up
DOING = {"start": "starting", "stop": "stopping", "restart": "restarting"}


class Outcome:
    """How it ended for one model, or that it goes on without us (TIMEOUT, INTERRUPTED)."""

    __slots__ = ("code", "hints", "model", "state", "text")

    def __init__(self, model: str, code: int, text: str, hints: list[str] | None = None, state: str = "") -> None:
        self.model = model
        self.code = code
        self.text = text
        self.hints = hints or []
        self.state = state


def run(call: Call) -> int:
    """Ask, wait, report; the exit code is that of the outcomes if they agree, else FAILED."""
    args = call.args
    given = [
        what for what, there in (("names", args.models), ("--category", args.category), ("--all", args.all)) if there
    ]
    if not given:
        raise Usage(f"cannot {args.command}: no model named", "name models, or give --category NAME or --all")
    if len(given) > 1:
        raise Usage(f"cannot {args.command}: {' and '.join(given)} exclude each other")
    answers = ask(call)
    outcomes = [done for row in answers if (done := settled(args.command, row))]
    waiting = [clean(row.get("model")) for row in answers if field(row, "status") == 202]
    if args.no_wait:
        outcomes += [Outcome(name, OK, f"{name}: {args.command} accepted") for name in waiting]
        waiting = []
    if not args.json:
        for outcome in outcomes:
            report(outcome)
    if waiting:
        outcomes += Waiting(call, waiting).run()
    if args.json:
        print_json([{"model": o.model, "code": o.code, "state": o.state, "message": o.text} for o in outcomes])
    codes = {outcome.code for outcome in outcomes}
    return codes.pop() if len(codes) == 1 else FAILED if codes - {OK} else OK


def ask(call: Call) -> list[dict[str, Any]]:
    """vllmd's answer for each model that is meant."""
    args = call.args
    body: dict[str, Any] = {"models": args.models, "all": args.all}
    if args.category:
        body["category"] = args.category
    if getattr(args, "now", False):
        body["now"] = True
    answer = call.client.post(f"/api/v1/{args.command}", body, timeout=60.0)
    if not isinstance(answer, dict) or not isinstance(answer.get("results"), list):
        raise Garbled(f"cannot read the answer to {args.command}: it has no results")
    return listed(answer, "results")


def settled(verb: str, row: dict[str, Any]) -> Outcome | None:
    """The outcome that an answer already is: refused, or nothing to do. None = accepted, wait."""
    name, status, message = clean(row.get("model")), field(row, "status"), clean(row.get("message"))
    if status == 202:
        return None
    if status < 400:
        named = message.startswith((f"{name} ", f"{name}:"))
        return Outcome(name, OK, message if named else f"{name}: {message or 'nothing to do'}")
    remedies = row.get("remedies")
    hints = [clean(each) for each in remedies] if isinstance(remedies, list) else []
    return Outcome(name, NO_ROOM if status == 409 else FAILED, message or f"cannot {verb} {name}", hints)


def verdict(verb: str, model: dict[str, Any]) -> int | None:
    """OK or FAILED once `model` has come to the end of `verb`; None = on its way."""
    state = model.get("state")
    if verb == "stop":
        return OK if state in ("stopped", "failed") else None  # failed holds nothing either
    if state == "ready":
        return OK
    return FAILED if state in ("failed", "stopped") else None


def report(outcome: Outcome) -> None:
    """One outcome, for people."""
    if outcome.code == OK:
        print_lines([outcome.text])
        sys.stdout.flush()
    else:
        complain(outcome.text, *outcome.hints)


class Waiting:
    """Models on their way, and what is remembered of them for the last line."""

    def __init__(self, call: Call, names: list[str]) -> None:
        self._call = call
        self._verb: str = call.args.command
        self._left = names
        self._began = time.monotonic()
        self._started: dict[str, float] = {}  # name -> when its start began: maybe before us
        self._usual: dict[str, float] = {}
        self._held: dict[str, float] = {}  # bytes, to be given back
        self._said: dict[str, str] = {}
        self._quiet = call.args.json
        self._look: Look = look_at(sys.stderr, call.args.color)
        self._drawn = 0
        self._away = False
        self._ended = False  # vllmd has said goodbye

    def run(self) -> list[Outcome]:
        """Outcomes of all models. Ctrl-C and --timeout are outcomes too."""
        outcomes: list[Outcome] = []
        feed = Feed(self._call.client, live=bool(self._look.lines) and not self._quiet)
        try:
            while self._left:
                for kind, data in feed.poll(self._pause())[0]:
                    self._hear(kind, data)
                self._step(feed, outcomes)
                limit = self._call.args.timeout
                if self._left and limit is not None and time.monotonic() - self._began >= limit:
                    return outcomes + self._leave(feed, TIMEOUT)
                if self._left:
                    self._check(feed)
        except KeyboardInterrupt:
            return outcomes + self._leave(feed, INTERRUPTED)
        finally:
            self._erase()
            feed.close()
        return outcomes

    def _hear(self, kind: str, data: Any) -> None:
        """Take in one event: several may come at once, and none may be passed over on the way to the last."""
        self._ended = kind == "bye" or (self._ended and kind != "snapshot")
        models = listed(data, "models") if kind == "snapshot" else [data] if kind == "model" else []
        for model in models:
            if model.get("name") in self._left:
                self._note(clean(model.get("name")), model)
                self._say(model)

    def _check(self, feed: Feed) -> None:
        """A vllmd that restarts is waited for, and that is said once. Raises Unreachable when it stays away."""
        lost = feed.lost
        if lost is not None and not self._away and not self._quiet:
            self._erase()
            what = "has ended" if self._ended else "is away"
            print(f"vllmd {what}; waiting for it to come back", file=sys.stderr, flush=True)
        self._away = lost is not None
        if (lost or 0.0) > PATIENCE:
            text = f"vllmd has ended, and did not come back within {span(PATIENCE)}"
            text = text if self._ended else f"cannot hear vllmd for {span(PATIENCE)}"
            raise Unreachable(f"{text}: stopped waiting", "systemctl status vllmd")

    def _pause(self) -> float:
        limit = self._call.args.timeout
        left = 1.0 if limit is None else self._began + limit - time.monotonic()
        return max(0.0, min(1.0 if self._look.lines else 5.0, left))

    def _step(self, feed: Feed, outcomes: list[Outcome]) -> None:
        """Look at everybody once; report who has arrived, draw the rest."""
        moving = []
        for name in list(self._left):
            model = feed.model(name) or {}  # empty: a reload took it away
            code = verdict(self._verb, model) if model else FAILED
            if code is None:
                moving.append(model)
                continue
            self._left.remove(name)
            outcomes.append(self._end(name, model, code))
            if not self._quiet:
                self._erase()
                report(outcomes[-1])
        if not self._quiet:
            self._draw(moving)

    def _note(self, name: str, model: dict[str, Any]) -> None:
        elapsed = number(model.get("elapsed_s"))
        if elapsed is not None:
            self._started.setdefault(name, min(self._began, time.monotonic() - elapsed))
        if usual := number(model.get("usual_s")):
            self._usual[name] = usual
        self._held[name] = max(self._held.get(name, 0.0), field(model, "used"))

    def _end(self, name: str, model: dict[str, Any], code: int) -> Outcome:
        """The last word on a model."""
        took = span(time.monotonic() - (self._began if self._verb == "stop" else self._started.get(name, self._began)))
        state, why = clean(model.get("state")), nested(model, "why")
        hints = [clean(remedy.get("text")) for remedy in listed(why, "remedies")]
        if not model:
            return Outcome(name, code, f"cannot {self._verb} {name}: it is not configured any more")
        if code != OK:
            prefix = f"cannot {self._verb} {name}: "
            reason = clean(why.get("text"))
            if not reason and self._closing():
                return Outcome(name, code, f"{prefix}vllmd has ended", ["systemctl start vllmd", BY_HAND], state)
            reason = reason or f"it is {state}, by somebody else's wish"
            return Outcome(name, code, prefix + reason.removeprefix(prefix), hints or [f"vllmctl why {name}"], state)
        if self._verb == "stop":
            back = f", {sized(self._held[name])} back" if self._held.get(name) else ""
            return Outcome(name, code, f"{name} stopped after {took}{back}", state=state)
        usual = f" (usually {span(self._usual[name])})" if name in self._usual else ""
        used = field(model, "used")  # by the last look at the devices, which may be older than the model
        memory = f", {gib(used)} of {sized(field(model, 'reserved'))}" if used >= 0.05 * GIB else ""
        return Outcome(name, code, f"{name} ready after {took}{usual}{memory}", state=state)

    def _closing(self) -> bool:
        """Whether vllmd ends, or has: then that is why a model is down."""
        if self._ended:
            return True
        try:
            answer = self._call.client.call("GET", "/api/v1/status", timeout=2.0)
        except Fault as fault:
            return isinstance(fault, Unreachable)
        return isinstance(answer, dict) and nested(answer, "daemon").get("closing") is True

    def _leave(self, feed: Feed, code: int) -> list[Outcome]:
        """Stop waiting; what was asked for goes on, and the caller must know."""
        self._erase()
        outcomes = []
        for name in self._left:
            model = feed.model(name) or {}
            doing = DOING[self._verb]
            state = clean(model.get("state"))
            where = f" ({remark(model)})" if remark(model) else ""
            hint = f"vllmctl stop {name}" if self._verb != "stop" else f"vllmctl stop --now {name}"
            spent = f" after {span(time.monotonic() - self._began)}" if code == TIMEOUT else ""
            text = f"stopped waiting{spent}: {name} goes on {doing}{where}"
            outcomes.append(Outcome(name, code, text, ["vllmctl status --watch", hint], state))
            if not self._quiet:
                report(outcomes[-1])
        return outcomes

    def _draw(self, models: list[dict[str, Any]]) -> None:
        """On a terminal the rows of who is on the way, redrawn in place; else a line per change."""
        if not self._look.lines:
            return
        room = max(1, self._look.lines - 2)
        lines = rows(models, self._look, heads=False)
        if len(lines) > room:
            lines = [*lines[: room - 1], f"  and {len(lines) - room + 1} more"]
        self._erase()
        print("\n".join(lines), file=sys.stderr, end="\n" if lines else "", flush=True)
        self._drawn = len(lines)

    def _say(self, model: dict[str, Any]) -> None:
        """Where rows cannot be redrawn, a line for each new state or phase: also for one that is over already."""
        name, state = clean(model.get("name")), clean(model.get("state"))
        now = f"{state} {clean(model.get('phase'))}"
        if self._look.lines or self._quiet or self._said.get(name) == now or verdict(self._verb, model) is not None:
            return
        self._said[name] = now
        text = clean(nested(model, "why").get("text"))
        line = f"{name}: {state}{': ' + text if text else ''}"
        print(fold_ascii(line, self._look), file=sys.stderr, flush=True)

    def _erase(self) -> None:
        if self._drawn:
            print(f"\x1b[{self._drawn}A\r\x1b[J", end="", file=sys.stderr, flush=True)
            self._drawn = 0
