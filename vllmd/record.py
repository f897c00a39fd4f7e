"""What of an instance outlives the daemon: one record per instance, on disk before anything happens that it tells of.

A record holds what the core must know to go on as if nothing had been: which process it was, what was promised to it, what
was wanted, how often it failed. Its times are on the core's clock, which counts from the machine's boot and so means the same
to the next daemon; after another boot a record means nothing. Every field but the first four has a default, so that a record
of an older vllmd is understood.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllmd.facts import Figures, Launch, Need, Phase
from vllmd.spec import Cause


@dataclass(frozen=True, slots=True)
class Record:
    """One instance as it was after the last event that moved it. Fields named as in the core's Instance mean the same."""

    id: str
    model: str  # the name of its [models.NAME] table
    state: str
    attempt: int

    spec: Mapping[str, str] = field(default_factory=dict)  # digests of the keys that a running engine cannot follow
    wanted: bool = False
    closing: bool = False  # the daemon was ending everything: what was wanted before does not count any more
    since: float = 0.0
    deadline: float | None = None

    pid: int | None = None  # the leader's; None until it exists
    pid_start: int = 0  # clock ticks since boot: with the pid, this very process
    launch: Launch | None = None
    devices: tuple[str, ...] = ()
    held: Mapping[str, int] = field(default_factory=dict)  # what is promised to it, by device
    need: Need | None = None
    key: str = ""
    executable: str = ""
    version: str = ""  # of vLLM
    fingerprint: str = ""  # of the model's files
    measuring: bool = False
    drain_held: bool = False
    hurried: bool = False
    crashed: bool = False
    insisted: bool = False
    by_demand: bool = False
    full: Mapping[str, int] = field(default_factory=dict)  # awake: see core/world.py
    residual: Mapping[str, int] = field(default_factory=dict)
    evicted: bool = False
    slept_at: float = 0.0

    started: float = 0.0
    ready_at: float | None = None
    broke_at: float = 0.0
    phases: Mapping[Phase, float] = field(default_factory=dict)
    figures: Figures = field(default_factory=Figures)
    learned: bool = False
    disturbed: bool = False

    verdict: Cause | None = None
    cause: Cause | None = None
    cause_at: float = 0.0
    cause_memory: str = ""
    changed: tuple[str, ...] = ()
    last: Cause | None = None
    last_at: float = 0.0
    failures: tuple[float, ...] = ()
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Survivor:
    """A record of the daemon before, and what is left of it. `spawned`: a process of it was or is there; `alive`: its leader
    still is. `changed` are keys of its configuration that a running engine cannot follow and that are not as they were."""

    record: Record
    spawned: bool = False
    alive: bool = False
    changed: tuple[str, ...] = ()
