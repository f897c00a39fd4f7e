"""The core alone: seconds per event, in a life of many models on eight GPUs, with what the daemon asks after each."""

import time
from collections import defaultdict
from statistics import fmean

from tests.bench.figures import Figure
from tests.sim import PLACES, settings, spec
from vllmd.core.core import Core
from vllmd.events import (
    Alive,
    Boot,
    Broken,
    Canary,
    CanaryBack,
    Command,
    DevicesRead,
    Event,
    Gone,
    Inspect,
    Inspected,
    KillTree,
    Printed,
    Progress,
    Pulse,
    Ready,
    Spawn,
    Spawned,
    Start,
    Stop,
    Terminate,
)
from vllmd.facts import DeviceReading, EngineFacts, Figures, Inspection, ModelFacts, Phase
from vllmd.spec import Cause, ModelSpec, RestartRule
from vllmd.units import GIB

GPUS = 8
FACTS = Inspection(
    ModelFacts("/m", {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 2048,
                      "head_dim": 128, "max_position_embeddings": 32768, "torch_dtype": "bfloat16"}, 3 * GIB, "f"),
    EngineFacts("/bin/vllm", "0.32.0", None),
)  # fmt: skip
CRASH = Cause("oom", "out of memory", "out of memory")


class Life:
    """Drives a core through a day's events in little time; adds up what each kind of event took."""

    def __init__(self, models: int) -> None:
        self.total = 8 * GIB * -(-models // GPUS)  # all fit, with little to spare
        self.took: dict[str, list[float]] = defaultdict(list)
        self.now = 1000.0
        self.todo: list[Event] = []
        self.core = Core(settings(*(self.model(n) for n in range(models))), PLACES)
        self.send(self.look())

    def model(self, n: int) -> ModelSpec:
        rule = RestartRule(max_failures=1000)
        return spec(f"m{n:03}", vram=7.6, kv_cache=2 * GIB, autostart=True, restart=rule)

    def send(self, event: Event | None) -> None:
        """One event, timed as the daemon takes it: handled, then the timer asked for."""
        began = time.perf_counter()
        commands = self.core.handle(event, self.now)
        self.core.next_deadline()
        self.took[type(event).__name__ if event is not None else "timer"].append(time.perf_counter() - began)
        for command in commands:
            self.todo += self.follow(command)

    def follow(self, command: Command) -> list[Event]:
        """What the edges would report of a command."""
        match command:
            case Inspect(instance=who, attempt=n):
                return [Inspected(who, n, FACTS)]
            case Spawn(instance=who, attempt=n):
                steps: list[Event] = [Spawned(who, n, 100)]
                for phase in Phase:
                    steps += [Progress(who, n, phase, part / 10) for part in range(10)]
                    steps += [Alive(who, n)] * 10
                return [*steps, Printed(who, n, Figures(weights=GIB), True), Ready(who, n, (100, 101))]
            case Terminate(instance=who, attempt=n):
                return [Broken(who, n, "exited", 0)]
            case KillTree(instance=who, attempt=n, crashed=crashed):
                return [Gone(who, n, CRASH if crashed else None)]
            case Canary(instance=who, attempt=n):
                return [CanaryBack(who, n, True)]
        return []

    def settle(self) -> None:
        """Until the edges have nothing more to say."""
        while self.todo:
            todo, self.todo = self.todo, []
            for event in todo:
                self.send(event)
            self.send(self.look())

    def look(self) -> DevicesRead:
        """All devices: each instance uses what it was promised."""
        held = self.core.world.ledger.held
        found = []
        for n in range(GPUS):
            name = f"GPU-{n}"
            ours = {who: parts[name] for who, parts in held.items() if name in parts}
            used = sum(ours.values())
            found.append(
                DeviceReading(name, "gpu", n, "Sim", self.total, used, self.total, self.total - used, instances=ours)
            )
        return DevicesRead(tuple(found))

    def pass_time(self, seconds: float) -> None:
        """Life goes on: each ready engine's counters and the devices every 5 s, timers as they fall due."""
        until = self.now + seconds
        while self.now < until:
            self.now += 5.0
            for inst in list(self.core.world.instances.values()):
                if inst.ready_at is not None:
                    self.send(Pulse(inst.id, inst.attempt, 1, 0, self.now, moved=int(inst.id[1:]) % 2 == 0))
            self.send(self.look())
            self.settle()
            while (due := self.core.next_deadline()) is not None and due <= self.now:
                self.send(None)
                self.settle()


def live(models: int) -> Life:
    """Boot, ten minutes, crashes and operators' wishes among them."""
    life = Life(models)
    life.send(Boot())
    life.settle()
    ready = [inst for inst in life.core.world.instances.values() if inst.ready_at is not None]
    assert len(ready) == models, f"{len(ready)} of {models} are ready"
    life.pass_time(300)
    for inst in ready[::10]:
        life.send(Broken(inst.id, inst.attempt, "EngineCore died"))
        life.settle()
    for inst in ready[5::10]:
        life.send(Stop(inst.spec.name, None))
        life.settle()
        life.send(Start(inst.spec.name, None))
        life.settle()
    life.pass_time(300)
    lost = [(inst.id, str(inst.state), inst.waiting_text, inst.cause) for inst in ready if inst.ready_at is None]
    assert not lost, lost[:3]
    return life


def run() -> list[Figure]:
    """The mean over all events, the dearest kinds, and how it grows."""
    live(10)  # imports and first calls
    lives = {models: live(models) for models in (50, 100, 200, 400)}
    means = {n: fmean([t for times in life.took.values() for t in times]) * 1e6 for n, life in lives.items()}
    kinds = {kind: (fmean(times) * 1e6, len(times)) for kind, times in lives[100].took.items()}
    dearest = sorted(kinds, key=lambda kind: -kinds[kind][0])
    often = sorted(kinds, key=lambda kind: -kinds[kind][1])[:3]
    said = ", ".join(f"{kind} {kinds[kind][0]:.0f}" for kind in dict.fromkeys([*often, *dearest[:4]]))
    growth = ", ".join(f"{n}: {mean:.0f} us" for n, mean in means.items())
    count = sum(n for _, n in kinds.values())
    return [
        Figure("core: one event, 100 models, 8 devices", means[100], "us", 100.0, f"mean of {count}; {said}"),
        Figure("core: 400 models against 100 (linear = 4)", means[400] / means[100], "x", 4.0, growth),
    ]
