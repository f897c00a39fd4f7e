"""One line per device: who has its memory. The segments fill the whole line, so what is drawn adds up to the device.

    GPU 0 [dots-ocr 6.2=======|qwen3-vl 3.4>>>>|==|%|.|//] 0.3 of 12.0 GiB free

= model, > starting model, % other programs, . free, / kept back. Models come in configuration order.
"""

from __future__ import annotations

from vllmd.ctl.look import AMBER, CYAN, DIM, GREEN, Look
from vllmd.ctl.words import GIB, clean, field, gib, listed, number, pad, shorten, span, width

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PIPE_COLUMNS = 100  # a bar has to end somewhere
SILENT = 15.0  # seconds; devices are read every few


class Segment:
    """A part of a device's memory. `size` in bytes, `name` what may be written into it, `brief` where that is tight."""

    __slots__ = ("brief", "fill", "name", "sgr", "size")

    def __init__(self, size: float, fill: str, name: str = "", sgr: str = "", brief: str = "") -> None:
        self.size = size
        self.fill = fill
        self.name = name
        self.sgr = sgr
        self.brief = brief

    def label(self, cells: int, dots: str) -> str:
        """Name and size if they fit, if need be with the name cut, else nothing."""
        figure = f" {gib(self.size)}"
        room = cells - len(figure)
        if not self.name or room < width(self.brief or self.name[:5]):
            return ""
        name = self.name if width(self.name) <= room else self.brief or shorten(self.name, room, dots)
        return name + figure


def device_name(device: dict[str, Any]) -> str:
    """ "GPU 0", "MIG 1", "cpu"."""
    index = number(device.get("index"))
    label = f"{clean(device.get('kind')).upper()} {index:.0f}" if index is not None else clean(device.get("id"))
    return clean(device.get("label")) or label or "?"


def silence(device: dict[str, Any]) -> float:
    """Seconds without an answer from the driver; 0 while that is no longer than between two looks."""
    silent = field(device, "silent_s")
    return silent if silent >= SILENT else 0.0


def device_lines(status: dict[str, Any], look: Look) -> list[str]:
    """The bars of all devices, their ends aligned."""
    devices = listed(status, "devices")
    if not devices:
        return ["no device known: no memory to give"]
    names = [shorten(device_name(device), 12, look.dots) for device in devices]
    ends = [_end(device) for device in devices]
    left, right = max(map(width, names)), max(map(width, ends))
    inside = max(8, (look.columns or PIPE_COLUMNS) - left - right - 4)
    lines = []
    for device, name, end in zip(devices, names, ends, strict=True):
        bar = _draw(_segments(device, listed(status, "models")), inside, look)
        lines.append(f"{pad(name, left)} [{bar}] {pad(end, right, right=True)}")
    return lines


def holding(model: dict[str, Any], device: object) -> tuple[float, float]:
    """(reserved, used) bytes of a model on one device."""
    for part in listed(model, "per_device"):
        if part.get("id") == device:
            return field(part, "reserved"), field(part, "used")
    devices = model.get("devices")
    if not model.get("per_device") and isinstance(devices, list) and device in devices:
        return field(model, "reserved") / len(devices), field(model, "used") / len(devices)
    return 0.0, 0.0


def _end(device: dict[str, Any]) -> str:
    if silent := silence(device):
        return f"no answer for {span(silent)}"
    return f"{gib(field(device, 'free'))} of {gib(field(device, 'total'))} GiB free"


