"""Random traffic over models that do not fit together: no request is answered twice or never, nothing is overcommitted (tests/
sim.py checks it after every event), and nobody waits beyond its patience while the world co-operates."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.crowd import Crowd
from tests.sim import settings as configure
from tests.sim import spec
from vllmd.core.states import ALIVE, State
from vllmd.events import Doze, Reload, Slept, Start, Stop, SwapTest
from vllmd.spec import Cause

NAMES = ("a", "b", "c", "d")
name = st.sampled_from(NAMES)
PATIENCE, RESIDENT = 60.0, 30.0
CRASH = Cause("crashed", "crashed", "crashed")


class Traffic(RuleBasedStateMachine):
    """Four models, one to three GPUs, and clients that come and go."""

    @initialize(
        sizes=st.lists(st.sampled_from([2.0, 3.0, 5.0, 8.0]), min_size=4, max_size=4),
        gpus=st.sampled_from([{"g0": 8.0}, {"g0": 8.0, "g1": 6.0}, {"g0": 8.0, "g1": 8.0}, {"cpu": 8.0}]),
        pinned=st.sets(name, max_size=1),
        home=st.sets(name, max_size=2),
        wide=st.sets(name, max_size=1),
        ttl=st.sampled_from([None, 40.0]),
        sleepy=st.sets(name, max_size=4),
    )
    def begin(
        self, sizes: list[float], gpus: dict[str, float], pinned: set[str], home: set[str], wide: set[str],
        ttl: float | None, sleepy: set[str],
    ) -> None:  # fmt: skip
        self.models = {
            n: spec(
                n, size, pinned=n in pinned, home=n in home, ttl=ttl, max_wait=PATIENCE, min_resident=RESIDENT,
                max_drain=120.0, gpus=2 if n in wide and len(gpus) > 1 else None, priority=i % 3,
                swap="sleep1" if n in sleepy else "stop",
            )
            for i, (n, size) in enumerate(zip(NAMES, sizes, strict=True))
        }  # fmt: skip
        self.crowd = Crowd(configure(*self.models.values()), gpus=gpus)

    def known(self, who: str) -> bool:
        return who in self.crowd.core.world.instances

    @rule(who=name, count=st.integers(1, 4))
    def ask(self, who: str, count: int) -> None:
        for _ in range(count):
            if self.known(who):
                self.crowd.ask(who)

    @rule(which=st.integers(0, 40))
    def leave(self, which: int) -> None:
        open_ones = [r for r in self.crowd.requests if not r.fate]
        if open_ones:
            self.crowd.leave(open_ones[which % len(open_ones)])

    @rule(who=name, count=st.integers(1, 3))
    def answer(self, who: str, count: int) -> None:
        self.crowd.answer(who, count)

    @rule(who=name)
    def inspect(self, who: str) -> None:
        if self.known(who) and self.crowd.inst(who).inspecting:
            self.crowd.inspect(who)
            self.crowd.tell()

    @rule(who=name)
    def get_ready(self, who: str) -> None:
        if self.known(who) and self.crowd.state(who) is State.STARTING:
            self.crowd.measured(who)
            self.crowd.ready(who)
            self.crowd.tell()

    @rule(answers=st.booleans())
    def work(self, answers: bool) -> None:
        self.crowd.work(answers=answers)

    @rule(who=name)
    def crash(self, who: str) -> None:
        if self.known(who) and self.crowd.state(who) in ALIVE - {State.DRAINING, State.STOPPING}:
            self.crowd.crash(who)

    @rule(who=name, fails=st.booleans())
    def lull(self, who: str, fails: bool) -> None:
        """One that falls asleep or wakes has done so, or cannot."""
        if not self.known(who):
            return
        inst = self.crowd.inst(who)
        if inst.state is State.DOZING and not inst.drain_held and not inst.slept_at:
            if fails:
                self.crowd.send(Slept(who, inst.attempt, "no"))
            else:
                self.crowd.falls_asleep(who)
        elif inst.state is State.WAKING:
            self.crowd.wakes(who, "no" if fails else "")
        self.crowd.tell()

    @rule(who=name, test=st.booleans())
    def to_bed(self, who: str, test: bool) -> None:
        if self.known(who):
            wish = SwapTest if test else Doze
            self.crowd.send(wish(who, self.crowd.ticket()))
            self.crowd.tell()

    @rule()
    def die(self) -> None:
        for who in list(self.crowd.alive):
            if self.crowd.state(who) is State.STOPPING:
                self.crowd.gone(who, CRASH if self.crowd.inst(who).crashed else None)
                self.crowd.tell()

    @rule(seconds=st.sampled_from([0.5, 3.0, 20.0, 61.0]), answers=st.booleans())
    def time_passes(self, seconds: float, answers: bool) -> None:
        self.crowd.live_on(seconds, answers=answers)

    @rule(who=name, up=st.booleans())
    def operator(self, who: str, up: bool) -> None:
        if self.known(who):
            self.crowd.send(Start(who, self.crowd.ticket()) if up else Stop(who, self.crowd.ticket(), False))
            self.crowd.tell()

    @precondition(lambda self: len(self.crowd.core.world.settings.models) == len(NAMES))
    @rule(who=name)
    def remove(self, who: str) -> None:
        self.crowd.send(Reload(configure(*(m for n, m in self.models.items() if n != who))))
        self.crowd.tell()

    @precondition(lambda self: len(self.crowd.core.world.settings.models) < len(NAMES))
    @rule()
    def restore(self) -> None:
        self.crowd.send(Reload(configure(*self.models.values())))
        self.crowd.tell()

    def teardown(self) -> None:
        """Once the world co-operates every request has one fate, and nobody is shut or claims anything any more."""
        if not hasattr(self, "crowd"):
            return
        crowd = self.crowd
        for _ in range(40):
            crowd.live_on(60)
            if all(request.fate for request in crowd.requests):
                break
        stuck = [(r.model, r.since) for r in crowd.requests if not r.fate]
        assert not stuck, [(i.id, i.state, i.waiting_text) for i in crowd.core.world.instances.values()]
        crowd.live_on(400)
        for inst in crowd.core.world.instances.values():
            assert not inst.claim, f"{inst.id} still claims {inst.claim}"
            assert not inst.shut_for, f"{inst.id} is still shut for {inst.shut_for}"
            assert inst.trial is None or inst.trial.result, f"{inst.id} is tested for ever"


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 1.0, 7.0, 30.0])), min_size=1, max_size=60),
    st.sampled_from(["stop", "sleep1"]),
)
def test_nobody_waits_beyond_its_patience(traffic: list[tuple[str, float]], swap: str) -> None:
    """Three models of which one fits, engines that answer at once: patience, and a turn of each of the others, is the most."""
    models = (
        spec(n, 8.0 if swap == "stop" else 6.0, max_wait=PATIENCE, min_resident=RESIDENT, swap=swap) for n in "abc"
    )
    crowd = Crowd(configure(*models))
    for who, pause in traffic:
        crowd.ask(who)
        crowd.live_on(pause)
    crowd.live_on(4 * PATIENCE)
    for request in crowd.requests:
        assert request.fate == "answered"
        assert request.begun is not None
        assert request.begun - request.since <= PATIENCE + 3 * 5.0  # time moves in steps of 5 s here
