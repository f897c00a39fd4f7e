"""What a daemon needs under its feet before it starts anything: directories, no leftovers, its own cgroup."""

import shutil
from pathlib import Path

from vllmd.core.launch import Places
from vllmd.edge import cgroup
from vllmd.edge.journal import Log
from vllmd.edge.kill import in_thread, sweep
from vllmd.edge.process import become_subreaper
from vllmd.edge.procfs import Member
from vllmd.edge.tree import find_marked
from vllmd.places import hf_home, mark_of, scratch_root
from vllmd.spec import DaemonSpec

LOOK_LIMIT = 5.0  # seconds that a look through /proc may take
CLEAR_LIMIT = 10.0


async def prepare(spec: DaemonSpec, log: Log) -> tuple[Places, Path | None]:
    """Where launches may put things, and the directory of our cgroup if systemd delegated one. What fails is logged; the
    daemon runs without it."""
    become_subreaper()
    for directory in (spec.state_dir, spec.runtime_dir, spec.log_dir, spec.cache_dir):
        try:
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as error:
            log.error(f"cannot make {directory}: {error.strerror}")
    mark = mark_of(spec.state_dir)
    scratch = scratch_root(spec.runtime_dir, mark)
    await end_leftovers(mark, log)
    await in_thread(lambda: shutil.rmtree(scratch, ignore_errors=True), CLEAR_LIMIT, None)
    root = cgroup.delegated_root()
    if root is not None and (trouble := cgroup.enter_supervisor(root)):
        log.warning(trouble)
    return Places(spec.runtime_dir, spec.cache_dir, scratch, mark, hf_home(spec.cache_dir)), root


async def end_leftovers(mark: str, log: Log) -> None:
    """End what an earlier daemon on this state directory left when it was killed: its marked processes, nothing else."""
    nothing: tuple[tuple[Member, str], ...] = ()
    found = await in_thread(lambda: find_marked(mark + ":"), LOOK_LIMIT, nothing)
    if not found:
        return
    log.warning("an earlier vllmd was killed and left processes: ending them", pids=[member.pid for member, _ in found])
    left = await sweep(mark + ":")
    if left:
        log.error("some of them cannot be killed", pids=list(left))
