"""What all attempts share of the daemon."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vllmd.core.cause import Rules
from vllmd.edge.journal import Lines
from vllmd.edge.probe import Probe
from vllmd.edge.process import Child, spawn
from vllmd.edge.systemd import Notifier
from vllmd.edge.tasks import Tasks
from vllmd.events import Event
from vllmd.facts import Launch


class Begin(Protocol):
    """Starts an engine, as vllmd/edge/process.py: spawn does."""

    def __call__(self, launch: Launch, *, log_fd: int, cwd: Path, cgroup: Path | None = None) -> Child: ...


@dataclass(slots=True)
class Shared:
    """What all attempts use. The log's limits and the secrets change with a reload."""

    post: Callable[[Event], None]
    tasks: Tasks
    probe: Probe
    rules: Rules
    log_dir: Path
    log_size: int
    log_keep: int
    cgroups: Path | None
    records_dir: Path
    lines: Lines | None  # the journal, for what models print
    notifier: Notifier
    complain: Callable[[str], None]
    begin: Begin = spawn  # starts an engine
    secrets: frozenset[str] = frozenset()  # of all configurations so far: to be shown nowhere
