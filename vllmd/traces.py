"""What an attempt leaves on the machine beside its log: a scratch directory, a socket, a cgroup, shared memory.

Only a living process shows which shared memory is its own, so the names are noted beside the records as they are seen:
whoever ends or buries the engine, this daemon or the one after it, removes them.
"""

from collections.abc import Collection
from pathlib import Path

from vllmd.edge import cgroup
from vllmd.edge.leftovers import clear, note_files, noted_files, shared_files
from vllmd.edge.tasks import in_thread
from vllmd.facts import Launch

LIMIT = 5.0  # seconds that clearing up may take
LOOK = 2.0  # seconds that looking through maps may take


class Traces:
    """Of one attempt."""

    def __init__(self, instance: str, launch: Launch, records_dir: Path, cgroups: Path | None) -> None:
        self.instance, self.launch = instance, launch
        self.files: frozenset[Path] = frozenset()
        self.cgroup: Path | None = None
        self._cgroups = cgroups
        self._note = records_dir / f"{instance}.shm"

    def make(self, memory_max: int | None) -> Path:
        """A clean place for a process, and its directory. Raises OSError."""
        scratch = Path(self.launch.scratch)
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.launch.endpoint.startswith("unix:"):
            # vLLM leaves its socket behind and will not start on one that exists.
            path = Path(self.launch.endpoint.removeprefix("unix:"))
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        self.enclose(memory_max)
        return scratch

    def enclose(self, memory_max: int | None) -> None:
        """Its cgroup, where there can be one."""
        self.cgroup = cgroup.make(self._cgroups, self.instance, memory_max) if self._cgroups else None

    async def find(self, pids: Collection[int]) -> None:
        """Note the shared memory of these processes."""
        found = self.files | await in_thread(lambda: shared_files(pids), LOOK, frozenset[Path]())
        if found != self.files:
            self.files = found
            await in_thread(lambda: note_files(self._note, self.launch.cookie, found), LOOK, None)

    def recall(self) -> None:
        """What an earlier daemon has noted."""
        self.files = noted_files(self._note, self.launch.cookie)

    async def remove(self) -> None:
        """Clear up after a process that never came to be."""
        await in_thread(lambda: clear((), self.launch.scratch, ""), LIMIT, None)
        if self.cgroup is not None:
            cgroup.remove(self.cgroup)
