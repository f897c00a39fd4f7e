"""A world for the core: devices that add up, engines that do as told, and every command checked.

The simulation plays all edges at once, without time of its own: a test moves `now`. It keeps the books a second time, in the
plainest way, so that the core's own can be compared with them.
"""

from pathlib import Path

from vllmd.core.core import Core
from vllmd.core.launch import Places
from vllmd.core.states import ALIVE, TIMED, State
from vllmd.core.world import Instance
from vllmd.events import (
    Answer,
    Boot,
    Broken,
    Canary,
    Command,
    DevicesRead,
    Event,
    Finish,
    Gone,
    Inspect,
    Inspected,
    KillTree,
    Note,
    Printed,
    Ready,
    Sleep,
    Spawn,
    Spawned,
    Start,
    Stop,
    Terminate,
    Wake,
)
from vllmd.facts import DeviceReading, EngineFacts, Figures, Holder, Inspection, ModelFacts
from vllmd.spec import Cause, DaemonSpec, DeviceRule, ModelSpec, Settings
from vllmd.units import GIB

PLACES = Places(Path("/r"), Path("/c"), Path("/s"), "mark")
DAEMON = DaemonSpec(Path("/r/s"), Path("/v"), Path("/r"), Path("/l"), Path("/c"))
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def spec(name: str, vram: float | None = 3.0, **more: object) -> ModelSpec:
    """A model that wants `vram` GiB, or (None) what it is found to need."""
    size = None if vram is None else int(vram * GIB)
    return ModelSpec(name, f"/m/{name}", vram=size, max_model_len=1024, **more)  # type: ignore[arg-type]


def settings(*models: ModelSpec, limit: float | None = None, reserve: float | None = 0.0) -> Settings:
    """A configuration with these models."""
    rule = DeviceRule(None if reserve is None else int(reserve * GIB), None if limit is None else int(limit * GIB))
    return Settings(DAEMON, devices={"*": rule}, models={m.name: m for m in models})


