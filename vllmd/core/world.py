"""What the core knows: models, instances, promises. Plain data with the few verbs that keep it consistent.

Only code under vllmd/core changes it, and only while `Core.handle` runs. `World.out` collects the commands of the event
that is being handled.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vllmd.core.launch import Places
from vllmd.core.ledger import Ledger
from vllmd.core.states import HOLDING, IllegalMove, Move, State, next_state
from vllmd.events import Answer, Command, Note, Open, Refuse, Shut
from vllmd.facts import Figures, Inspection, Launch, Learned, Need, Phase, Proof
from vllmd.spec import Cause, ModelSpec, Settings

STORY_LENGTH = 200  # notes kept to be logged if the core ever raises
TRIAL = "(swap-test)"  # in the place of whom an instance is shut for


@dataclass(frozen=True, slots=True)
class Cycle:
    """Once asleep and awake again. Seconds; bytes in use while it slept, by device; `same` as in Woke."""

    sleep_s: float
    wake_s: float
    residual: Mapping[str, int]
    same: bool | None


@dataclass(slots=True)
class Trial:
    """A swap-test. Its model is shut meanwhile, and what it gives back is given to nobody. `result` is empty until it is
    over."""

    level: int
    since: float
    before: Mapping[str, int] = field(default_factory=dict)  # in use when it went to sleep first
    cycles: list[Cycle] = field(default_factory=list)
    proof: Proof | None = None
    result: str = ""

    @property
    def on(self) -> bool:
        return not self.result


@dataclass(slots=True)
class Instance:
    """One running (or wanted, or failed) engine of a model. Times are on the core's clock, sizes in bytes."""

    id: str
    spec: ModelSpec  # what it runs with; the model's newer one takes over at the next start
    state: State = State.STOPPED
    since: float = 0.0
    passed: dict[State, float] = field(default_factory=dict)  # when it last came to each state
    deadline: float | None = None
    attempt: int = 0
    wanted: bool = False  # should be up: decides what follows an end
    patient: bool = False  # nobody stands at the door: it waits as long as it must
    accepted: bool = False  # an operator was told that it waits for memory that is coming free
    insisted: bool = False  # an operator asked for it while it ended: started again whatever the end says
    tickets: list[int] = field(default_factory=list)

    # who asks for it, as the gateway tells
    line: int = 0  # requests that wait for it
    line_since: float = 0.0  # since when the oldest does
    line_priority: int = 0
    by_demand: bool = False  # this start is for those who wait, and for nobody else
    claim: Mapping[str, int] = field(default_factory=dict)  # device -> bytes: what is being freed there is for it
    made_by: tuple[str, ...] = ()  # those that went for it, the first of them told at `made_since`
    made_since: float = 0.0
    queue_until: float = 0.0  # what it waits for is looked at anew then at the latest

    # what preflight and placement found, for this attempt
    inspecting: bool = False
    found: Inspection | None = None
    need: Need | None = None
    devices: tuple[str, ...] = ()  # where it is, was last, or would go
    key: str = ""  # under which its need is learned
    launch: Launch | None = None
    measuring: bool = False  # it reads device-wide free memory: nobody else may move there
    waits_for: tuple[str, ...] = ()  # instances whose end or measuring it waits for
    waiting_text: str = ""

    # the start
    started: float = 0.0
    phase: Phase | None = None
    phase_fraction: float | None = None
    phase_note: str = ""
    phase_since: float = 0.0
    phases: dict[Phase, float] = field(default_factory=dict)  # seconds spent in finished phases
    heard: float = 0.0  # last sign of life
    figures: Figures = field(default_factory=Figures)
    learned: bool = False  # this attempt has taught its need
    resumed: bool = False  # adopted while it started: how long its phases took was not seen
    disturbed: bool = False  # a neighbour died while it measured: its numbers teach nothing
    remeasured: bool = False  # it was started anew once because of that

    # serving
    pid: int | None = None
    pid_start: int = 0  # clock ticks since boot: with the pid, this very process
    pids: tuple[int, ...] = ()
    ready_at: float | None = None
    alive_at: float = 0.0  # when its health is looked at next
    proved: float = 0.0  # last time that the engine did something
    canary_out: bool = False
    asked: float | None = None  # when the oldest test request was sent that has not been answered
    canary_works: bool = True
    running: int = 0
    waiting: int = 0
    tokens: float = 0.0
    tokens_at: float = 0.0
    tokens_per_s: float = 0.0
    under_way: int = 0  # requests of the gateway's at it
    begun: int = 0  # requests that the gateway has handed to it since it serves
    direct: int = 0  # requests that came past the gateway, at both of the last two looks
    direct_seen: int = 0
    used_at: float = 0.0  # when it was last in use; 0 = not yet
    heat: float = 0.0  # recent requests, fading; as of `heat_at`
    heat_at: float = 0.0
    shut_for: str = ""  # whom it makes room for, or "ttl": new requests wait until it is up again
    shut_at: float = 0.0
    told_empty: bool = False  # the gateway has said that nothing is under way since it was shut
    peak: dict[str, int] = field(default_factory=dict)  # most bytes seen in use, by device

    # asleep
    dozes: bool = False  # it makes room by sleeping
    full: Mapping[str, int] = field(default_factory=dict)  # what is promised to it while it is awake
    slept_at: float = 0.0  # when its engine said so; 0 = not yet
    slept_s: float = 0.0  # what that took
    kept: Mapping[str, int] = field(default_factory=dict)  # in use since, by device
    residual: Mapping[str, int] = field(default_factory=dict)  # ... after the first sleep of this attempt
    roused_at: float = 0.0  # since when an operator wants it awake; 0 = nobody does
    trial: Trial | None = None  # the latest
    over_since: float | None = None

    # the end
    crashed: bool = False
    broke_at: float = 0.0
    drain_held: bool = False  # SIGTERM waits until a neighbour has measured
    evicted: bool = False  # it ends to make room
    returns: bool = False  # ... and comes back when there is room again
    hurried: bool = False  # the end that is held back is to be a kill
    gone: bool = False
    leak: str = ""
    verdict: Cause | None = None  # why it is being ended, when vllmd itself decided so
    cause: Cause | None = None  # why it is not as wanted; cleared by the next success
    cause_at: float = 0.0
    last: Cause | None = None  # of its latest crash, kept after it is well again
    last_at: float = 0.0
    cause_memory: str = ""  # the memory sum at that moment
    changed: tuple[str, ...] = ()  # what is not as at the last good start
    failures: list[float] = field(default_factory=list)
    restarts: int = 0  # since the daemon started


