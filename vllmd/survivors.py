"""What an earlier daemon left: engines to go on with, and processes that belong to nobody any more.

A record and a live process fit together by pid and start time, or, when the daemon was killed between a spawn and the
record of it, by the cookie in the environment. Marked processes that fit no record are ended; unmarked ones are never
touched.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vllmd.config.change import differing, digest
from vllmd.core.launch import socket_path
from vllmd.core.states import State
from vllmd.edge.journal import Log
from vllmd.edge.kill import kill_members
from vllmd.edge.leftovers import clear, clear_sockets, shared_files
from vllmd.edge.procfs import Member, read_stat
from vllmd.edge.records import Records
from vllmd.edge.tasks import in_thread
from vllmd.edge.tree import find_marked
from vllmd.record import Record, Survivor
from vllmd.spec import ModelSpec, Settings
from vllmd.veil import hide

READ_LIMIT = 10.0  # seconds that reading the records may take
LOOK_LIMIT = 5.0  # seconds that a look through /proc may take
Marked = tuple[tuple[Member, str], ...]


@dataclass(frozen=True, slots=True)
class Left:
    """What was found. `pids` by instance; `strays` are marked processes that fit no record."""

    survivors: tuple[Survivor, ...] = ()
    pids: Mapping[str, frozenset[int]] = field(default_factory=dict)
    strays: frozenset[Member] = frozenset()

    @property
    def scratch(self) -> frozenset[str]:
        """The scratch directories that are in use."""
        return frozenset(s.record.launch.scratch for s in self.survivors if s.spawned and s.record.launch)


async def look_back(kept: Records, settings: Settings, mark: str, log: Log) -> Left:
    """Read the records, match them with processes, end the strays, remove what is left of them."""
    unread: tuple[list[Record], list[str]] = ([], [f"cannot read {kept.directory}: it does not answer"])
    records, troubles = await in_thread(kept.read, READ_LIMIT, unread)
    nothing: Marked = ()
    marked = await in_thread(lambda: find_marked(mark + ":"), LOOK_LIMIT, nothing)
    for text in troubles:
        log.error(f"{text}; what it told of is ended and started anew")
    left = match(records, settings, marked)
    await end_strays(left.strays, log)
    sockets = stale_sockets(left, records, settings, marked)
    await in_thread(lambda: clear_sockets(sockets), LOOK_LIMIT, None)
    return left


def match(records: Sequence[Record], settings: Settings, marked: Marked) -> Left:
    """Which record is whose. A record of a state that this vllmd does not know is nobody's."""
    survivors, pids = [], {}
    claimed: set[Member] = set()
    for record in records:
        if record.state not in set(State):
            continue
        cookie = record.launch.cookie if record.launch else ""
        own = {member for member, other in marked if cookie and other == cookie}
        claimed |= own
        survivor = identify(record, own, settings)
        survivors.append(survivor)
        if own:
            pids[record.id] = frozenset(member.pid for member in own)
    return Left(tuple(survivors), pids, frozenset(member for member, _ in marked) - claimed)


def identify(record: Record, own: Collection[Member], settings: Settings) -> Survivor:
    """One record's processes: the leader, or what it left."""
    spec = settings.models.get(record.model)
    changed = differing(record.spec, digest(spec)) if spec is not None and record.spec else ()
    if record.pid is None and own:
        # Spawned and never told: the eldest of them leads the session, or did.
        eldest = min(own, key=lambda member: (member.start, member.pid))
        record = replace(record, pid=eldest.pid, pid_start=eldest.start)
    if record.pid is None or record.launch is None:
        return Survivor(record, spawned=False, changed=changed)
    stat = read_stat(record.pid)
    alive = stat is not None and stat.member.start == record.pid_start and not stat.dead
    return Survivor(record, spawned=True, alive=alive, changed=changed)


def to_keep(record: Record, spec: ModelSpec, secrets: frozenset[str]) -> Record:
    """The record as it goes to disk: with what the engine runs with, as digests, and without what is secret."""
    launch = record.launch
    if launch is not None:
        launch = replace(launch, env=hide(dict(launch.env), secrets))
    return replace(record, spec=digest(spec), launch=launch)


async def end_strays(strays: Collection[Member], log: Log) -> None:
    """End marked processes that no record tells of, and what they had in shared memory."""
    if not strays:
        return
    log.warning(
        "an earlier vllmd left processes that no record tells of: ending them", pids=sorted(m.pid for m in strays)
    )
    # Only a live process shows what it has mapped.
    files = await in_thread(lambda: shared_files(m.pid for m in strays), LOOK_LIMIT, frozenset[Path]())
    left = await kill_members(frozenset(strays))
    await in_thread(lambda: clear(files, "", ""), LOOK_LIMIT, None)
    if left:
        log.error("some of them cannot be killed", pids=list(left))


def stale_sockets(left: Left, records: Sequence[Record], settings: Settings, marked: Marked) -> frozenset[Path]:
    """Where engines that are gone may have left a socket: all names that we know of, but for those that go on."""
    names = {*settings.models, *(record.id for record in records)}
    names |= {cookie.split(":")[1] for _, cookie in marked if cookie.count(":") == 2}
    names -= {survivor.record.id for survivor in left.survivors if survivor.spawned}
    return frozenset(socket_path(settings.daemon.runtime_dir, name) for name in names)
