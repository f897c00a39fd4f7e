"""What a daemon needs under its feet before it starts anything: directories, its own cgroup, and a clear view of what an
earlier daemon left."""

import shutil
from collections.abc import Collection
from pathlib import Path

from vllmd.core.launch import Places
from vllmd.edge import cgroup
from vllmd.edge.journal import Log
from vllmd.edge.kill import in_thread
from vllmd.edge.process import become_subreaper
from vllmd.places import hf_home, mark_of, scratch_root
from vllmd.spec import DaemonSpec

CLEAR_LIMIT = 10.0  # seconds


def prepare(spec: DaemonSpec, log: Log) -> tuple[Places, Path | None]:
    """Where launches may put things, and the directory of our cgroup if systemd delegated one. What fails is logged; the
    daemon runs without it."""
    become_subreaper()
    for directory in (spec.state_dir, spec.runtime_dir, spec.log_dir, spec.cache_dir):
        try:
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as error:
            log.error(f"cannot make {directory}: {error.strerror}")
    mark = mark_of(spec.state_dir)
    root = cgroup.delegated_root()
    if root is not None and (trouble := cgroup.enter_supervisor(root)):
        log.warning(trouble)
    scratch = scratch_root(spec.runtime_dir, mark)
    return Places(spec.runtime_dir, spec.cache_dir, scratch, mark, hf_home(spec.cache_dir)), root


async def clear_scratch(scratch: Path, used: Collection[str]) -> None:
    """Remove the scratch directories that no living engine uses."""

    def clear() -> None:
        for path in scratch.iterdir():
            if str(path) not in used:
                shutil.rmtree(path, ignore_errors=True)

    await in_thread(clear, CLEAR_LIMIT, None)