def _segments(device: dict[str, Any], models: list[dict[str, Any]]) -> list[Segment]:
    """Models, other programs, free, kept back: together the device."""
    total, external, free = field(device, "total"), field(device, "external"), field(device, "free")
    if silence(device) or total <= 0:
        return [Segment(1.0, "/", sgr=DIM)]
    parts = []
    for model in models:
        size = max(holding(model, device.get("id")))  # an overrun takes what it takes
        if size > 0:
            starting = model.get("state") == "starting"
            parts.append(Segment(size, ">" if starting else "=", clean(model.get("name")), CYAN if starting else ""))
    taken = sum(part.size for part in parts)
    rest = [Segment(external, "%", "other", DIM), Segment(free, ".", "", GREEN)]
    rest.append(Segment(max(0.0, total - taken - external - free), "/", "", DIM))
    # a few MiB between two readings are no part worth a cell
    return parts + [part for part in rest if part.size >= total / 1000]


def _draw(segments: list[Segment], inside: int, look: Look) -> str:
    """`inside` cells: each segment its share less its separator but one cell at least; the largest takes the rest."""
    segments = _join(segments, inside)
    total = sum(part.size for part in segments) or 1.0
    cells = [max(1, int(part.size / total * (inside + 1e-9)) - 1) for part in segments]
    largest = max(range(len(segments)), key=lambda at: segments[at].size)
    cells[largest] += inside - sum(cells) - (len(cells) - 1)
    if cells[largest] < 1:  # many small ones beside it
        cells = [1] * len(cells)
        cells[largest] += inside - 2 * len(cells) + 1
    drawn = []
    for part, count in zip(segments, cells, strict=True):
        label = part.label(count, look.dots)
        drawn.append(look.paint(part.sgr, label + part.fill * (count - width(label))))
    return "|".join(drawn)


def _join(segments: list[Segment], inside: int) -> list[Segment]:
    """Few enough segments: models below 1 % join, then ever larger ones until two cells are left for each."""
    total = sum(part.size for part in segments)
    small = [part for part in segments if part.fill in "=>" and part.size < total / 100]
    order = sorted((part for part in segments if part.fill in "=>"), key=lambda part: part.size)
    count = len(small) if len(small) > 1 else 0
    while len(segments) - max(0, count - 1) > max(4, inside // 4) and count < len(order):
        count += 1
    if count < 2:
        return segments
    joined = order[:count]
    size = sum(part.size for part in joined)
    kept = [part for part in segments if not any(part is gone for gone in joined)]
    at = sum(1 for part in kept if part.fill in "=>")
    return [*kept[:at], Segment(size, "=", f"{count} more", brief=f"+{count}"), *kept[at:]]


def device_facts(status: dict[str, Any], device: dict[str, Any], look: Look) -> list[str]:
    """The same ledger in words, for `vllmctl devices`: every byte has a line."""
    total, budget = field(device, "total"), field(device, "budget")
    title = f"{device_name(device)} {clean(device.get('name'))} ({clean(device.get('id'))})"
    rows = []
    for model in listed(status, "models"):
        reserved, used = holding(model, device.get("id"))
        if reserved or used:
            rows.append((clean(model.get("name")), gib(max(reserved, used)), f"reserved, {gib(used)} used"))
    external = unnamed = field(device, "external")
    for process in listed(device, "external_processes"):
        if (size := field(process, "used")) >= 0.05 * GIB:
            name = f"{clean(process.get('name'))}[{field(process, 'pid'):.0f}]"
            rows.append((name, gib(size), "not vllmd's"))
            unnamed -= size
    if unnamed >= 0.05 * GIB:
        rows.append(("other programs", gib(unnamed), "not vllmd's"))
    rows.append(("free", gib(field(device, "free")), ""))
    held = sum(max(holding(model, device.get("id"))) for model in listed(status, "models"))
    rows.append(("kept back", gib(max(0.0, total - held - external - field(device, "free"))), "reserve and limit"))
    names = max(width(row[0]) for row in rows)
    lines = [f"{title}: {gib(total)} GiB, budget {gib(budget)}"]
    if silent := silence(device):
        lines.append(f"  {look.paint(AMBER, f'no answer from the driver for {span(silent)}')}")
    lines += [f"  {pad(name, names)}  {size:>6}  {note}".rstrip() for name, size, note in rows]
    return lines
