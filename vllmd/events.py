"""The two vocabularies of vllmd: events tell the core what happened, commands tell the edges what to do.

Nothing else crosses the line between them. Every event that comes from a process names its instance and attempt, so
that a late one is dropped by comparison.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllmd.facts import DeviceReading, Figures, Inspection, Launch, Learned, Phase, Proof
from vllmd.record import Record, Survivor
from vllmd.spec import Cause, Settings

# -- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Boot:
    """The daemon is up: go on with what the one before left, start what is configured to start."""

    survivors: tuple[Survivor, ...] = ()


@dataclass(frozen=True, slots=True)
class Start:
    """Somebody wants the model up. The ticket is answered once: accepted, or refused with the reason."""

    model: str
    ticket: int | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """The model is not wanted. `now` skips the drain."""

    model: str
    ticket: int | None = None
    now: bool = False


@dataclass(frozen=True, slots=True)
class Restart:
    """Stop (drained) and start again; starts a model that is not up."""

    model: str
    ticket: int | None = None


@dataclass(frozen=True, slots=True)
class Reload:
    """A new configuration, already checked. `restart` names the models whose running engine needs a new start for it."""

    settings: Settings
    restart: frozenset[str] = frozenset()
    ticket: int | None = None


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End everything. A second one skips the drains."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """Preflight is done: exactly one of `found` and `problem` is set."""

    instance: str
    attempt: int
    found: Inspection | None = None
    problem: Cause | None = None


@dataclass(frozen=True, slots=True)
class Spawned:
    """The process exists. `start`: its start in clock ticks since boot, which with the pid names this very process."""

    instance: str
    attempt: int
    pid: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life during a start: a log line, bytes read, memory grown."""

    instance: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Progress:
    """The start entered `phase` or got on in it. `fraction` 0..1 of it if known; `note` its own words ("34 of 67")."""

    instance: str
    attempt: int
    phase: Phase
    fraction: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Printed:
    """vLLM printed numbers. `measured` says that its memory measuring is over (the device's window may open)."""

    instance: str
    attempt: int
    figures: Figures
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """/health is 200, /v1/models names us, and the listening socket belongs to our tree."""

    instance: str
    attempt: int
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Pulse:
    """A look at a ready engine's counters. `moved` = a token counter changed since the last look."""

    instance: str
    attempt: int
    running: int
    waiting: int
    tokens: float  # generated so far
    moved: bool
    kv_usage: float = 0.0


@dataclass(frozen=True, slots=True)
class CanaryBack:
    """A 1-token request through the engine ended. ok: it answered; None: this model answers no kind of canary."""

    instance: str
    attempt: int
    ok: bool | None


@dataclass(frozen=True, slots=True)
class Slept:
    """After Sleep: the engine sleeps, or (`problem`) does not. `seconds`: what the call took."""

    instance: str
    attempt: int
    problem: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Woke:
    """After Wake: the engine is awake and has answered a test request, or (`problem`, a sentence part) not. `same`: with the
    words it had for it before it slept for the first time; None = nothing that could be compared. `seconds`: the waking."""

    instance: str
    attempt: int
    problem: str = ""
    same: bool | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Broken:
    """A process of the tree died or the leader exited: nobody asked for it. `what` is a sentence part
    ("EngineCore (pid 12) died", "exited with code 1")."""

    instance: str
    attempt: int
    what: str
    status: int | None = None  # leader's exit code; negative = signal; None = the leader still runs


@dataclass(frozen=True, slots=True)
class Gone:
    """No process of the tree is left. `cause` is what the log says of a crash, if anything."""

    instance: str
    attempt: int
    cause: Cause | None = None
    pids_left: tuple[int, ...] = ()  # could not be killed (uninterruptible)


