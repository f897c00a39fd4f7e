"""CPU and memory of processes, all of them at one moment, so that what others took is known too."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Row:
    """Of one process: seconds of CPU with those of children that have ended, bytes of memory."""

    parent: int
    cpu: float
    rss: int


@dataclass(frozen=True, slots=True)
class Moment:
    """All processes as they are, and the seconds that the host kept from this machine."""

    rows: Mapping[int, Row]
    stolen: float

    def tree(self, root: int, without: Path | None = None) -> Iterator[int]:
        """A process and all below it; `without` those that run a certain program, and what is below these."""
        if root not in self.rows or (without is not None and runs(root, without)):
            return
        yield root
        for pid, row in self.rows.items():
            if row.parent == root:
                yield from self.tree(pid, without)

    def cpu(self, root: int, without: Path | None = None) -> float:
        return sum(self.rows[pid].cpu for pid in self.tree(root, without))

    def rss(self, root: int, without: Path | None = None) -> int:
        return sum(self.rows[pid].rss for pid in self.tree(root, without))

    @property
    def others(self) -> float:
        """Seconds of CPU that went to anybody but us and what is below us."""
        return sum(row.cpu for row in self.rows.values()) - self.cpu(os.getpid()) + self.stolen


def moment() -> Moment:
    """Now."""
    rows = {
        int(folder.name): row for folder in Path("/proc").iterdir() if folder.name.isdigit() and (row := read(folder))
    }
    stolen = int(Path("/proc/stat").read_text().split(maxsplit=9)[8])
    return Moment(rows, stolen / TICKS)


def read(folder: Path) -> Row | None:
    """None when it has just ended."""
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return Row(int(fields[1]), sum(map(int, fields[11:15])) / TICKS, int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))


def runs(pid: int, program: Path) -> bool:
    """Whether a process runs this file."""
    try:
        return Path(f"/proc/{pid}/exe").readlink() == program.resolve()
    except OSError:
        return False
