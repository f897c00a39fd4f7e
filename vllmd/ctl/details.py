"""`vllmctl why`, `show`, `plan`, `devices`: one answer of vllmd, spelt out."""

from __future__ import annotations

from vllmd.ctl.bar import device_facts, device_lines
from vllmd.ctl.call import print_json, print_lines
from vllmd.ctl.faults import NO_ROOM, OK, Garbled
from vllmd.ctl.look import AMBER, GREEN, SIGNS, Look
from vllmd.ctl.table import fold_ascii, remedies
from vllmd.ctl.words import clean, field, listed, nested, number, sized, span, wrap

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
            lines += spell(key, value, "  ")
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


SIZES = {"need", "reserved", "used", "total", "weights", "base", "kv", "size", "vram", "kv_cache", "budget", "external"}


def spell(key: str, value: object, indent: str = "") -> list[str]:
    """`value` as indented text. Command lines are spelt to be pasted; nothing is left out but what is empty."""
    name = clean(key)
    match value:
        case _ if value in (None, "", [], {}):
            return []
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
        case int() | float() if key.endswith("_s"):
            return [f"{indent}{name.removesuffix('_s')}: {span(value)}"]
    return [f"{indent}{name}: {clean(value)}"]


def plan(call: Call) -> int:
    """Who would fit, with which flags; NO_ROOM if somebody that was named does not."""
    names = call.args.models
    answer = call.client.post("/api/v1/plan", {"models": names}) if names else answered(call, "/api/v1/plan")
    if not isinstance(answer, dict):
        raise Garbled("cannot read the plan: it is no object")
    rows = next((listed(answer, key) for key in answer if listed(answer, key)), [])
    if call.args.json:
        print_json(answer)
    else:
        print_lines([line for row in rows for line in plan_lines(row, call.look)] or ["nothing to plan"])
        if text := clean(answer.get("text")):
            print_lines([fold_ascii(text, call.look)])
    return NO_ROOM if names and not all(row.get("fits") for row in rows) else OK


def plan_lines(row: dict[str, Any], look: Look) -> list[str]:
    """ "● chat fits on GPU 0: 5.0 GiB (measured)", its parts and flags below; or why it does not."""
    name, need = clean(row.get("model") or row.get("name")), number(row.get("need"))
    size = f"{sized(need)}" if need else "?"
    if not row.get("fits"):
        sign = "×" if look.unicode else "x"
        text = clean(row.get("text")).removeprefix(f"cannot start {name}: ") or f"needs {size}, does not fit"
        return [fold_ascii(line, look) for line in wrap(f"{look.paint(AMBER, sign)} {name}: {text}", look.columns)]
    devices = row.get("devices")
    where = ", ".join(clean(each) for each in devices) if isinstance(devices, list) else ""
    how = "measured" if row.get("measured") else "estimated"
    now = ", but not beside what runs now" if row.get("fits_now") is False else ""
    head = f"{name} fits{' on ' + where if where else ''}: {size} ({how}){now}"
    lines = [f"{look.paint(GREEN, look.sign('ready')[0])} {head}"]
    parts = [f"{clean(part.get('label'))} {sized(field(part, 'size'))}" for part in listed(row, "parts")]
    lines += wrap("    " + " + ".join(parts), look.columns, "    ") if parts else []
    lines += spell("flags", row.get("flags"), "    ") + spell("beside", row.get("beside"), "    ")
    return [fold_ascii(line, look) for line in lines]


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
