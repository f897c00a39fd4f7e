"""The core under random scripts of events. What must hold after every single event is checked in tests/sim.py: nothing is
overcommitted, no process is without an instance or a promise, nobody can stay in a timed state for ever, nobody is
answered twice. Here: whatever happened, once the world co-operates everything comes to rest, and everybody was answered.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.sim import GIB, Sim, spec
from tests.sim import settings as configure
from vllmd.core.states import State
from vllmd.events import (
    Alive,
    Broken,
    CanaryBack,
    Gone,
    Progress,
    Pulse,
    Ready,
    Reload,
    Restart,
    Shutdown,
    Spawn,
    Start,
    Stop,
    Terminate,
)
from vllmd.facts import Phase
from vllmd.spec import Cause, Settings

NAMES = ("a", "b", "c", "d")
name = st.sampled_from(NAMES)
OOM = Cause("oom", "out of memory", "oom")
FATAL = Cause("unknown-flag", "no such flag", "flag", heals=False)


class Life(RuleBasedStateMachine):
    """Four models of random size on one or two GPUs, and everything that may happen to them."""

    def new(self, config: Settings, gpus: dict[str, float]) -> Sim:
        """The world of this life."""
        return Sim(config, gpus=gpus)

    @initialize(
        sizes=st.lists(st.sampled_from([1.5, 2, 3, 5, 9]), min_size=4, max_size=4),
        pinned=st.lists(st.booleans(), min_size=4, max_size=4),
        gpus=st.sampled_from([{"g0": 8.0}, {"g0": 8.0, "g1": 6.0}, {"cpu": 8.0}]),
        autostart=st.booleans(),
    )
    def begin(self, sizes: list[float], pinned: list[bool], gpus: dict[str, float], autostart: bool) -> None:
        self.models = {
            n: spec(n, size, kv_cache=GIB // 4 if pin else None, autostart=autostart)
            for n, size, pin in zip(NAMES, sizes, pinned, strict=True)
        }
        self.sim = self.new(configure(*self.models.values()), gpus)
        self.shut = False

    def known(self, who: str) -> bool:
        return who in self.sim.core.world.instances

    @rule(who=name)
    def start(self, who: str) -> None:
        self.sim.send(Start(who, self.sim.ticket()))

    @rule(who=name, now=st.booleans())
    def stop(self, who: str, now: bool) -> None:
        self.sim.send(Stop(who, self.sim.ticket(), now))

    @rule(who=name)
    def restart(self, who: str) -> None:
        self.sim.send(Restart(who, self.sim.ticket()))

    @rule(who=name, good=st.booleans())
    def inspect(self, who: str, good: bool) -> None:
        if self.known(who):
            self.sim.problems = {} if good else {who: FATAL}
            self.sim.inspect(who)

    @rule(who=name)
    def gets_ready(self, who: str) -> None:
        if self.sim.alive.get(who):
            self.sim.spawned(who)
            self.sim.measured(who)
            self.sim.ready(who)

    @rule(who=name)
    def measured(self, who: str) -> None:
        if self.sim.alive.get(who):
            self.sim.measured(who)

    @rule(who=name, status=st.sampled_from([0, 1, -9, None]))
    def breaks(self, who: str, status: int | None) -> None:
        if self.sim.alive.get(who):
            self.sim.breaks(who, status=status)

    @rule(who=name, cause=st.sampled_from([None, OOM, FATAL]))
    def ends(self, who: str, cause: Cause | None) -> None:
        """Its processes are gone: only after somebody killed them or they broke."""
        if self.sim.alive.get(who) and self.sim.state(who) is State.STOPPING:
            self.sim.gone(who, cause)

    @rule(who=name, attempt=st.integers(0, 3), what=st.integers(0, 6))
    def late_report(self, who: str, attempt: int, what: int) -> None:
        """Reports of attempts that are over, of any kind."""
        if not self.known(who) or attempt >= self.sim.inst(who).attempt:
            return
        before = (self.sim.state(who), self.sim.inst(who).deadline)
        self.sim.send(
            [
                Ready(who, attempt),
                Broken(who, attempt, "late", 0),
                Gone(who, attempt),
                Progress(who, attempt, Phase.LOAD),
                Pulse(who, attempt, 1, 1, 5.0, True),
                CanaryBack(who, attempt, False),
                Alive(who, attempt),
            ][what]
        )
        assert before == (self.sim.state(who), self.sim.inst(who).deadline)

    @rule(who=name, moved=st.booleans(), running=st.integers(0, 3))
    def pulse(self, who: str, moved: bool, running: int) -> None:
        if self.sim.alive.get(who):
            self.sim.send(Pulse(who, self.sim.inst(who).attempt, running, 0, 1.0, moved))

    @rule(seconds=st.sampled_from([0.5, 5, 30, 70, 200, 1000]))
    def time(self, seconds: float) -> None:
        self.sim.pass_time(seconds)

    @rule(size=st.sampled_from([0, 2, 7]))
    def others_use(self, size: int) -> None:
        self.sim.external[next(iter(self.sim.totals))] = size * GIB
        self.sim.send(self.sim.reading())

    @rule(keep=st.sets(name, min_size=1), changed=st.sets(name))
    def reload(self, keep: set[str], changed: set[str]) -> None:
        for n in changed:
            self.models[n] = spec(n, 2.5)
        self.sim.send(
            Reload(configure(*(self.models[n] for n in NAMES if n in keep)), frozenset(changed), self.sim.ticket())
        )

    @precondition(lambda self: hasattr(self, "sim") and not self.shut)
    @rule()
    def shutdown(self) -> None:
        self.shut = True
        self.sim.send(Shutdown())

    def teardown(self) -> None:
        """A co-operative world: everything ends within bounded time, and everybody has been answered."""
        if not hasattr(self, "sim"):
            return
        sim = self.sim
        sim.external = dict.fromkeys(sim.totals, 0)
        for _ in range(200):
            if not any(
                i.deadline is not None and i.state is not State.READY for i in sim.core.world.instances.values()
            ):
                break
            for who in list(sim.core.world.instances):
                if who not in sim.core.world.instances:
                    continue
                match sim.state(who):
                    case State.WAITING if sim.inst(who).inspecting:
                        sim.problems = {}
                        sim.inspect(who)
                    case State.STARTING:
                        sim.spawned(who)
                        sim.measured(who)
                        sim.ready(who)
                    case State.DRAINING:
                        sim.breaks(who, status=0)
                    case State.STOPPING if who in sim.alive:
                        sim.gone(who)
            sim.send(sim.reading())
            sim.pass_time(1)
        left = {i.id: i.state for i in sim.core.world.instances.values()}
        assert set(left.values()) <= {State.STOPPED, State.READY, State.FAILED, State.WAITING, State.BACKOFF}, left
        sim.pass_time(700)  # whoever waits for memory that is not there gives up
        assert State.WAITING not in {i.state for i in sim.core.world.instances.values()} or any(
            i.inspecting for i in sim.core.world.instances.values()
        )
        for i in list(sim.core.world.instances.values()):
            if i.inspecting:
                sim.inspect(i.id)
        assert set(sim.answers) == set(range(1, sim.tickets + 1)), "somebody was never answered"
        assert sim.count(Spawn) >= sim.count(Terminate)


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
