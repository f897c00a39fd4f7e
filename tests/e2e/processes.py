"""Processes of an engine, told apart by number and start, and when exactly each of them died."""

import os
import select
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds; how exactly the kernel tells when a process began
DEAD_WITHIN = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class Process:
    """`began` in seconds since boot."""

    pid: int
    began: float
    name: str
    cookie: str


def find(cookie: str) -> list[Process]:
    """Live processes whose cookie begins so, oldest first."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    found = [process for pid in pids if (process := read(pid))]
    return sorted((p for p in found if p.cookie.startswith(cookie)), key=lambda p: (p.began, p.pid))


def read(pid: int) -> Process | None:
    """The process as it is now; None when it is gone, a zombie, or none of an engine's."""
    folder = Path(f"/proc/{pid}")
    try:
        cookie = next(
            (each[13:] for each in (folder / "environ").read_bytes().split(b"\0") if each.startswith(b"VLLMD_COOKIE=")),
            b"",
        )
        name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
    except OSError:
        return None
    fields = rest.split()
    if not cookie or fields[0] == "Z":
        return None
    return Process(pid, int(fields[19]) * TICK, name, cookie.decode())


def shared_memory(processes: Iterable[Process]) -> set[Path]:
    """The files in /dev/shm that these have mapped."""
    maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in processes)
    return {Path(line.split(maxsplit=5)[5]) for line in maps.splitlines() if " /dev/shm/" in line}


class Deaths:
    """Watches processes die, each by a pidfd; `at` is when, in seconds since boot."""

    def __init__(self, processes: Iterable[Process]) -> None:
        self.at: dict[Process, float] = {}
        self._fds = {os.pidfd_open(process.pid): process for process in processes}
        # Opened by number: only now it is certain that the number still was theirs.
        assert all(read(process.pid) == process for process in self._fds.values())
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        poll = select.poll()
        for fd in self._fds:
            poll.register(fd, select.POLLIN)
        limit = time.monotonic() + 10 * DEAD_WITHIN
        while len(self.at) < len(self._fds) and time.monotonic() < limit:
            for fd, _ in poll.poll(1000):
                self.at[self._fds[fd]] = time.clock_gettime(time.CLOCK_BOOTTIME)
                poll.unregister(fd)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._thread.join(DEAD_WITHIN)
        if not self._thread.is_alive():
            for fd in self._fds:
                os.close(fd)
        if kind is None:
            assert not self._thread.is_alive(), f"still alive: {set(self._fds.values()) - set(self.at)}"

    @property
    def last(self) -> float:
        """When the last of them died."""
        assert len(self.at) == len(self._fds), f"still alive: {set(self._fds.values()) - set(self.at)}"
        return max(self.at.values())
