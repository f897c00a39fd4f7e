"""The status as text: a summary, a bar per device, a row per model; under it what is wrong and what to do.

A terminal is read from its end, so causes and remedies stand last, next to the prompt. Columns go before figures are
cut: a narrow terminal loses tokens/s and ages first, then requests, then memory. Names are cut in their middle.
"""

from __future__ import annotations

from vllmd.ctl.bar import device_lines
from vllmd.ctl.look import BOLD, DIM, RED, SIGNS, Look, ascii_of
from vllmd.ctl.words import clean, clip, field, gib, listed, nested, number, pad, shorten, span, width, wrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ORDER = tuple(SIGNS)  # rows: up, on the way, asleep, trouble, stopped
MOVING = ("starting", "waiting", "dozing", "waking", "draining", "stopping")
TROUBLE = ("backoff", "failed")
LOADED = ("ready", "starting", "dozing", "asleep", "waking", "draining", "stopping")
SHORT = 24  # columns of why.short, by contract
PHASES = {
    "import": "importing vLLM",
    "download": "downloading",
    "load": "weights",
    "measure": "measuring memory",
    "compile": "compiling",
    "graphs": "capturing graphs",
    "http": "opening the port",
}


class Column:
    """A column between MODEL and the last one. `floor` is its least width, `tier` what it takes to be shown."""

    __slots__ = ("floor", "head", "right", "tier")

    def __init__(self, head: str, floor: int, tier: int, right: bool = True) -> None:
        self.head = head
        self.floor = floor
        self.tier = tier
        self.right = right


COLUMNS = (
    Column("STATE", 8, 0, right=False),
    Column("GiB", 9, 1),
    Column("RUN", 3, 2),
    Column("WAIT", 4, 2),
    Column("TOK/S", 5, 3),
    Column("FOR", 6, 3),
)


def status_text(status: dict[str, Any], look: Look, everything: bool = False) -> list[str]:
    """The whole picture in lines that fit `look.columns`. Unless `everything`, stopped models fold into one line where
    `look.lines` is too few."""
    top = [summary(status, look), *device_lines(status, look)]
    models = in_order(listed(status, "models"))
    if not models:
        return [*top, "", *empty(status, look), *device_trouble(status, look)]
    below = [*problems(models, look), *device_trouble(status, look)]
    tail = ["", *below] if below else []
    fold = not everything and 0 < look.lines < len(top) + 2 + len(models) + len(tail) + 1
    stopped = [model for model in models if model.get("state") == "stopped"] if fold else []
    if len(stopped) > 1:
        models = [model for model in models if model.get("state") != "stopped"]
        tail = [folded(stopped, look), *tail]
    return [*top, "", *rows(models, look), *tail]


def empty(status: dict[str, Any], look: Look) -> list[str]:
    """What to do where nothing is configured."""
    config = clean(nested(status, "daemon").get("config")) or "the configuration"
    return [*wrap(f"No models yet. Add [models.NAME] to {config}, then run:", look.columns), "  vllmctl reload"]


def device_trouble(status: dict[str, Any], look: Look) -> list[str]:
    """What the driver has to complain about."""
    text = clean(nested(status, "daemon").get("trouble"))
    sign, sgr = look.sign("backoff")
    return (
        [look.paint(sgr, fold_ascii(line, look)) for line in wrap(f"{sign} devices: {text}", look.columns)]
        if text
        else []
    )


