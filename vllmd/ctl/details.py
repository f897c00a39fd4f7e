"""`vllmctl why`, `show`, `plan`, `devices`: one answer of vllmd, spelt out."""

from __future__ import annotations

from vllmd.ctl.bar import device_facts, device_lines
from vllmd.ctl.call import print_json, print_lines
from vllmd.ctl.faults import NO_ROOM, OK, Garbled
from vllmd.ctl.look import AMBER, GREEN, SIGNS, Look
from vllmd.ctl.table import PHASES, fold_ascii, remedies
from vllmd.ctl.words import clean, exact, field, listed, nested, number, sized, span, wrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vllmd.ctl.call import Call


def answered(call: Call, path: str) -> dict[str, Any]:
    """The JSON object at `path`. Raises Garbled if it is none."""
    answer = call.client.get(path)
    if not isinstance(answer, dict):
        raise Garbled("cannot read the answer of vllmd: it is no object")
    return answer


def why(call: Call) -> int:
    """The sentence, its remedies, and what is known beside it."""
    story = answered(call, call.path("/why"))
    if call.args.json:
        print_json(story)
    else:
        print_lines(why_lines(story, call.look))
    return OK


def why_lines(story: dict[str, Any], look: Look) -> list[str]:
    """The story of one model, the cause first."""
    said = nested(story, "why")
    name, state = clean(story.get("name")), clean(story.get("state"))
    sign, sgr = look.sign(state)
    age = number(said.get("age_s"))
    head = f"{sign} {name} is {state}" + (f", {span(age)} ago" if age is not None and state in SIGNS else "")
    lines = [look.paint(sgr, head)]
    text = clean(said.get("text"))
    lines += wrap("  " + text, look.columns) if text else ["  nothing is wrong with it"] if state == "ready" else []
    lines += remedies(said, look)
    facts = {
        "class": said.get("class"),
        "log says": story.get("detail"),
        "phase": story.get("phase"),
        "memory then": story.get("memory"),
        "attempt": story.get("attempt"),
        "failures": story.get("failures") or None,
        "last failure": story.get("last_failure"),
        "changed since it last ran": story.get("changed") or None,
    }
    for key, value in facts.items():
        if value not in (None, "", [], {}):
            lines += [part for line in spell(key, value, "  ") for part in wrap(line, look.columns, "    ")]
    return [fold_ascii(line, look) for line in lines]


def show(call: Call) -> int:
    """Everything about one model."""
    model = answered(call, call.path())
    if call.args.json:
        print_json(model)
    else:
        lines = [line for key, value in model.items() for line in spell(key, value)]
        print_lines([fold_ascii(line, call.look) for line in lines])
    return OK


TIMES = {
    "start_stall", "hang_after", "drain", "max_drain", "stop_timeout", "queue_timeout", "ttl", "backoff", "backoff_max",
    "window", "reset_after", *PHASES,
}  # fmt: skip
SIZES = {"need", "reserved", "used", "total", "weights", "base", "kv", "size", "vram", "kv_cache", "budget", "external"}