@dataclass(slots=True)
class World:
    """All of it. `instances` is in configuration order."""

    settings: Settings
    places: Places
    ledger: Ledger = field(default_factory=Ledger)
    instances: dict[str, Instance] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)  # instance -> its latest attempt, kept when it is removed
    learned: dict[str, Learned] = field(default_factory=dict)
    now: float = 0.0  # of the event that is being handled
    proofs: dict[str, Proof] = field(
        default_factory=dict
    )  # by the key of the learned need: whose sleep may be relied on
    seen: dict[str, float] = field(default_factory=dict)  # device -> time of its last reading
    good: dict[str, Mapping[str, str]] = field(default_factory=dict)  # model -> what its last good start ran with
    trouble: str = ""  # of the devices
    swaps: deque[tuple[float, str, str]] = field(default_factory=deque)  # the last hour's: when, who went, for whom
    swaps_warned: float = float("-inf")
    short_of: dict[tuple[str, str], bool] = field(default_factory=dict)  # device, kind of shortage that has been noted
    closing: bool = False
    finished: bool = False
    counters: dict[tuple[str, ...], int] = field(
        default_factory=dict
    )  # ("hangs", model), ("restarts", model, kind), ...
    out: list[Command] = field(default_factory=list)
    dirty: set[str] = field(default_factory=set)  # instances whose record must be written anew after this event
    story: deque[str] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))

    def emit(self, command: Command) -> None:
        """Add a command to those of the current event."""
        self.out.append(command)

    def of(self, model: str) -> Iterator[Instance]:
        """The instances of a model."""
        return (inst for inst in self.instances.values() if inst.spec.name == model)

    def next_attempt(self, inst: Instance) -> None:
        """A number that no report of an earlier attempt bears, not even of one before the model was removed."""
        inst.attempt = self.attempts[inst.id] = max(self.attempts.get(inst.id, 0), inst.attempt) + 1

    def move(self, inst: Instance, move: Move, now: float, text: str = "") -> None:
        """Make a legal move and note it. Raises IllegalMove with the instance's story if the table has none."""
        try:
            state = next_state(inst.state, move)
        except IllegalMove as error:
            raise IllegalMove(f"{inst.id} (attempt {inst.attempt}): {error}") from None
        old, inst.state, inst.since, inst.deadline = inst.state, state, now, None
        inst.passed[state] = now
        self.dirty.add(inst.id)
        if state not in HOLDING:
            self.ledger.release(inst.id)
        if state not in (State.WAITING, State.ASLEEP):
            inst.claim, inst.made_by = {}, ()
        if state is State.READY and inst.trial and inst.trial.on:
            inst.shut_for, inst.shut_at, inst.told_empty = TRIAL, now, True  # its door was not opened
        elif state is State.READY:
            self.open(inst)
        elif old is State.READY:
            self.shut(inst)
        level = "warning" if state in (State.BACKOFF, State.FAILED) else "info"
        self.note("state", f"{old} → {state}" + (f": {text}" if text else ""), inst, level)

    def open(self, inst: Instance) -> None:
        """Requests may come."""
        assert inst.launch is not None
        inst.shut_for, inst.told_empty, inst.dozes = "", False, False
        self.emit(Open(inst.id, inst.attempt, inst.spec.name, inst.launch.endpoint))

    def shut(self, inst: Instance, for_whom: str = "") -> None:
        """No new requests. `for_whom`: it is still up, and ends when those under way have ended."""
        if not inst.shut_for:
            self.emit(Shut(inst.id, inst.attempt, inst.spec.name))
        inst.shut_for = for_whom
        if for_whom:
            inst.shut_at = self.now

    def turn_away(self, inst: Instance, cause: Cause, after: float | None = None) -> None:
        """Tell those who wait for it that they wait in vain."""
        inst.line, inst.claim = 0, {}
        self.emit(Refuse(inst.spec.name, cause, after))

    def note(
        self, kind: str, text: str, inst: Instance | None = None, level: str = "info", device: str | None = None
    ) -> None:
        """Tell the operator, and remember it for the story."""
        who, attempt = (inst.id, inst.attempt) if inst else (None, None)
        self.story.append(f"{who or device or 'vllmd'} {kind}: {text}")
        self.emit(Note(kind, text, level, who, attempt, device))

    def count(self, *what: str) -> None:
        """One more of something that metrics show."""
        self.counters[what] = self.counters.get(what, 0) + 1

    def tell(self, ticket: int | None, status: int, message: str) -> None:
        """Answer a ticket at once, if there is one."""
        if ticket is not None:
            self.emit(reply(ticket, status, message))

    def answer(self, inst: Instance, status: int, message: str, cause: Cause | None = None) -> None:
        """Answer everybody who waits for this instance's start to be decided; each exactly once."""
        tickets, inst.tickets = inst.tickets, []
        for ticket in tickets:
            self.emit(reply(ticket, status, message, cause))


def reply(ticket: int, status: int, message: str, cause: Cause | None = None) -> Answer:
    """One answer, with the cause's remedies when there is one."""
    remedies = tuple(remedy.text for remedy in cause.remedies) if cause else ()
    return Answer(ticket, status, message, cause.kind if cause else "", remedies)