def in_order(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By state, then as configured."""
    return sorted(models, key=lambda model: ORDER.index(model["state"]) if model.get("state") in ORDER else len(ORDER))


def rows(models: list[dict[str, Any]], look: Look, heads: bool = True, picked: str | None = None) -> list[str]:
    """The table of these models, with its line of heads; a mark before the name of the one `picked`."""
    cells = [_cells(model) for model in models]
    sizes = [max([column.floor, *(width(row[at]) for row in cells)]) for at, column in enumerate(COLUMNS)]
    names = [clean(model.get("name")) for model in models]
    tier, room = _fit(max([5, *map(width, names)]), sizes, look.columns)
    shown = [at for at, column in enumerate(COLUMNS) if column.tier <= tier]
    start = 2 + room + sum(sizes[at] + 2 for at in shown) + 2
    lines = []
    if heads:
        line = "  " + pad("MODEL", room)
        for at in shown:
            line += "  " + pad(COLUMNS[at].head, sizes[at], COLUMNS[at].right)
        lines.append(look.paint(DIM, line.rstrip()))
    for model, name, row in zip(models, names, cells, strict=True):
        sign, sgr = look.sign(clean(model.get("state")))
        mark = " " if picked is None or name != picked else "▸" if look.unicode else ">"
        line = f"{look.paint(sgr, sign)}{mark}{pad(shorten(name, room, look.dots), room)}"
        for at in shown:
            text = pad(row[at], sizes[at], COLUMNS[at].right)
            line += "  " + (look.paint(sgr, text) if at == 0 else text)
        last = remark(model)
        if look.columns:
            last = clip(last, max(0, look.columns - start), look.dots)
        lines.append(f"{line}  {last}".rstrip())
    return [fold_ascii(line, look) for line in lines]


def _fit(longest: int, sizes: list[int], columns: int) -> tuple[int, int]:
    """(tier of columns to show, width of the name column) for a terminal of `columns`, 0 = no bound."""
    if not columns:
        return 3, max(16, longest)
    for tier, wish in ((3, 16), (2, 14), (1, 8), (0, 11)):
        taken = 2 + sum(size + 2 for size, column in zip(sizes, COLUMNS, strict=True) if column.tier <= tier) + 2
        room = columns - taken - SHORT
        if room >= wish:
            return tier, min(room, max(wish, longest))
    return 0, max(3, min(longest, (columns - taken) // 2))


def _cells(model: dict[str, Any]) -> list[str]:
    """Texts of COLUMNS. Zero requests and tokens stay blank: what moves is to catch the eye."""
    since = number(model.get("since_s"))
    return [
        clean(model.get("state")),
        memory(model),
        *(f"{rate:.0f}" if rate >= 0.5 else "" for rate in rates(model)),
        "" if since is None else span(since),
    ]


def rates(model: dict[str, Any]) -> tuple[float, float, float]:
    """Requests that run, that wait (in the engine or for it), and tokens per second."""
    waiting = field(model, "requests_waiting") + field(model, "requests_in_line")
    return field(model, "requests_running"), waiting, field(model, "tokens_per_s")


def memory(model: dict[str, Any]) -> str:
    """ "5.9/6.2" used/reserved; "/1.3" needed by one that is not loaded."""
    reserved, used, need = (number(model.get(key)) for key in ("reserved", "used", "need"))
    if model.get("state") in LOADED and reserved:
        return f"{'?' if used is None else gib(used)}/{gib(reserved)}"
    return "" if need is None else f"/{gib(need)}"


def remark(model: dict[str, Any]) -> str:
    """The last column: why it is not ready, or where it is."""
    short = clean(nested(model, "why").get("short"))
    state = model.get("state")
    if short:
        return short
    if state == "ready":
        return where(clean(model.get("endpoint")))
    if state != "starting":
        return ""
    phase = PHASES.get(clean(model.get("phase")), clean(model.get("phase")) or "starting")
    progress, eta = number(model.get("progress")), number(model.get("eta_s"))
    if progress is not None and 0 < progress < 1:
        phase += f" {progress * 100:.0f} %"
    return phase if eta is None else f"{phase}, {span(eta)} left"


def where(endpoint: str) -> str:
    """ ":8000" or "unix" of an endpoint."""
    if endpoint.startswith("unix:"):
        return "unix"
    return endpoint.rstrip("/")[endpoint.rfind(":") :] if endpoint.count(":") > 1 else endpoint


def problems(models: list[dict[str, Any]], look: Look) -> list[str]:
    """What is wrong, in sentences, each with what to do: failed, backoff, and warnings about ready models."""
    lines = []
    for model in models:
        state, why, name = clean(model.get("state")), nested(model, "why"), clean(model.get("name"))
        text = clean(why.get("text")).removeprefix(f"cannot start {name}: ")  # the name stands before it already
        if not text or not (state in TROUBLE or state == "ready"):
            continue
        sign, sgr = look.sign("backoff" if state == "ready" else state)
        sentence = wrap(f"{sign} {name}: {text}", look.columns)
        lines += [look.paint(sgr, line) for line in sentence] + remedies(why, look)
    return [fold_ascii(line, look) for line in lines]


def remedies(why: dict[str, Any], look: Look) -> list[str]:
    """ "  try: A   or   B", one below the other where that is too long. A remedy is never broken: it gets pasted."""
    texts = [text for each in listed(why, "remedies") if (text := clean(each.get("text")))]
    line = "  try: " + "   or   ".join(texts)
    if texts and look.columns and width(line) > look.columns:
        return ["  try: " + texts[0], *("   or: " + text for text in texts[1:])]
    return [line] if texts else []


def summary(status: dict[str, Any], look: Look, clock: str = "", lost: bool = False) -> str:
    """ "vllmd 0.1.0 on ws1, up 3 d: 1 of 8 models up, 3 moving, 2 need you", `clock` at the right end (red: `lost`)."""
    daemon, models = nested(status, "daemon"), listed(status, "models")
    up, moving, trouble = (
        sum(1 for model in models if model.get("state") in states) for states in (("ready",), MOVING, TROUBLE)
    )
    who = f"vllmd {clean(daemon.get('version'))}"
    text = f"{up} of {len(models)} model{'' if len(models) == 1 else 's'} up" if models else "no models configured"
    text += f", {moving} moving" if moving else ""
    text += f", {trouble} need{'s' if trouble == 1 else ''} you" if trouble else ""
    room = look.columns - (width(clock) + 2 if clock else 0)
    long = f"{who} on {clean(daemon.get('host'))}, up {span(field(daemon, 'uptime_s'))}: {text}"
    text = long if not look.columns or width(long) <= room else clip(f"{who}: {text}", room, look.dots)
    bold = look.paint(BOLD, fold_ascii(text, look))
    right = clock.rjust((look.columns or 100) - width(text)) if clock else ""
    return bold + (look.paint(RED, right) if lost else right)


def folded(stopped: list[dict[str, Any]], look: Look) -> str:
    """ "○ 83 stopped: a, b, … (--all)" in one line."""
    sign, sgr = look.sign("stopped")
    line, end = f"{sign} {len(stopped)} stopped: ", f"{look.dots} (--all)"
    for at, model in enumerate(stopped):
        name = clean(model.get("name")) + ("" if at == len(stopped) - 1 else ", ")
        if width(line + name + end) > look.columns:
            break
        line += name
    else:
        end = " (--all)"
    return look.paint(sgr, fold_ascii(line + end, look))


def fold_ascii(line: str, look: Look) -> str:
    """`line` in the characters that the terminal has."""
    return line if look.unicode or line.isascii() else ascii_of(line)
