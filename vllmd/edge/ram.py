"""The machine's memory as the one device "cpu", for a machine without NVIDIA GPUs.

Total is what this process may have: the machine's, or less where its control group or one above says so. An instance's
use is anonymous and shared memory only. File-backed pages are not counted: they are page cache, mapped by all engines
at once (140-157 MiB in each process of vLLM, the same ones) and given back when anybody needs room, and a mapped weight
file would count its whole size.

vLLM's CPU worker looks elsewhere, at one NUMA node and the outermost control group; `engine_total` and `engine_free`
are what it will see (utils/cpu_resource_utils.py of vLLM 0.32).
"""

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllmd.facts import DeviceReading, Holder

#: Seconds between two looks at all processes of the machine; about 20 us each.
SCAN_EVERY = 30.0
#: Of others, this many of the largest are named.
NAMED = 8
#: A control group without a limit says "max", an old one a number near 2**63.
NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class Group:
    """One control group that may limit us: files of its limit, use and statistics; which of the last are page cache."""

    limit: Path
    usage: Path
    stat: Path
    cache: tuple[bytes, ...]


class Ram:
    """Reads /proc and the control groups. Not thread-safe: one reader."""

    def __init__(
        self, proc: Path = Path("/proc"), sys: Path = Path("/sys"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._proc, self._sys, self._clock = proc, sys, clock
        self._groups = find_groups(proc)
        self._name = cpu_name(proc)
        self._node = engine_node(proc, sys)
        self._holders: list[Holder] = []
        self._scanned: float | None = None

    def read(self, pids: Mapping[str, Iterable[int]]) -> DeviceReading:
        """One look; `pids` are those of each instance. Raises OSError when /proc itself cannot be read."""
        memory = fields((self._proc / "meminfo").read_bytes())
        total, free = memory[b"MemTotal"], memory[b"MemAvailable"]
        for group in self._groups:
            limit = number(group.limit)
            if limit is not None and limit < NO_LIMIT:
                total = min(total, limit)
                free = min(free, limit - group_use(group))
        free = max(0, min(free, total))
        ours = {pid for members in pids.values() for pid in members}
        instances = {who: sum(map(self._use, members)) for who, members in pids.items()}
        engine_total, engine_free = self._engine_view(memory)
        return DeviceReading(
            id="cpu",
            kind="cpu",
            index=None,
            name=self._name,
            total=total,
            used=total - free,
            engine_total=engine_total,
            engine_free=engine_free,
            instances={who: used for who, used in instances.items() if used},
            external=max(0, total - free - sum(instances.values())),
            processes=self._largest(ours),
        )

    def _use(self, pid: int) -> int:
        status = self._status(pid)
        return private(status) if status else 0

    def _status(self, pid: int | str) -> bytes | None:
        """/proc/PID/status; None for a process that has just gone. Plain calls: this runs 32 times for 8 models."""
        try:
            fd = os.open(f"{self._proc}/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return os.read(fd, 8192)
        except OSError:
            return None
        finally:
            os.close(fd)

    def _largest(self, ours: set[int]) -> tuple[Holder, ...]:
        """The largest processes that are not ours; the list is at most SCAN_EVERY old."""
        now = self._clock()
        if self._scanned is None or now - self._scanned >= SCAN_EVERY:
            self._scanned = now
            found = [
                Holder(int(name), field(status, b"Name").decode(errors="replace"), used)
                for name in os.listdir(self._proc)  # noqa: PTH208 - hot
                if name.isdecimal() and (status := self._status(name)) and (used := private(status))
            ]
            # Ours are kept out below, not here: an instance may start or end between two scans.
            self._holders = sorted(found, key=lambda holder: -holder.used)[: NAMED * 8]
        return tuple(holder for holder in self._holders if holder.pid not in ours)[:NAMED]

    def _engine_view(self, memory: Mapping[bytes, int]) -> tuple[int, int]:
        """Total and available as vLLM's CPU worker counts them: one NUMA node, and the limit of the outermost group."""
        try:
            lines = (self._sys / f"devices/system/node/node{self._node}/meminfo").read_bytes()
        except OSError:
            total, free = memory[b"MemTotal"], memory[b"MemAvailable"]
        else:
            here = fields(lines, skip=2)
            total = here[b"MemTotal"]
            free = sum(here.get(k, 0) for k in (b"MemFree", b"Active(file)", b"Inactive(file)", b"SReclaimable"))
        outermost = self._sys / "fs/cgroup"
        limit, used = number(outermost / "memory.max"), outermost / "memory.current"
        if limit is None:
            limit = number(outermost / "memory/memory.limit_in_bytes")
            used = outermost / "memory/memory.usage_in_bytes"
        if limit is not None and limit < total:
            total, free = limit, max(0, min(free, limit - (number(used) or 0)))
        return total, free


def fields(text: bytes, skip: int = 0) -> dict[bytes, int]:
    """Bytes by name from lines like "MemTotal:  123 kB", with `skip` words before the name ("Node 0 MemTotal: ...")."""
    found = {}
    for line in text.splitlines():
        words = line.split()[skip:]
        if len(words) >= 2 and words[1].isdigit():
            found[words[0].rstrip(b":")] = int(words[1]) * (1024 if words[-1] == b"kB" else 1)
    return found


def field(status: bytes, name: bytes) -> bytes:
    """The value of one line of a status file; b"" when it is missing."""
    _, found, rest = (b"\n" + status).partition(b"\n" + name + b":")
    return rest.partition(b"\n")[0].strip() if found else b""


def private(status: bytes) -> int:
    """Bytes of memory that belong to this process alone: RssAnon + RssShmem. A kernel thread or a zombie has none."""
    return sum(int(value.split()[0]) * 1024 for key in (b"RssAnon", b"RssShmem") if (value := field(status, key)))


def number(path: Path) -> int | None:
    """The number a file holds; None when it holds none ("max") or cannot be read."""
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):
        return None


def group_use(group: Group) -> int:
    """Bytes in use in a control group without its page cache, which goes when room is needed."""
    used = number(group.usage) or 0
    try:
        cache = fields(group.stat.read_bytes())
    except OSError:
        return used
    return max(0, used - sum(cache.get(key, 0) for key in group.cache))


def find_groups(proc: Path) -> tuple[Group, ...]:
    """Our control group and those above it, of both generations, as far as they can be seen from here."""
    try:
        mounts = (proc / "self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        lines = (proc / "self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    groups: list[Group] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        kind = "cgroup" if controllers else "cgroup2"
        for root, mount in (found for m in mounts if (found := mount_of(m, kind))):
            inner = path.removeprefix(root.rstrip("/")) if path.startswith(root) else "/"
            folder = mount / inner.lstrip("/")
            while folder.is_relative_to(mount):
                if folder.is_dir():
                    groups.append(group_at(folder, old=bool(controllers)))
                folder = folder.parent
            break
    return tuple(groups)


def mount_of(line: str, kind: str) -> tuple[str, Path] | None:
    """(root, mount point) of a line of mountinfo if it is a memory control group of this generation."""
    before, _, after = line.partition(" - ")
    words, rest = before.split(), after.split()
    if not rest or rest[0] != kind or (kind == "cgroup" and "memory" not in rest[-1].split(",")):
        return None
    return words[3], Path(words[4])


def group_at(folder: Path, *, old: bool) -> Group:
    """The files of one control group."""
    if old:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        cache: tuple[bytes, ...] = (b"total_inactive_file", b"total_active_file")
    else:
        names = ("memory.max", "memory.current", "memory.stat")
        cache = (b"inactive_file", b"active_file", b"slab_reclaimable")
    limit, usage, stat = (folder / name for name in names)
    return Group(limit, usage, stat, cache)


def engine_node(proc: Path, sys: Path) -> int:
    """The NUMA node of the first CPU we may use, if we may use its memory too, else the first node that we may."""
    cpu = min(os.sched_getaffinity(0))
    found = sorted((sys / f"devices/system/cpu/cpu{cpu}").glob("node[0-9]*"))
    node = int(found[0].name[4:]) if found else 0
    try:
        allowed = id_list(field((proc / "self/status").read_bytes(), b"Mems_allowed_list").decode())
    except (OSError, ValueError):
        return node
    return node if node in allowed or not allowed else min(allowed)


def id_list(text: str) -> set[int]:
    """The numbers of "0-2,4"."""
    ends = (part.partition("-") for part in text.split(",") if part)
    return {n for low, _, high in ends for n in range(int(low), int(high or low) + 1)}


def cpu_name(proc: Path) -> str:
    """The processor's own name, as far as the kernel tells."""
    try:
        text = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine() or "cpu"
