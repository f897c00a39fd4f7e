"""What a daemon needs under its feet before it starts anything: directories, its own cgroup, and a clear view of what an
earlier daemon left."""

import os
import shutil
import stat
import tempfile
from collections.abc import Collection
from pathlib import Path

from vllmd.core.launch import SCRATCH_NAME, Places
from vllmd.edge import cgroup
from vllmd.edge.journal import Log
from vllmd.edge.process import become_subreaper
from vllmd.edge.tasks import in_thread
from vllmd.places import hf_home, mark_of, scratch_root
from vllmd.spec import DaemonSpec

CLEAR_LIMIT = 10.0  # seconds


def prepare(spec: DaemonSpec, log: Log, user_unit: str | None = None) -> tuple[Places, Path | None]:
    """Where launches may put things, and the directory of our cgroup if systemd delegated one (`user_unit`: that of the
    user's service that we are). What fails is logged; the daemon runs without it."""
    become_subreaper()
    for directory in (spec.state_dir, spec.runtime_dir, spec.log_dir, spec.cache_dir):
        try:
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as error:
            log.error(f"cannot make {directory}: {error.strerror}")
    mark = mark_of(spec.state_dir)
    root = cgroup.delegated_root() or (cgroup.of_user_unit(user_unit) if user_unit else None)
    if root is not None and (trouble := cgroup.enter_supervisor(root)):
        log.warning(trouble)
    scratch = scratch_root(spec.runtime_dir, mark)
    try:
        claim(scratch, mark)
    except OSError as error:
        other = Path(tempfile.mkdtemp(prefix="vllmd-", dir=None if len(tempfile.gettempdir()) <= 16 else "/tmp"))
        log.error(f"cannot use {scratch}: {error.strerror or error}; temporary files of models go to {other}")
        scratch = other
    return Places(spec.runtime_dir, spec.cache_dir, scratch, mark, hf_home(spec.cache_dir)), root


def claim(scratch: Path, mark: str) -> None:
    """Make a directory that is ours alone, or find it as we left it. Raises OSError for anything else under that name."""
    try:
        scratch.mkdir(mode=0o700)
    except FileExistsError:
        found = scratch.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise FileExistsError("it is not a directory of ours") from None
    sign = scratch / f".{mark}"
    if any(scratch.iterdir()) and not sign.is_dir():
        raise FileExistsError("there are files in it that are not vllmd's")
    sign.mkdir(exist_ok=True)
    scratch.chmod(0o700)


async def clear_scratch(scratch: Path, used: Collection[str]) -> None:
    """Remove the scratch directories that no living engine uses, and nothing else that may be there."""

    def clear() -> None:
        for path in scratch.iterdir():
            if SCRATCH_NAME.fullmatch(path.name) and str(path) not in used:
                shutil.rmtree(path, ignore_errors=True)

    await in_thread(clear, CLEAR_LIMIT, None)


def release(scratch: Path, mark: str) -> None:
    """Remove the root of the scratch directories, if it is empty. May block."""
    try:
        found = list(scratch.iterdir())
        if {path.name for path in found} <= {f".{mark}"}:
            for path in (*found, scratch):
                path.rmdir()
    except OSError:
        return
