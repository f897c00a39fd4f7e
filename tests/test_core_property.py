"""The core under random scripts of events. What must hold after every single event is checked in tests/sim.py: nothing is
overcommitted, no process is without an instance or a promise, nobody can stay in a timed state for ever, nobody is
answered twice. Here: whatever happened, once the world co-operates everything comes to rest, and everybody was answered.
"""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.sim import GIB, Sim, spec
from tests.sim import settings as configure
from vllmd.core.placing import Blocked, find_place
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
    Start,
    Stop,
)
from vllmd.facts import Phase
from vllmd.spec import Cause, Settings

NAMES = ("a", "b", "c", "d")
name = st.sampled_from(NAMES)
OOM = Cause("oom", "out of memory", "oom")
FATAL = Cause("unknown-flag", "no such flag", "flag", heals=False)
#: States that end by themselves in a co-operative world.
MOVING = frozenset({State.STARTING, State.DRAINING, State.STOPPING, State.BACKOFF})


class Life(RuleBasedStateMachine):
    """Four models of random size on one to four GPUs, and everything that may happen to them."""

    def new(self, config: Settings, gpus: dict[str, float]) -> Sim:
        """The world of this life."""
        return Sim(config, gpus=gpus)

    @initialize(
        sizes=st.lists(st.sampled_from([1.5, 2, 3, 5, 9]), min_size=4, max_size=4),
        pinned=st.lists(st.booleans(), min_size=4, max_size=4),
        cards=st.lists(st.sampled_from([None, None, 2, ("0", "1")]), min_size=4, max_size=4),
        gpus=st.sampled_from(
            [{"g0": 8.0}, {"g0": 8.0, "g1": 6.0}, {"g0": 8.0, "g1": 8.0, "g2": 8.0, "g3": 12.0}, {"cpu": 8.0}]
        ),
        autostart=st.booleans(),
        up=st.sets(name),
    )
    def begin(
        self,
        sizes: list[float],
        pinned: list[bool],
        cards: list[Any],
        gpus: dict[str, float],
        autostart: bool,
        up: set[str],
    ) -> None:
        self.models = {
            n: spec(n, size, kv_cache=GIB // 4 if pin else None, autostart=autostart, gpus=count)
            for n, size, pin, count in zip(NAMES, sizes, pinned, cards, strict=True)
        }
        self.sim = self.new(configure(*self.models.values()), gpus)
        self.shut = False
        self.come_up(up, 3)

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

    @rule(who=name, good=st.sampled_from([True, True, True, False]))
    def inspect(self, who: str, good: bool) -> None:
        if self.known(who):
            self.sim.problems = {} if good else {who: FATAL}
            self.sim.inspect(who)

    @rule(whom=st.sets(name, min_size=2), far=st.integers(1, 3))
    def some_come_up(self, whom: set[str], far: int) -> None:
        self.come_up(whom, far)

    def come_up(self, whom: set[str], far: int) -> None:
        """What an operator mostly sees: they are wanted, looked at, spawned, ready; or so far."""
        self.sim.problems = {}
        for who in sorted(whom):
            if not self.known(who):
                continue
            if self.sim.state(who) in (State.STOPPED, State.FAILED, State.BACKOFF):
                self.start(who)
            if far > 1 and self.known(who) and self.sim.inst(who).inspecting:
                self.sim.inspect(who)
            if far > 2 and self.sim.state(who) is State.STARTING:
                self.gets_ready(who)

    @rule()
    def all_that_die_are_gone(self) -> None:
        """What was killed mostly dies at once, and its memory is back."""
        for who in list(self.sim.alive):
            if self.sim.state(who) is State.STOPPING:
                self.sim.gone(who)

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

    @rule(who=name)
    def memory_lags(self, who: str) -> None:
        """Its processes are dead before anybody tells, and the driver takes its time."""
        if self.sim.alive.get(who) and self.sim.state(who) is State.STOPPING and who not in self.sim.ghosts:
            self.sim.dies(who)

    @rule(who=name, cause=st.sampled_from([None, OOM, FATAL]), back=st.booleans())
    def ends(self, who: str, cause: Cause | None, back: bool) -> None:
        """Its processes are gone: only after somebody killed them or they broke."""
        if self.sim.alive.get(who) and self.sim.state(who) is State.STOPPING:
            self.sim.gone(who, cause, back=back)

    @rule()
    def memory_is_back(self) -> None:
        self.sim.ghosts = {who: sizes for who, sizes in self.sim.ghosts.items() if who in self.sim.alive}
        self.sim.look()

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

    @rule(seconds=st.sampled_from([3, 40, 400]))
    def oversleeps(self, seconds: float) -> None:
        """The daemon is stopped for a while."""
        self.sim.sleep(seconds)

    @rule(size=st.sampled_from([0, 2, 7]), named=st.booleans())
    def others_use(self, size: int, named: bool) -> None:
        first = next(iter(self.sim.totals))
        self.sim.external[first] = 0 if named else size * GIB
        self.sim.programs[first] = {"firefox": size * GIB} if named else {}
        self.sim.look()

    @rule(which=st.sampled_from([set(), set(), {0}, {1}, {0, 1, 2, 3}]))
    def falls_silent(self, which: set[int]) -> None:
        """Those devices do not answer from now on, all others do."""
        self.sim.silent = {name for n, name in enumerate(self.sim.totals) if n in which}
        self.sim.look()

    @rule(
        keep=st.sets(name, min_size=1),
        changed=st.sets(name),
        autostart=st.booleans(),
        limit=st.sampled_from([None, None, 4]),
    )
    def reload(self, keep: set[str], changed: set[str], autostart: bool, limit: float | None) -> None:
        """Models go, come back, change; the limit too."""
        old = self.sim.core.world.settings.models
        for n in changed:
            self.models[n] = spec(n, 2.5, autostart=autostart)
        new = configure(*(self.models[n] for n in NAMES if n in keep), limit=limit)
        self.sim.send(Reload(new, frozenset(changed & keep & old.keys()), self.sim.ticket()))
        for n in keep - old.keys():
            assert self.sim.state(n) is not State.STOPPED or not self.models[n].autostart or self.shut

    @precondition(lambda self: hasattr(self, "sim") and not self.shut and self.sim.handled > 60)
    @rule()
    def shutdown(self) -> None:
        self.shut = True
        self.sim.send(Shutdown())

    def teardown(self) -> None:
        """A co-operative world: everything ends within bounded time, nobody waits for what is there, and everybody has been
        answered."""
        if not hasattr(self, "sim"):
            return
        sim, world = self.sim, self.sim.core.world
        sim.external, sim.silent = dict.fromkeys(sim.totals, 0), set()
        sim.programs = {name: {} for name in sim.totals}
        sim.look()
        for _ in range(200):
            sim.ghosts = {who: sizes for who, sizes in sim.ghosts.items() if who in sim.alive}
            if not any(i.state in MOVING or i.inspecting for i in world.instances.values()):
                break
            for who in list(world.instances):
                if who not in world.instances:
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
            sim.look()
            sim.pass_time(1)
        left = {i.id: i.state for i in world.instances.values()}
        assert set(left.values()) <= {State.STOPPED, State.READY, State.FAILED, State.WAITING}, left
        assert not any(i.disturbed and i.measuring for i in world.instances.values())
        for i in world.instances.values():
            if i.state is State.WAITING:
                assert isinstance(find_place(world, i), Blocked), f"{i.id} waits for what is there: {i.waiting_text}"
        sim.pass_time(
            400
        )  # an operator's start that waits for memory that is not there gives up; an automatic one does not
        waiting = [i for i in world.instances.values() if i.state is State.WAITING and not i.inspecting]
        assert all(i.patient for i in waiting)
        for i in list(world.instances.values()):
            if i.inspecting:
                sim.inspect(i.id)
        assert set(sim.answers) == set(range(1, sim.tickets + 1)), "somebody was never answered"


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
