"""What /proc says about processes, read once and believed only together with a start time.

A pid is a number that is given out again. So a process is named by (pid, start), start being the kernel's own: clock
ticks since boot, field 22 of /proc/PID/stat (proc(5)). Whatever is done to a process is done through a pidfd whose
start was compared after it was opened.

Only /proc/PID/stat is read on the event loop. environ, maps and fd need locks of the process itself and can block for
as long as its driver does; they are read in threads (vllmd/edge/kill.py).
"""

import fcntl
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")

_PF_EXITING = 0x4  # linux/sched.h
_PIDFD_INFO_EXIT, _PIDFD_INFO_SIZE = 1 << 3, 64
_PIDFD_GET_INFO = 3 << 30 | _PIDFD_INFO_SIZE << 16 | 0xFF << 8 | 11  # _IOWR(0xFF, 11, struct pidfd_info)


@dataclass(frozen=True, slots=True)
class Member:
    """One process: `name` is the kernel's (at most 15 characters), `start` clock ticks since boot."""

    pid: int
    name: str
    start: int


@dataclass(frozen=True, slots=True)
class Stat:
    """One line of /proc/PID/stat, as far as needed. `dead`: nothing but an exit status is left of it. `dying`: dead, or
    on the way: it has closed its files, or is about to, and runs nothing of its own any more."""

    member: Member
    ppid: int
    pgid: int
    session: int
    dead: bool
    dying: bool = False


Table = Mapping[int, Stat]


def parse_stat(text: str) -> Stat:
    """One /proc/PID/stat. The name may hold blanks and parentheses, so the last ")" ends it."""
    head, _, tail = text.rpartition(")")
    pid, _, name = head.partition(" (")
    fields = tail.split()
    # A leader thread that has ended shows as Z while other threads of the process still run, maybe inside a driver and
    # holding memory: dead means that it is the last one.
    dead = fields[0] in "ZXx" and int(fields[17]) <= 1
    dying = dead or bool(int(fields[6]) & _PF_EXITING)
    return Stat(Member(int(pid), name, int(fields[19])), int(fields[1]), int(fields[2]), int(fields[3]), dead, dying)


def read_stat(pid: int) -> Stat | None:
    """The process as it is now; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - hot
            return parse_stat(file.read())
    except (OSError, ValueError, IndexError):
        return None


def read_table() -> Table:
    """All processes. About 20 us each."""
    found = (read_stat(int(name)) for name in os.listdir("/proc") if name.isdecimal())  # noqa: PTH208 - hot
    return {stat.member.pid: stat for stat in found if stat}


def alive(member: Member) -> bool:
    """Whether this very process still runs."""
    stat = read_stat(member.pid)
    return stat is not None and stat.member.start == member.start and not stat.dead


def open_pidfd(member: Member) -> int | None:
    """A pidfd of this very process (dead but not yet reaped counts), for the caller to close; None when it is gone."""
    try:
        fd = os.pidfd_open(member.pid)
    except OSError:
        return None
    stat = read_stat(member.pid)
    if stat is not None and stat.member.start == member.start:
        return fd
    os.close(fd)
    return None


def reap(pidfd: int, *, keep: bool = False) -> int | None:
    """The exit status (negative = signal) of an ended child of ours; None when it runs or is not our child.

    `keep` leaves it a zombie, so that its pid, and with it its group and session numbers, cannot be given out again.
    """
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | (os.WNOWAIT if keep else 0))
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def exit_of_stranger(pidfd: int) -> int | None:
    """The exit status of an ended process that is not our child, once its parent has reaped it; None when the kernel does
    not tell (before Linux 6.15) or not yet. PIDFD_GET_INFO of linux/pidfd.h."""
    info = bytearray(struct.pack("=Q", _PIDFD_INFO_EXIT).ljust(_PIDFD_INFO_SIZE, b"\0"))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info, True)
    except OSError:
        return None
    mask, code = struct.unpack_from("=Q52xi", info)
    return os.waitstatus_to_exitcode(code) if mask & _PIDFD_INFO_EXIT else None


def pid_of(pidfd: int) -> int | None:
    """Whose pidfd it is; None for a process that is gone or a descriptor of another kind."""
    try:
        text = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    except OSError:
        return None
    found = text.partition("\nPid:\t")[2].partition("\n")[0]
    return int(found) if found.isdecimal() else None


def environ(pid: int) -> Mapping[str, str]:
    """The environment a process was started with; empty when it is not ours to read. May block: not on the loop."""
    try:
        data = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.partition("=") for item in data.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs if name}


def same_user(pid: int) -> bool:
    """Whether the process runs as our user."""
    try:
        return (PROC / str(pid)).stat().st_uid == os.geteuid()
    except OSError:
        return False


def bytes_read(pid: int) -> int:
    """Bytes that the process has read so far, page cache included; 0 when it cannot be told."""
    try:
        text = Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return 0
    return int(text.partition("rchar: ")[2].partition("\n")[0] or 0)
