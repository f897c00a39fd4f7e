"""The end of an engine: no process of it is left, and nothing of it in /dev/shm or on disk.

Killed are: the whole cgroup where there is one, the process group, then every member by pidfd, round by round until two
looks in a row find none; each wait is on pidfds. What may block as long as a driver does (reading maps, environ) runs
in a thread that is given up after its time: a process in the driver's hands must not take the daemon with it.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from vllmd.edge import cgroup, procfs, tree
from vllmd.edge.leftovers import clear, shared_files
from vllmd.edge.process import Child, reap_orphans
from vllmd.edge.procfs import Member
from vllmd.edge.strays import runaways, strays_of
from vllmd.edge.tasks import in_thread

ROUND = 10.0  # seconds that a killed process may take to end
LOOK = 5.0  # seconds that a look through /proc may take
TOTAL = 30.0  # seconds after which even a tree that forks on and on is given up

NONE: frozenset[Member] = frozenset()


async def kill_tree(
    child: Child, known: Iterable[Member] = (), *, files: frozenset[Path] = frozenset()
) -> tuple[int, ...]:
    """SIGKILL everything of this engine wherever it hid, reap it, remove its leftovers.

    `known` are members seen before (TreeWatch.known), `files` its files in /dev/shm seen before (shared_files). Returns
    the pids that could not be killed: uninterruptible ones, mostly in a driver.
    """
    first = tree.fast_members(child.leader, known, pids=cgroup.pids(child.cgroup))
    # Only a live process shows what it has mapped.
    held = await in_thread(lambda: shared_files(member.pid for member in first), 0.2, files)
    if child.cgroup is not None:
        cgroup.kill(child.cgroup)
    _kill_group(child)
    everyone = frozenset(known) | first

    def look() -> frozenset[Member]:
        strays = strays_of(child, procfs.read_table())
        return tree.members(child.leader, child.cookie, everyone, pids=cgroup.pids(child.cgroup) | strays)

    left = await _until_gone(first, look)
    reap_orphans(procfs.read_table())
    child.reap()  # last: until now it held the number of the group
    if child.cgroup is not None:
        cgroup.remove(child.cgroup)
    await in_thread(lambda: clear(files | held, child.scratch, child.endpoint), LOOK, None)
    return tuple(sorted(member.pid for member in left))


async def end_marked(prefix: str) -> tuple[int, ...]:
    """Kill what carries a cookie with this prefix: leftovers of an earlier daemon. Returns the pids that live on."""

    def look() -> frozenset[Member]:
        return frozenset(member for member, _ in tree.find_marked(prefix))

    left = await _until_gone(frozenset(), look)
    return tuple(sorted(member.pid for member in left))


async def end_runaways() -> tuple[int, ...]:
    """Kill whatever ran away from engines and came to us, whosever it was: for when no engine is to go on. Returns the pids
    that live on."""

    def look() -> frozenset[Member]:
        return frozenset(stat.member for stat in runaways(procfs.read_table()))

    left = await _until_gone(frozenset(), look)
    reap_orphans(procfs.read_table())
    return tuple(sorted(member.pid for member in left))


async def kill_members(found: frozenset[Member]) -> tuple[int, ...]:
    """Kill these and nothing else. Returns the pids that live on."""
    left = await _until_gone(found, lambda: frozenset(member for member in found if procfs.alive(member)))
    return tuple(sorted(member.pid for member in left))


async def _until_gone(found: frozenset[Member], look: Callable[[], frozenset[Member]]) -> frozenset[Member]:
    """Kill, wait, look again, until two looks in a row find none but the stuck, who are returned."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + TOTAL
    stuck: frozenset[Member] = frozenset()
    empty = 0
    while empty < 2 and loop.time() < deadline:
        if found:
            empty = 0
            stuck |= await _kill(found)
        else:
            empty += 1
        if empty < 2:
            # A look that is given up counts as empty: what hangs there hangs in the kernel, and is known as stuck.
            found = await in_thread(look, LOOK, NONE) - stuck
    return frozenset(member for member in stuck | found if procfs.alive(member))


async def _kill(found: frozenset[Member]) -> frozenset[Member]:
    """SIGKILL these and wait up to ROUND for their end; returns those that did not end."""
    fds = {fd: member for member in found if (fd := procfs.open_pidfd(member)) is not None}
    try:
        for fd in fds:
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue  # ended meanwhile; or it changed its user, and ends up as stuck
        running = await _wait_ended(set(fds), ROUND)
        # Only now: an orphan becomes our child, and so ours to reap, when its parent has ended too.
        for fd in fds.keys() - running:
            procfs.reap(fd)
        return frozenset(fds[fd] for fd in running)
    finally:
        for fd in fds:
            os.close(fd)


async def _wait_ended(fds: set[int], limit: float) -> set[int]:
    """Those of the pidfds whose process still runs after at most `limit` seconds."""
    loop = asyncio.get_running_loop()
    running = set(fds)
    done = asyncio.Event()

    def ended(fd: int) -> None:
        loop.remove_reader(fd)
        running.discard(fd)
        if not running:
            done.set()

    for fd in fds:
        loop.add_reader(fd, ended, fd)
    try:
        if running:
            async with asyncio.timeout(limit):
                await done.wait()
    except TimeoutError:
        pass
    finally:
        for fd in running:
            loop.remove_reader(fd)
    return running


def _kill_group(child: Child) -> None:
    """The group in one stroke, before it can fork. Only while the leader is our own child, running or not yet reaped:
    then its number cannot be a stranger's."""
    at = procfs.read_stat(child.leader.pid)
    if at is not None and at.member.start == child.leader.start and at.ppid == os.getpid():
        try:
            os.killpg(child.leader.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return