@dataclass(frozen=True, slots=True)
class DevicesRead:
    """A look at all devices. A device that is missing here has fallen silent; `trouble` says why, if known."""

    devices: tuple[DeviceReading, ...]
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The line of requests for a model is another one: `waiting` of them, the oldest since `since` (0 = nobody waits). Told
    when the first comes, when the oldest is another, and when nobody is left; while the model is up up to half a second later.
    `priority` is the highest among them."""

    model: str
    waiting: int
    since: float = 0.0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Used:
    """What the gateway has at an instance: requests under way now, and how many have begun since the attempt serves. Told when
    it becomes idle or busy and somebody waits anywhere, else at most twice a second. `at`: when the last one ended or began."""

    instance: str
    attempt: int
    running: int
    begun: int
    at: float


@dataclass(frozen=True, slots=True)
class Lend:
    """Somebody needs `size` bytes of a device (None = the one with most room) for `seconds`, for something else. A size of 0
    gives all of it back."""

    size: int
    seconds: float
    device: str | None = None
    ticket: int | None = None


@dataclass(frozen=True, slots=True)
class Doze:
    """An operator wants the model to sleep: it keeps its processes and gives its memory back. Start wakes it."""

    model: str
    ticket: int | None = None


@dataclass(frozen=True, slots=True)
class SwapTest:
    """Put the model to sleep and wake it, time and again, to learn whether its sleep may be relied on. The ticket is answered
    when that has begun; how it goes is shown with the model."""

    model: str
    ticket: int | None = None


Event = (
    Boot | Start | Stop | Restart | Reload | Shutdown
    | Inspected | Spawned | Alive | Progress | Printed | Ready | Pulse | CanaryBack | Broken | Gone | DevicesRead
    | Wanted | Used | Lend | Slept | Woke | Doze | SwapTest
)  # fmt: skip


# -- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inspect:
    """Run the preflight (under a second) and report Inspected."""

    instance: str
    attempt: int
    model: str


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start the engine, follow its log, watch its tree, probe it until ready. Reports Spawned, ... Ready, Broken."""

    instance: str
    attempt: int
    model: str
    launch: Launch


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take over an engine that an earlier daemon started: follow its log, watch its tree, probe it until ready, or from now
    on if it is `ready`. Reports as after Spawn; Broken when its leader (`pid`, `start`) is gone."""

    instance: str
    attempt: int
    model: str
    launch: Launch
    pid: int
    start: int
    ready: bool


@dataclass(frozen=True, slots=True)
class Save:
    """Keep this on disk, before any later command for the instance is carried out."""

    record: Record


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGTERM to the leader only: it drains by itself (--shutdown-timeout)."""

    instance: str
    attempt: int


@dataclass(frozen=True, slots=True)
class KillTree:
    """SIGKILL everything of this attempt, wherever it hid, until nothing is left; report Gone.
    `crashed`: read the cause from the log."""

    instance: str
    attempt: int
    crashed: bool


@dataclass(frozen=True, slots=True)
class Canary:
    """Send a 1-token request through the engine; report CanaryBack."""

    instance: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Sleep:
    """Put the engine to sleep (level 1: weights to host memory; 2: dropped); report Slept. Nothing is under way at it."""

    instance: str
    attempt: int
    level: int


@dataclass(frozen=True, slots=True)
class Wake:
    """Wake the engine from that level and send it a test request; report Woke."""

    instance: str
    attempt: int
    level: int


@dataclass(frozen=True, slots=True)
class ReadDevices:
    """Read the devices soon: somebody waits for memory to come back."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The one answer to a ticket. `status` as in HTTP: 202 accepted, 200 nothing to do, 409 no room, 422 cannot."""

    ticket: int
    status: int
    message: str = ""
    kind: str = ""
    remedies: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep this on disk: `learned` None forgets the key."""

    key: str
    learned: Learned | None


@dataclass(frozen=True, slots=True)
class Prove:
    """Keep this on disk: `proof` None = the one that was there does not hold any more."""

    key: str
    proof: Proof | None


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep on disk what a model's last good start ran with, to name the differences when one fails."""

    model: str
    good: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Forget:
    """The instance is gone from the configuration: drop what edges keep of it."""

    instance: str


@dataclass(frozen=True, slots=True)
class Note:
    """What an operator may read later. `kind` is a fixed phrase ("state", "overrun", "hung", "reload", ...)."""

    kind: str
    text: str
    level: str = "info"  # debug | info | warning | error
    instance: str | None = None
    attempt: int | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Open:
    """The model's door: from now on requests for it go to this instance, first those that wait."""

    instance: str
    attempt: int
    model: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class Shut:
    """No more requests for this instance: they wait in line. Those under way go on; when there are none any more, Used says
    so."""

    instance: str
    attempt: int
    model: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Who waits for the model waits in vain: 503 with this cause, to be tried again in `after` seconds (None = there is no
    telling). Who comes later stands in line anew."""

    model: str
    cause: Cause
    after: float | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """Everything has ended after Shutdown: the daemon may exit."""


Command = (
    Inspect | Spawn | Adopt | Save | Terminate | KillTree | Canary | Sleep | Wake | ReadDevices | Answer | Remember | Prove
    | Keep | Forget
    | Note | Open | Shut | Refuse | Finish
)  # fmt: skip
