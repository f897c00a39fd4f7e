"""`vllmd sweep`: end the models of a daemon that is gone and will not come back.

systemd runs it after every end of the service, because models outlive the daemon: after a crash and during a restart it
leaves them alone, after a stop it makes sure that none is left. A daemon that cannot start any more (OnFailure=) has its
models ended by it too. By hand it does the same for a daemon that was killed in a terminal.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from vllmd.edge import cgroup
from vllmd.edge.kill import end_marked
from vllmd.edge.leftovers import clear, shared_files
from vllmd.edge.procfs import Member
from vllmd.edge.records import Records, boot_id
from vllmd.edge.store import Store, Taken
from vllmd.edge.systemd import Unit, pending_job, unit_of
from vllmd.edge.tasks import in_thread
from vllmd.edge.tree import find_marked
from vllmd.places import mark_of
from vllmd.record import Record
from vllmd.units import count

COMES_BACK = frozenset({"restart", "try-restart", "start"})  # jobs after which a daemon is there
LIMIT = 10.0  # seconds that reading the records or clearing up may take


async def run(state_dir: Path, unit: str | None, environ: Mapping[str, str]) -> int:
    """Sweep or not; says in a line which and why. Exit code 0, or 1 when something is left or nothing may be done."""
    own = unit_of()
    target = sibling(own, unit) if unit else own
    why_not = await reason_to_leave(target, environ, by_name=unit is not None)
    if why_not:
        print(f"vllmd sweep: models are left alone: {why_not}", file=sys.stderr)
        return 0
    store = Store(state_dir)
    if not state_dir.is_dir():
        print(f"vllmd sweep: nothing to do: there is no {state_dir}", file=sys.stderr)
        return 0
    try:
        store.lock()
    except Taken as error:
        print(f"vllmd sweep: models are left alone: {error}", file=sys.stderr)
        return 0 if target else 1
    try:
        return await sweep(state_dir, target)
    finally:
        store.unlock()


async def reason_to_leave(unit: Unit | None, environ: Mapping[str, str], *, by_name: bool) -> str:
    """Why the models are to go on; "" when they are not."""
    if unit is None:
        return ""
    job = await pending_job(unit)
    if job in COMES_BACK:
        return f"systemd has a {job} job for {unit.name}"
    result = environ.get("SERVICE_RESULT", "")
    if by_name or job == "stop" or result in ("", "success"):
        return ""
    # OnFailure= comes when systemd has tried often enough.
    return f"vllmd ended badly ({result}), systemd starts it again"


async def sweep(state_dir: Path, unit: Unit | None) -> int:
    """End everything that carries our mark or is in a model's cgroup, and forget it."""
    records = Records(state_dir / "instances", boot_id())
    nothing: tuple[list[Record], list[str]] = ([], [])
    nobody: tuple[tuple[Member, str], ...] = ()
    known, _ = await in_thread(records.read, LIMIT, nothing)
    members = frozenset(m for m, _ in await in_thread(lambda: find_marked(mark_of(state_dir) + ":"), LIMIT, nobody))
    files = await in_thread(lambda: shared_files(member.pid for member in members), LIMIT, frozenset[Path]())
    killed = frozenset(member.pid for member in members)
    groups = model_groups(unit)
    for group in groups:
        killed |= cgroup.pids(group)
        cgroup.kill(group)
    left = await end_marked(mark_of(state_dir) + ":")
    for group in groups:
        cgroup.remove(group)

    def forget() -> None:
        clear(files, "", "")
        for launch in (record.launch for record in known if record.launch):
            clear((), launch.scratch, launch.endpoint)
        records.clear()

    await in_thread(forget, LIMIT, None)
    if left:
        print(f"vllmd sweep: cannot kill {', '.join(map(str, left))}", file=sys.stderr)
        return 1
    if killed:
        print(f"vllmd sweep: ended {count(len(killed), 'process', 'processes')} of models", file=sys.stderr)
    return 0


def sibling(own: Unit | None, name: str) -> Unit:
    """Another unit in our own slice, of the same manager."""
    above = os.path.dirname(own.cgroup) if own else "/system.slice"  # noqa: PTH120 - a cgroup's path, no file's
    return Unit(name, own.user if own else False, f"{above}/{name}")


def model_groups(unit: Unit | None) -> list[Path]:
    """The models' cgroups of a unit."""
    return [] if unit is None else cgroup.models(cgroup.MOUNT / unit.cgroup.lstrip("/"))
