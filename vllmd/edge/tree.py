"""Which processes belong to an engine, and when one of them dies.

vLLM's processes share the leader's session, and survive its death (vLLM 0.32: the API server killed, EngineCore, Worker
and resource tracker still there 19 minutes later). Anything may also leave: setsid, a double fork. Four signs together
find them: session or process group of the leader; descent; the cgroup; the cookie in the environment. The first two
come from one pass over /proc/*/stat; the cookie costs a read per process and is looked for rarely, and when killing.
"""

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from vllmd.edge.procfs import Member, Stat, Table, environ, open_pidfd, read_stat, read_table, reap, same_user

COOKIE = "VLLMD_COOKIE"
ENGINE_PREFIX = "VLLM::"  # vLLM's VLLM_PROCESS_NAME_PREFIX


def fast_members(
    leader: Member, known: Iterable[Member] = (), *, pids: frozenset[int] = frozenset(), table: Table | None = None
) -> frozenset[Member]:
    """Every live process of the leader's session or group, of `known`, of `pids` (a cgroup's), and what descends from
    these. `known` keeps those that left the session and lost their parent after an earlier look."""
    table = read_table() if table is None else table
    at_leader = table.get(leader.pid)
    # The number stays taken while a group or session bears it. Another process there: ours is gone, that is a stranger.
    reused = at_leader is not None and at_leader.member.start != leader.start
    remembered = {(member.pid, member.start) for member in known}

    def belongs(stat: Stat) -> bool:
        member = stat.member
        if member.start < leader.start:
            return False
        if not reused and leader.pid in (member.pid, stat.pgid, stat.session):
            return True
        return member.pid in pids or (member.pid, member.start) in remembered

    return _live(_with_descendants({pid for pid, stat in table.items() if belongs(stat)}, table), table)


def members(
    leader: Member, cookie: str, known: Iterable[Member] = (), *, pids: frozenset[int] = frozenset()
) -> frozenset[Member]:
    """As fast_members, and every process of our user that carries the cookie. May block: not on the loop."""
    table = read_table()
    found = fast_members(leader, known, pids=pids, table=table)
    seen = {member.pid for member in found}
    marked = {
        pid for pid, stat in table.items()
        if pid not in seen and not stat.dead and stat.member.start >= leader.start and _cookie_of(pid) == cookie
    }  # fmt: skip
    return found | _live(_with_descendants(marked, table), table)


def find_marked(prefix: str) -> tuple[tuple[Member, str], ...]:
    """Live processes of our user whose cookie starts so, with the cookie: what a killed daemon left. May block.

    Nothing else is taken, not even what descends from them: a process without the mark is never touched.
    """
    if not prefix:
        raise ValueError("cannot look for marked processes: an empty prefix means every process")
    found = ((stat.member, _cookie_of(pid)) for pid, stat in read_table().items() if not stat.dead)
    return tuple((member, cookie) for member, cookie in found if cookie.startswith(prefix))


def _cookie_of(pid: int) -> str:
    if pid in (1, os.getpid()) or not same_user(pid):
        return ""
    return environ(pid).get(COOKIE, "")


def _with_descendants(pids: set[int], table: Table) -> set[int]:
    children: dict[int, list[Stat]] = {}
    for stat in table.values():
        children.setdefault(stat.ppid, []).append(stat)
    found, todo = set(pids), list(pids)
    while todo:
        parent = table[todo.pop()]
        for child in children.get(parent.member.pid, ()):
            if child.member.pid not in found and child.member.start >= parent.member.start:
                found.add(child.member.pid)
                todo.append(child.member.pid)
    return found


def _live(pids: set[int], table: Table) -> frozenset[Member]:
    return frozenset(table[pid].member for pid in pids - {1, os.getpid()} if not table[pid].dead)


class TreeWatch:
    """Sees the death of an engine's processes through pidfds. The owner calls `look` now and then for new ones.

    `died` is called once, with the first engine process that ends; the leader is not one: Child.wait reports it. Engine
    processes are those with vLLM's title; where none has it when `ready` is called, those that run the leader's
    executable then. The compilers that come and go while an engine starts are none.
    """

    def __init__(self, leader: Member, died: Callable[[Member], None]) -> None:
        self.leader = leader
        self.known: frozenset[Member] = frozenset()  # live at the last look
        self._died = died
        self._fds: dict[tuple[int, int], int] = {}  # (pid, start) -> pidfd
        self._kin: frozenset[tuple[int, int]] = frozenset()
        self._told = False

    def look(self, *, pids: frozenset[int] = frozenset(), table: Table | None = None) -> frozenset[Member]:
        """Find the members anew and watch those that are new. Call it on the loop."""
        loop = asyncio.get_running_loop()
        self.known = fast_members(self.leader, self.known, pids=pids, table=table)
        for member in self.known:
            key = (member.pid, member.start)
            if key not in self._fds and (fd := open_pidfd(member)) is not None:
                self._fds[key] = fd
                loop.add_reader(fd, self._ended, member)
        return self.known

    def ready(self, *, pids: frozenset[int] = frozenset()) -> frozenset[Member]:
        """The engine serves: what must live from now on is settled. Returns the members."""
        found = self.look(pids=pids)
        if not any(member.name.startswith(ENGINE_PREFIX) for member in found):
            own = _executable(self.leader.pid)
            self._kin = frozenset((m.pid, m.start) for m in found if own and _executable(m.pid) == own)
        return found

    def close(self) -> None:
        """Watch nothing any more. May be called twice."""
        loop = asyncio.get_running_loop()
        for fd in self._fds.values():
            loop.remove_reader(fd)
            os.close(fd)
        self._fds.clear()

    def _ended(self, member: Member) -> None:
        key = (member.pid, member.start)
        # vLLM gives a process its title some time after it was first seen; a zombie still bears it.
        now = read_stat(member.pid)
        seen = next((m for m in self.known if (m.pid, m.start) == key), member)
        last = now.member if now and now.member.start == member.start else seen
        fd = self._fds.pop(key)
        asyncio.get_running_loop().remove_reader(fd)
        is_leader = member.pid == self.leader.pid
        if not is_leader:  # the leader stays a zombie until kill_tree is through: it pins the group's number
            reap(fd)
        os.close(fd)
        self.known = frozenset(m for m in self.known if (m.pid, m.start) != key)
        if not is_leader and not self._told and self._counts(last):
            self._told = True
            # A worker follows its engine within the millisecond, and may be through before it: a killed process closes its
            # files first. Of all that are dying by now the eldest is the cause.
            others = {m for m in self.known if m.pid != self.leader.pid and self._counts(m) and _is_dying(m)}
            self._died(min({last} | others, key=lambda m: (m.start, m.pid)))

    def _counts(self, member: Member) -> bool:
        """Whether it is a part of the engine, not a passing compiler."""
        return member.name.startswith(ENGINE_PREFIX) or (member.pid, member.start) in self._kin


def _is_dying(member: Member) -> bool:
    stat = read_stat(member.pid)
    return stat is None or stat.member.start != member.start or stat.dying


def _executable(pid: int) -> Path | None:
    try:
        return Path(os.readlink(f"/proc/{pid}/exe"))  # noqa: PTH115 - the target need not exist any more
    except OSError:
        return None
