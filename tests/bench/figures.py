"""A figure, the table of many, and the machine they were measured on."""

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value in `unit` ("s", "ms", "us", "%", "MiB", "x"). `target` is the most it may be, None: for
    comparison only. `detail` says how many there were and how they spread."""

    measure: str
    value: float
    unit: str
    target: float | None = None
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "ok" if self.value <= self.target else "over"


def at_most(values: Sequence[float], part: float) -> float:
    """The value that `part` of all do not exceed: the nearest-rank quantile."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(part * 1000) * len(ordered) // 1000) - 1)]


def spread(values: Sequence[float], factor: float = 1.0) -> str:
    """ "12 runs, 3.1 to 9.0"."""
    return f"{len(values)} runs, {min(values) * factor:.3g} to {max(values) * factor:.3g}"


def middle(measure: str, values: Sequence[float], unit: str, target: float | None = None, detail: str = "") -> Figure:
    """The median of seconds, in `unit`."""
    factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    said = f"median of {spread(values, factor)}"
    return Figure(measure, median(values) * factor, unit, target, f"{said}; {detail}" if detail else said)


def table(figures: Iterable[Figure]) -> str:
    """Markdown that lines up on a terminal too."""
    head = ("measure", "value", "target", "", "")
    rows = [(f.measure, shown(f.value, f.unit), shown(f.target, f.unit), f.verdict, f.detail) for f in figures]
    wide = [max(len(row[at]) for row in [head, *rows]) for at in range(5)]
    rule = ["-" * wide[0], "-" * (wide[1] - 1) + ":", "-" * (wide[2] - 1) + ":", "-" * wide[3], "-" * wide[4]]

    def line(cells: Sequence[str]) -> str:
        sides = ["<", ">", ">", "<", "<"]
        return "| " + " | ".join(f"{cell:{side}{n}}" for cell, side, n in zip(cells, sides, wide, strict=True)) + " |"

    return "\n".join(map(line, [head, rule, *rows]))


def shown(value: float | None, unit: str) -> str:
    """ "12.3 ms"; nothing for None."""
    if value is None:
        return ""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 or value == 0 else 3
    return f"{value:.{digits}f} {unit}"


def machine() -> str:
    """Cores, memory, kernel, Python; no names."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    release = ".".join(platform.release().split("-")[0].split(".")[:2])
    return (
        f"{len(os.sched_getaffinity(0))} cores ({platform.machine()}), {memory:.0f} GiB RAM,"
        f" Linux {release}, Python {platform.python_version()}"
    )


def as_json(figures: Iterable[Figure], load: str) -> dict[str, Any]:
    """All of a run, for --json."""
    return {"machine": machine(), "load": load, "figures": [asdict(f) | {"verdict": f.verdict} for f in figures]}
