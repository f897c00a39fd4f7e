"""What all attempts share of the daemon."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllmd.core.cause import Rules
from vllmd.edge.journal import Lines
from vllmd.edge.probe import Probe
from vllmd.edge.systemd import Notifier
from vllmd.edge.tasks import Tasks
from vllmd.events import Event


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
    secrets: frozenset[str] = frozenset()  # of all configurations so far: to be shown nowhere