class Sim:
    """The core and everything around it.

    `external` is used by nobody that is seen, `programs` by others by name. A device in `silent` does not answer. `uses`
    says what an instance uses where that is not its promise; what a `ghost` had is still in use, by nobody that is seen.
    """

    def __init__(self, config: Settings, *, gpus: dict[str, float] | None = None, blind: bool = False) -> None:
        self.core = Core(config, PLACES)
        self.now = 1000.0
        self.totals = {name: int(size * GIB) for name, size in (gpus or {"GPU-a": 8.0}).items()}
        self.external = dict.fromkeys(self.totals, 0)
        self.programs: dict[str, dict[str, int]] = {name: {} for name in self.totals}
        self.silent: set[str] = set(self.totals) if blind else set()
        self.uses: dict[str, int] = {}
        self.ghosts: dict[str, dict[str, int]] = {}
        self.reserved = dict.fromkeys(self.totals, 0)  # after the last event
        self.commands: list[Command] = []
        self.alive: dict[str, int] = {}  # instance -> attempt with processes
        self.problems: dict[str, Cause] = {}  # model -> what preflight says
        self.answers: dict[int, Answer] = {}
        self.tickets = 0
        self.handled = 0
        self.send(self.reading())
        self.send(Boot())

    # -- driving

    def send(self, event: Event | None) -> list[Command]:
        """Handle one event and check everything that must always hold."""
        commands = self.core.handle(event, self.now)
        self.handled += 1
        for command in commands:
            self.account(command)
        self.commands += commands
        self.check()
        return commands

    def ticket(self) -> int:
        self.tickets += 1
        return self.tickets

    def pass_time(self, seconds: float) -> None:
        """Move the clock, firing the timer at each deadline on the way."""
        until = self.now + seconds
        for _ in range(1000):
            due = self.core.next_deadline()
            if due is None or due > until:
                break
            self.now = max(self.now, due)
            self.send(None)
        self.now = until

    def live(self, seconds: float) -> None:
        """The same, with a look at the devices every few seconds, as the daemon does it."""
        until = self.now + seconds
        while self.now < until:
            self.pass_time(min(5.0, until - self.now))
            self.look()

    def sleep(self, seconds: float) -> None:
        """The daemon is stopped meanwhile, and its timer fires when it goes on."""
        self.now += seconds
        self.send(None)

    def account(self, command: Command) -> None:
        match command:
            case Spawn():
                assert command.instance not in self.alive, f"{command.instance} was spawned twice"
                self.alive[command.instance] = command.attempt
            case KillTree() | Terminate() | Sleep() | Wake():
                assert self.alive.get(command.instance) == command.attempt, "a signal for a process that is not there"
            case Answer():
                assert command.ticket not in self.answers, f"ticket {command.ticket} was answered twice"
                self.answers[command.ticket] = command

    def check(self) -> None:
        """No overcommit, no orphan, no dead end."""
        world = self.core.world
        for device, total in self.totals.items():
            if device not in world.ledger.readings:
                continue
            account = world.ledger.account(device)
            # A reload may lower what is offered below what is promised already; from there it only gets less.
            assert account.reserved <= max(account.budget, self.reserved[device]), f"{device} is overcommitted"
            assert account.budget <= total
            self.reserved[device] = account.reserved
        for inst in world.instances.values():
            runs = inst.id in self.alive
            assert not runs or inst.state in ALIVE, f"{inst.id} is {inst.state} and has processes"
            assert runs or inst.state not in ALIVE - {State.STOPPING}, f"{inst.id} is {inst.state} without a process"
            assert not runs or inst.id in world.ledger.held, f"{inst.id} runs without a promise"
            assert (inst.state not in TIMED) or inst.deadline is not None, f"{inst.id} could stay {inst.state} for ever"
            asked = inst.state is State.ASLEEP and inst.line and not inst.shut_for
            assert not asked or inst.deadline is not None, f"{inst.id} could sleep for ever while {inst.line} wait"
        assert set(self.alive) <= set(world.instances), "a process without an instance"

    # -- the edges

    def inst(self, name: str) -> Instance:
        return self.core.world.instances[name]

    def state(self, name: str) -> State:
        return self.inst(name).state

    def reading(self) -> DevicesRead:
        """What a look at the devices gives now, as the daemon's lookout does it: a tree counts for its instance until the
        last of it is gone; what is not back after that is nobody's."""
        devices = []
        held = self.core.world.ledger.held
        for index, (name, total) in enumerate(self.totals.items()):
            if name in self.silent:
                continue
            seen = [i for i in self.alive if i not in self.ghosts and name in held.get(i, {})]
            ours = {i: self.uses.get(i, held[i][name]) for i in seen}
            holders = [Holder(n, who, size) for n, (who, size) in enumerate(self.programs[name].items())]
            outside = self.external[name] + sum(self.programs[name].values())
            outside += sum(ghost.get(name, 0) for ghost in self.ghosts.values())
            used = sum(ours.values()) + outside
            devices.append(
                DeviceReading(
                    name, "gpu" if name != "cpu" else "cpu", index, "Sim", total, used, total, max(0, total - used),
                    instances=ours, external=outside, processes=tuple(holders),
                )
            )  # fmt: skip
        return DevicesRead(tuple(devices), f"{', '.join(sorted(self.silent))} lost" if self.silent else "")

    def look(self) -> None:
        """The devices are read."""
        self.send(self.reading())

    def start(self, name: str) -> int:
        """An operator wants it up; the ticket."""
        ticket = self.ticket()
        self.send(Start(name, ticket))
        return ticket

    def stop(self, name: str, now: bool = False) -> int:
        """An operator wants it down; the ticket."""
        ticket = self.ticket()
        self.send(Stop(name, ticket, now))
        return ticket

    def inspect(self, name: str) -> None:
        """Preflight comes back; the devices were read a moment ago, as they are every few seconds."""
        self.look()
        inst = self.core.world.instances.get(name)
        if inst is None:
            return  # it only waited for its memory to be forgotten
        problem = self.problems.get(name)
        found = Inspection(
            ModelFacts(f"/m/{name}", LLAMA, 10_000_000, "f"), EngineFacts("/bin/vllm", "0.32.0", None), None
        )
        self.send(Inspected(name, inst.attempt, None if problem else found, problem))

    def spawned(self, name: str) -> None:
        self.send(Spawned(name, self.inst(name).attempt, 100))

    def measured(self, name: str) -> None:
        self.send(Printed(name, self.inst(name).attempt, Figures(kv_bytes=GIB), True))

    def ready(self, name: str) -> None:
        self.send(Ready(name, self.inst(name).attempt, (100, 101)))

    def breaks(self, name: str, what: str = "exited with code 1", status: int | None = 1) -> None:
        self.send(Broken(name, self.inst(name).attempt, what, status))

    def dies(self, name: str) -> None:
        """Its processes are dead, its memory is not back yet; nobody has told."""
        self.ghosts[name] = dict(self.core.world.ledger.held[name])
        self.look()

    def gone(self, name: str, cause: Cause | None = None, *, back: bool = True) -> None:
        """All its processes are gone, and a look at the devices shows it, its memory `back` or not."""
        if back:
            self.ghosts.pop(name, None)
        elif name not in self.ghosts:
            self.dies(name)
        attempt = self.alive.pop(name)
        self.send(Gone(name, attempt, cause))
        self.send(self.reading())

    def up(self, name: str) -> None:
        """A whole good start, asked for if nobody has."""
        if self.state(name) is State.STOPPED:
            self.start(name)
        self.inspect(name)
        self.spawned(name)
        self.measured(name)
        self.ready(name)

    # -- looking

    def last(self, kind: type[Command]) -> Command:
        return next(c for c in reversed(self.commands) if isinstance(c, kind))

    def count(self, kind: type[Command]) -> int:
        return sum(isinstance(c, kind) for c in self.commands)

    def notes(self, kind: str) -> list[str]:
        return [c.text for c in self.commands if isinstance(c, Note) and c.kind == kind]


__all__ = ["GIB", "Canary", "Finish", "Inspect", "Sim", "settings", "spec"]
