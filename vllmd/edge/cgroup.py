"""A cgroup of its own per engine, where systemd has delegated us ours (Delegate=yes). Without one all works by session.

What it gives: a kill that nothing escapes (cgroup.kill), the memory of exactly this engine, and an out-of-memory kill
that takes all of it at once instead of one worker. Controllers can be enabled for children only after the daemon has
left the unit's top cgroup (else EBUSY), so it moves to supervisor/.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PREFIX = "model-"
MOUNT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
_DELEGATED = ("user.delegate", "trusted.delegate")  # the second, older one is readable for root alone


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in use now and at most so far, and how often the kernel killed here for lack of memory."""

    current: int
    peak: int | None
    oom_kills: int


def delegated_root(mount: Path = MOUNT, own: Path = OWN) -> Path | None:
    """The cgroup v2 directory that systemd gave us; None when there is none or we may not write there."""
    try:
        line = next(line for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    here = mount / line.removeprefix("0::").lstrip("/")
    # Up from where we are: after a restart without a stop we may be born in supervisor/ again (DelegateSubgroup=).
    for directory in (here, here.parent):
        if directory.is_relative_to(mount) and _is_delegated(directory):
            return directory if os.access(directory / "cgroup.procs", os.W_OK) else None
    return None


def of_user_unit(path: str, mount: Path = MOUNT) -> Path | None:
    """The directory of a user's own service, which its manager does not mark as delegated (systemd 252): ours if we may
    write there. Only for the service that we are: another's would be taken away from it."""
    directory = mount / path.lstrip("/")
    return directory if os.access(directory / "cgroup.procs", os.W_OK) else None


def enter_supervisor(root: Path) -> str:
    """Move ourselves to supervisor/ and let children have the memory and pids controllers.

    Returns what is missing, as a sentence, or "". Accounting is a gift: its absence fails nothing.
    """
    try:
        (root / "supervisor").mkdir(exist_ok=True)
        (root / "supervisor" / "cgroup.procs").write_text("0")
        for controller in {"memory", "pids"} & set((root / "cgroup.controllers").read_text().split()):
            (root / "cgroup.subtree_control").write_text(f"+{controller}")
    except OSError as error:
        return f"cannot set up {root} for models: {error.strerror} (memory is counted by process instead)"
    return ""


def make(root: Path, name: str, memory_max: int | None = None) -> Path | None:
    """A directory for one engine, whose processes an out-of-memory kill takes together; there already is fine. None when
    it cannot be made. `memory_max` bytes are its limit, where the kernel has the controller for that."""
    path = root / (PREFIX + name.replace("/", "-"))
    try:
        path.mkdir(exist_ok=True)
    except OSError:
        return None
    for file, value in (("memory.oom.group", "1"), ("memory.max", str(memory_max or "max"))):
        try:
            (path / file).write_text(value)
        except OSError:
            break  # no memory controller here
    return path


def models(root: Path) -> list[Path]:
    """The directories of engines below a unit's."""
    try:
        return sorted(path for path in root.iterdir() if path.name.startswith(PREFIX) and path.is_dir())
    except OSError:
        return []


def kill(path: Path) -> bool:
    """SIGKILL everything in it at once. False when the kernel (before 5.14) or the directory does not offer that."""
    try:
        (path / "cgroup.kill").write_text("1")
    except OSError:
        return False
    return True


def pids(path: Path | None) -> frozenset[int]:
    """The processes in it and below; empty for None and for what is gone."""
    if path is None:
        return frozenset()
    return frozenset(
        int(line) for directory in _tree(path) for line in _read(directory / "cgroup.procs").split() if line != "0"
    )


def memory(path: Path) -> Memory | None:
    """What it uses; None where memory is not counted."""
    current = _read(path / "memory.current").strip()
    if not current:
        return None
    peak = _read(path / "memory.peak").strip()  # since Linux 5.19
    events = dict(line.split() for line in _read(path / "memory.events").splitlines())
    return Memory(int(current), int(peak) if peak else None, int(events.get("oom_kill", 0)))


def remove(path: Path) -> bool:
    """Remove it with all below. False while a process is left there."""
    try:
        for directory in sorted(_tree(path), key=lambda p: len(p.parts), reverse=True):
            directory.rmdir()
    except OSError:
        return not path.exists()
    return True


def _is_delegated(directory: Path) -> bool:
    for name in _DELEGATED:
        try:
            if os.getxattr(directory, name) == b"1":
                return True
        except OSError:
            continue
    return False


def _tree(path: Path) -> Iterator[Path]:
    for name, _, _ in os.walk(path):
        yield Path(name)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