def spell(key: str, value: object, indent: str = "") -> list[str]:
    """`value` as indented text. Command lines are spelt to be pasted; nothing is left out but what is empty."""
    name = clean(key)
    match value:
        case _ if value in (None, "", [], {}):
            return []
        case {"part": int() | float() as part}:
            return [f"{indent}{name}: {part * 100:g} % of the budget"]
        case [int() as low, int() as high] if key == "replicas":
            return [f"{indent}{name}: {low if low == high else f'{low} to {high}'}"]
        case dict():
            inner = [line for each, item in value.items() for line in spell(str(each), item, indent + "  ")]
            return [f"{indent}{name}:", *inner] if inner else []
        case list() if key in ("argv", "flags", "command"):
            import shlex

            return [f"{indent}{name}: {shlex.join(clean(each) for each in value)}"]
        case list() if all(isinstance(each, (str, int, float)) for each in value):
            return [f"{indent}{name}: {', '.join(clean(each) for each in value)}"]
        case list():
            lines = [f"{indent}{name}:"]
            for each in value:
                body = spell("", each, indent + "  ") if not isinstance(each, dict) else []
                inner = (
                    [line for k, v in each.items() for line in spell(str(k), v, "")] if isinstance(each, dict) else []
                )
                lines += body or [f"{indent}  - {'  '.join(inner)}"]
            return lines
        case bool():
            return [f"{indent}{name}: {'yes' if value else 'no'}"]
        case int() | float() if key in SIZES and value >= 1 << 20:
            return [f"{indent}{name}: {sized(value)}"]
        case 0 if key == "port":
            return [f"{indent}{name}: auto"]
        case int() | float() if key in TIMES or (key == "total" and isinstance(value, float)):
            return [f"{indent}{name}: {exact(value)}"]
        case int() | float() if key.endswith("_s") and not key.endswith("_per_s"):
            return [f"{indent}{name.removesuffix('_s')}: {span(value)}"]
    return [f"{indent}{name}: {clean(value)}"]


def plan(call: Call) -> int:
    """Who would fit, with which flags; NO_ROOM if somebody that was named does not."""
    names = call.args.models
    answer = call.client.post("/api/v1/plan", {"models": names}) if names else answered(call, "/api/v1/plan")
    if not isinstance(answer, dict):
        raise Garbled("cannot read the plan: it is no object")
    rows, look = listed(answer, "models"), call.look
    if call.args.json:
        print_json(answer)
    else:
        head, each = clean(answer.get("text")), not names and len(rows) > 1
        lines = wrap(head, look.columns) if head else []
        lines += [line for row in rows for line in plan_lines(row, look, each)]
        print_lines([fold_ascii(line, look) for line in lines] or ["nothing to plan"])
    return NO_ROOM if names and not all(row.get("fits") for row in rows) else OK


def plan_lines(row: dict[str, Any], look: Look, each: bool) -> list[str]:
    """ "● chat fits on GPU 0: 5.0 GiB (measured)", its parts and flags below; or why it does not fit: "○" in this company,
    "×" never. `each`: a plan of each model for itself, where "○" is for one that fits alone."""
    name, need = clean(row.get("model")), number(row.get("need"))
    size = sized(need) if need else "?"
    if not row.get("fits"):
        state, sgr = ("stopped", "") if row.get("alone") else ("failed", AMBER)
        text = clean(row.get("text")).removeprefix(f"cannot start {name}: ") or f"needs {size}, does not fit"
        first, *more = wrap(f"  {name}: {text}", look.columns)
        return [look.paint(sgr, look.sign(state)[0]) + first[1:], *more]
    devices, beside = row.get("devices"), row.get("beside")
    where = ", ".join(clean(each) for each in devices) if isinstance(devices, list) else ""
    how = "measured" if row.get("measured") else "estimated"
    now = ", but not beside what runs now" if row.get("fits_now") is False else ""
    alone = " alone" if each and beside == [] else ""
    sign = look.sign("stopped")[0] if alone else look.paint(GREEN, look.sign("ready")[0])
    lines = [f"{sign} {name} fits{alone}{' on ' + where if where else ''}: {size} ({how}){now}"]
    parts = [f"{clean(part.get('label'))} {sized(field(part, 'size'))}" for part in listed(row, "parts")]
    lines += wrap("    " + " + ".join(parts), look.columns, "    ") if parts else []
    return lines + spell("flags", row.get("flags"), "    ") + spell("beside", beside, "    ")


def devices(call: Call) -> int:
    """The bars, then every byte by name."""
    if call.args.json:
        print_json(call.client.get("/api/v1/devices"))
        return OK
    status, look = call.status(), call.look
    lines = device_lines(status, look)
    for device in listed(status, "devices"):
        lines += ["", *device_facts(status, device, look)]
    print_lines([fold_ascii(line, look) for line in lines])
    return OK
