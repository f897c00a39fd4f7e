"""Processes that ran away from their engine: another session, no parent, and an environment without the cookie.

They come to us, since the daemon is the subreaper of all that it starts: a live child of ours that we did not start, in
another session than ours, was an engine's. Which one's is told by what it could not shake off (its working directory, its
TMPDIR, the log that it writes to), or by there being only one engine that can have made it. What an adopted engine loses
goes to init instead; then only what it writes to or has as its TMPDIR counts, as a process of ours could be anybody's.
"""

import ctypes
import os
from pathlib import Path

from vllmd.edge.process import Child, leaders, parked
from vllmd.edge.procfs import PROC, Stat, Table, environ, read_table, same_user
from vllmd.edge.tree import COOKIE

_PR_GET_CHILD_SUBREAPER = 37


def runaways(table: Table) -> list[Stat]:
    """Live children of ours that we did not start."""
    if not _is_subreaper():
        return []
    own, session, started = os.getpid(), os.getsid(0), parked() | leaders().keys()
    return [
        stat for stat in table.values()
        if stat.ppid == own and stat.session != session and not stat.dead and stat.member.pid not in started
    ]  # fmt: skip


def strays_of(child: Child, table: Table) -> set[int]:
    """Those that ran away from this engine. May block: not on the loop."""
    if leaders().get(child.pid) is child:
        late = [stat for stat in runaways(table) if stat.member.start >= child.leader.start]
        return {stat.member.pid for stat in late if _bears(stat, child, own=True) or _only_of(stat, child)}
    own, session = os.getpid(), os.getsid(0)
    return {
        pid for pid, stat in table.items()
        if stat.member.start >= child.leader.start and not stat.dead and own not in (pid, stat.ppid)
        and stat.session != session and same_user(pid) and _bears(stat, child, own=False)
    }  # fmt: skip


def doubtful(child: Child) -> tuple[int, ...]:
    """Runaways that may be of this engine, or of another that still runs. May block: not on the loop."""
    others = [other for other in leaders().values() if other is not child]
    return tuple(
        stat.member.pid for stat in runaways(read_table())
        if stat.member.start >= child.leader.start and not any(_bears(stat, other, own=True) for other in others)
    )  # fmt: skip


def _only_of(stat: Stat, child: Child) -> bool:
    """Whether this engine was there when the process began, and no other of ours."""
    return stat.member.start >= child.leader.start and not any(
        other is not child and other.leader.start <= stat.member.start for other in leaders().values()
    )


def _bears(stat: Stat, child: Child, *, own: bool) -> bool:
    """Whether the process has something of the engine on it. `own`: both are ours, so that numbers and directories count."""
    pid, scratch, env = stat.member.pid, child.scratch, environ(stat.member.pid)
    if (own and child.pid in (stat.session, stat.pgid)) or env.get(COOKIE) == child.cookie:
        return True
    if scratch and (env.get("TMPDIR") == scratch or (own and _is_below(_cwd(pid), scratch))):
        return True
    return child.log is not None and _writes(pid, child.log)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith((folder + "/", folder + " (deleted)"))


def _cwd(pid: int) -> str:
    try:
        return os.readlink(PROC / str(pid) / "cwd")  # noqa: PTH115 - "(deleted)" is no part of a path
    except OSError:
        return ""


def _writes(pid: int, log: tuple[int, int]) -> bool:
    """Whether it has the file open for more than reading: who looks at a log is not its engine."""
    try:
        fds = list((PROC / str(pid) / "fd").iterdir())
    except OSError:
        return False
    for fd in fds:
        try:
            found = fd.stat()
            if (found.st_dev, found.st_ino) == log and _mode(pid, fd.name) & os.O_ACCMODE:
                return True
        except (OSError, ValueError):
            continue
    return False


def _mode(pid: int, fd: str) -> int:
    text = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
    return int(text.partition("flags:\t")[2].partition("\n")[0], 8)


def _is_subreaper() -> bool:
    """Whether orphans come to us. If not, our children are those that somebody in this program has started."""
    found = ctypes.c_int()
    ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(found), 0, 0, 0)
    return bool(found.value)
