"""sim.py with clients: lines before each model, engines that answer, and a gateway that tells the core what it must know.

The books are kept a second time: each request is answered or refused once, and nobody is sent to a model that is not up.
"""

from dataclasses import dataclass, field

from tests.sim import Sim
from vllmd.core.states import State
from vllmd.events import (
    Broken,
    CanaryBack,
    Command,
    Open,
    Pulse,
    Refuse,
    Shut,
    Sleep,
    Slept,
    Spawn,
    Terminate,
    Used,
    Wake,
    Wanted,
    Woke,
)
from vllmd.facts import Proof
from vllmd.spec import Cause, Settings, level_of
from vllmd.units import GIB

HOLD = 1000.0


@dataclass(eq=False)
class Request:
    """One client's wish. `fate` is "" until it is answered, refused or has left."""

    model: str
    since: float
    fate: str = ""
    begun: float | None = None
    retried: bool = False


@dataclass
class Door:
    """The gateway's view of one model."""

    open: tuple[str, int] | None = None  # instance, attempt
    line: list[Request] = field(default_factory=list)
    under_way: list[Request] = field(default_factory=list)
    begun: int = 0
    told: tuple[int, float] = (0, 0.0)
    news: bool = False  # it was shut: what is under way is told, whether it changed or not


class Crowd(Sim):
    """The core, its edges, and who wants something of the models. Engines come up, sleep, wake and end when `work` says so.

    `residual` GiB is what each keeps asleep; proofs of that are there from the first start on, unless `proved` is false.
    """

    def __init__(
        self, config: Settings, *, gpus: dict[str, float] | None = None, residual: float = 1.0, proved: bool = True
    ) -> None:
        self.residual, self.proved = int(residual * GIB), proved
        self.doors: dict[str, Door] = {}
        self.requests: list[Request] = []
        self.refusals: list[Refuse] = []
        self.direct: dict[str, int] = {}  # requests that come past the gateway
        super().__init__(config, gpus=gpus)

    def door(self, model: str) -> Door:
        return self.doors.setdefault(model, Door())

    # -- the gateway

    def account(self, command: Command) -> None:
        super().account(command)
        match command:
            case Spawn() if self.proved:
                inst = self.core.world.instances[command.instance]
                if level := level_of(inst.spec):
                    self.core.world.proofs[inst.key] = Proof(level, self.residual, 2 * GIB, 1.0, 2.0)
            case Sleep() | Wake():
                door = self.door(self.core.world.instances[command.instance].spec.name)
                assert not door.open, f"{command.instance} is to sleep or wake with its door open"
                assert not door.under_way, f"{command.instance} is to sleep or wake with requests"
            case Open():
                door = self.door(command.model)
                assert self.core.world.instances[command.instance].state is State.READY
                door.open, door.begun = (command.instance, command.attempt), 0
                for request in door.line:
                    self.begin(door, request)
                door.line.clear()
            case Shut():
                door = self.door(command.model)
                door.open, door.news = None, True
            case Refuse():
                self.refusals.append(command)
                door = self.door(command.model)
                for request in door.line:
                    self.settle(request, "refused")
                door.line.clear()
                door.told = (0, 0.0)

    def begin(self, door: Door, request: Request) -> None:
        door.begun += 1
        request.begun = self.now
        door.under_way.append(request)

    def settle(self, request: Request, fate: str) -> None:
        assert request.fate == "", f"a request for {request.model} was {request.fate} and is {fate} as well"
        request.fate = fate

    def tell(self) -> None:
        """What the gateway posts, until there is no news."""
        for _ in range(100):
            news = False
            for name, door in self.doors.items():
                inst = self.core.world.instances.get(name)
                if inst is None:
                    for request in door.line:
                        self.settle(request, "refused")
                    door.line.clear()
                    continue
                current_use = (len(door.under_way), door.begun)
                if inst.state is State.READY and (door.news or (inst.under_way, inst.begun) != current_use):
                    news, door.news = True, False
                    self.send(Used(name, inst.attempt, *current_use, self.now))
                current = (len(door.line), door.line[0].since if door.line else 0.0)
                if (bool(current[0]), current[1]) != (bool(door.told[0]), door.told[1]):
                    door.told, news = current, True
                    self.send(Wanted(name, *current))
            if not news:
                return
        raise AssertionError("the gateway and the core go on for ever")

    # -- clients

    def ask(self, model: str) -> Request:
        """A request comes."""
        request, door = Request(model, self.now), self.door(model)
        self.requests.append(request)
        if door.open:
            self.begin(door, request)
        else:
            door.line.append(request)
        self.tell()
        return request

    def leave(self, request: Request) -> None:
        """Its client goes."""
        door = self.door(request.model)
        if request in door.line:
            door.line.remove(request)
        if request in door.under_way:
            door.under_way.remove(request)
        if not request.fate:
            self.settle(request, "left")
        self.tell()

    def answer(self, model: str, count: int = 10**6) -> None:
        """The engine answers its oldest requests."""
        door = self.door(model)
        for request in door.under_way[:count]:
            self.settle(request, "answered")
        del door.under_way[:count]
        self.tell()

    # -- engines

    def crash(self, model: str) -> None:
        """The engine dies."""
        self.send(Broken(model, self.inst(model).attempt, "died", -9))
        self.requeue(model)

    def gone(self, name: str, cause: Cause | None = None, *, back: bool = True) -> None:
        """Nothing of it is left: whoever was still under way there was cut."""
        self.uses.pop(name, None)
        super().gone(name, cause, back=back)
        self.requeue(name)

    def falls_asleep(self, name: str) -> None:
        """Its engine says that it sleeps, and the next look shows it."""
        assert any(isinstance(c, Sleep) and c.attempt == self.inst(name).attempt for c in self.commands)
        self.uses[name] = self.residual
        self.send(Slept(name, self.inst(name).attempt, "", 1.0))
        self.look()

    def wakes(self, name: str, problem: str = "", same: bool | None = True) -> None:
        """Its engine says that it is awake."""
        assert any(isinstance(c, Wake) and c.attempt == self.inst(name).attempt for c in self.commands)
        self.uses.pop(name, None)
        self.send(Woke(name, self.inst(name).attempt, problem, same, 2.0))

    def requeue(self, model: str) -> None:
        """What an engine had begun when it died goes back to the head of the line, once."""
        door = self.door(model)
        for request in door.under_way:
            if request.retried:
                self.settle(request, "failed")
        again = [request for request in door.under_way if not request.retried]
        for request in again:
            request.retried = True
        door.line, door.under_way = again + door.line, []
        self.tell()

    def work(self, *, answers: bool = True) -> None:
        """All that can happen without waiting happens: inspections, starts, answers, ends."""
        for _ in range(200):
            before = self.handled
            for name in list(self.core.world.instances):
                inst = self.core.world.instances.get(name)
                if inst is None:
                    continue
                match inst.state:
                    case State.WAITING if inst.inspecting:
                        self.inspect(name)
                    case State.STARTING:
                        self.measured(name)
                        self.ready(name)
                    case State.DOZING if not inst.drain_held and not inst.slept_at:
                        self.falls_asleep(name)
                    case State.WAKING:
                        self.wakes(name)
                    case State.DRAINING if not inst.drain_held:
                        assert any(isinstance(c, Terminate) and c.attempt == inst.attempt for c in self.commands)
                        self.answer(name)  # vLLM finishes what it has
                        self.send(Broken(name, inst.attempt, "drained", 0))
                    case State.STOPPING if name in self.alive:
                        self.gone(name)
                    case State.READY if answers and self.door(name).under_way:
                        self.answer(name)
                self.tell()
            if self.handled == before:
                return
        raise AssertionError("the world does not come to rest")

    def live_on(self, seconds: float, *, answers: bool = True) -> None:
        """Time passes, and the world goes on."""
        until = self.now + seconds
        while self.now < until:
            self.pass_time(min(5.0, until - self.now))
            for name in self.ready_models():
                inst, running = self.inst(name), len(self.door(name).under_way) + self.direct.get(name, 0)
                self.send(Pulse(name, inst.attempt, running, 0, self.now, running > 0))
                if inst.canary_out:
                    self.send(CanaryBack(name, inst.attempt, True))
            self.look()
            self.tell()
            self.work(answers=answers)

    def ready_models(self) -> list[str]:
        return [i.id for i in self.core.world.instances.values() if i.state is State.READY]

    def evictions(self) -> int:
        return sum(n for key, n in self.core.world.counters.items() if key[0] == "swaps")
