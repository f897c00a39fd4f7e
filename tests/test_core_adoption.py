"""A daemon dies and another one comes: scripts of events, and a random life with deaths in it."""

from dataclasses import asdict, fields, replace

import cattrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.mortal import Mortal
from tests.sim import GIB, LLAMA, spec
from tests.sim import settings as configure
from tests.test_core_property import NAMES, Life
from vllmd.core.adoption import SHARED
from vllmd.core.states import State
from vllmd.core.world import Instance
from vllmd.events import Adopt, Inspected, KillTree, Restart, Save, Shutdown, Spawn, Start, Stop, Terminate
from vllmd.facts import EngineFacts, Inspection, ModelFacts
from vllmd.record import Record
from vllmd.spec import Cause, Remedy


def running(*names: str, **keys: object) -> Mortal:
    """These models are ready."""
    sim = Mortal(configure(*(spec(name, 2.0, **keys) for name in names)))
    for name in names:
        sim.send(Start(name, sim.ticket()))
        sim.up(name)
    return sim


def test_a_ready_model_goes_on_as_it_was() -> None:
    """Same attempt, promise, need and age; nothing is spawned, nothing is asked of it but proof of life."""
    sim = running("a", "b")
    before = {name: sim.inst(name) for name in "ab"}
    held = dict(sim.core.world.ledger.held)
    spawned = sim.count(Spawn)
    sim.now += 500.0  # longer than hang_after: nobody looked, and nobody is blamed for it
    sim.rise()
    for name in "ab":
        old, new = before[name], sim.inst(name)
        assert new is not old
        assert (new.state, new.attempt, new.pid, new.need) == (State.READY, old.attempt, old.pid, old.need)
        assert new.deadline is not None and new.deadline > sim.now
        assert (new.ready_at, new.since, new.key, new.launch) == (old.ready_at, old.since, old.key, old.launch)
    assert sim.core.world.ledger.held == held
    assert sim.count(Spawn) == spawned and sim.count(Adopt) == 2
    assert not any(isinstance(c, KillTree | Terminate) for c in sim.commands)


def test_what_died_meanwhile_crashed() -> None:
    """The policy for crashes follows: its tree is killed, then a backoff, then a new attempt; it counts."""
    sim = running("a", "b")
    sim.rise(dead="a")
    assert sim.state("a") is State.STOPPING and sim.state("b") is State.READY
    sim.gone("a", Cause("oom", "out of memory", "oom"))
    assert sim.state("a") is State.BACKOFF and len(sim.inst("a").failures) == 1
    sim.pass_time(2)
    sim.inspect("a")
    assert sim.state("a") is State.STARTING and sim.inst("a").restarts == 1


def test_a_start_goes_on_where_it_was() -> None:
    """Its attempt, its measuring window and its promise are kept; nobody else starts meanwhile."""
    sim = Mortal(configure(spec("a", 2.0), spec("b", 2.0)))
    sim.send(Start("a"))
    sim.inspect("a")
    sim.spawned("a")
    sim.rise()
    assert sim.state("a") is State.STARTING and sim.inst("a").measuring
    sim.send(Start("b"))
    sim.inspect("b")
    assert sim.state("b") is State.WAITING
    sim.measured("a")
    sim.ready("a")
    assert sim.state("a") is State.READY and sim.state("b") is State.STARTING
    assert sim.inst("a").resumed


@pytest.mark.parametrize("done", range(12))
def test_killed_at_any_command_of_an_admission_nothing_is_doubled_or_lost(done: int) -> None:
    """Before the spawn it is started anew, after it it is adopted."""
    sim = Mortal(configure(spec("a", 2.0)))
    sim.send(Start("a"))
    sim.send(sim.reading())
    inst = sim.inst("a")
    found = Inspection(ModelFacts("/m/a", LLAMA, 10_000_000, "f"), EngineFacts("/bin/vllm", "0.32.0", None), None)
    sim.die_at(Inspected("a", inst.attempt, found), done)
    ran = "a" in sim.alive
    sim.rise()
    if ran:
        assert sim.state("a") is State.STARTING and sim.inst("a").attempt == inst.attempt
    else:
        assert sim.state("a") is State.WAITING
        sim.inspect("a")
    sim.measured("a")
    sim.ready("a")
    assert sim.count(Spawn) == 1


def test_a_stop_that_was_under_way_is_finished() -> None:
    """The drain keeps its limit, what was stopped stays so, and autostart does not bring it back."""
    sim = running("a", autostart=True)
    sim.send(Stop("a", sim.ticket()))
    limit = sim.inst("a").deadline
    sim.pass_time(3)
    sim.rise()
    assert sim.state("a") is State.DRAINING and sim.inst("a").deadline == limit
    assert sim.count(Terminate) == 2, "whoever died may not have sent it"
    sim.breaks("a", status=0)
    killed = sim.count(KillTree)
    sim.rise()
    assert sim.state("a") is State.STOPPING and sim.count(KillTree) == killed + 1
    sim.gone("a")
    assert sim.state("a") is State.STOPPED
    sim.rise()
    assert sim.state("a") is State.STOPPED


def test_a_restart_that_was_under_way_is_finished() -> None:
    """It ends, and begins again."""
    sim = running("a")
    sim.send(Restart("a", sim.ticket()))
    sim.rise()
    sim.breaks("a", status=0)
    sim.rise()
    sim.gone("a")
    sim.inspect("a")
    assert sim.state("a") is State.STARTING


def test_failures_are_not_forgotten() -> None:
    """A crash loop is not given new lives by a daemon's death, and a failed model stays failed with its cause."""
    sim = running("a")
    for _ in range(4):
        sim.breaks("a")
        sim.gone("a", Cause("oom", "out of memory", "oom", (Remedy("less"),)))
        until = sim.inst("a").deadline
        sim.rise()
        assert sim.state("a") is State.BACKOFF and sim.inst("a").deadline == until
        assert "a" in sim.core.world.ledger.held and until is not None
        sim.pass_time(until - sim.now)
        sim.up("a")
    sim.breaks("a")
    sim.gone("a", Cause("oom", "out of memory", "oom", (Remedy("less"),)))
    assert sim.state("a") is State.FAILED
    cause = sim.inst("a").cause
    sim.rise()
    assert sim.state("a") is State.FAILED and sim.inst("a").cause == cause
    sim.rise(changed="a")
    assert sim.state("a") is State.WAITING, "another configuration may do better"


def test_another_configuration_restarts_what_must_and_ends_what_is_gone() -> None:
    """As a reload would have."""
    sim = running("a", "b", "c")
    sim.rise(configure(spec("a", 3.0), spec("b", 2.0)), changed="a")
    assert [sim.state(name) for name in "abc"] == [State.DRAINING, State.READY, State.DRAINING]
    for name in "ac":
        sim.breaks(name, status=0)
        sim.gone(name)
    assert "c" not in sim.core.world.instances and "c" not in sim.disk
    sim.inspect("a")
    assert sim.state("a") is State.STARTING and sim.inst("a").spec.vram == 3 * GIB


def test_after_an_end_that_was_cut_short_autostart_decides() -> None:
    """Killed while it ended everything: what still lives is ended first, then it is as after any boot."""
    sim = Mortal(configure(spec("a", 2.0, autostart=True), spec("b", 2.0)))
    sim.up("a")
    sim.send(Start("b"))
    sim.up("b")
    sim.send(Shutdown())
    sim.rise()
    assert sim.state("a") is State.STOPPING and sim.state("b") is State.STOPPING
    sim.gone("a")
    sim.gone("b")
    assert sim.state("a") is State.WAITING and sim.state("b") is State.STOPPED


def test_a_record_of_every_field_comes_back_as_it_was() -> None:
    """Through JSON, and with fields that are missing or unknown."""
    sim = running("a")
    sim.breaks("a")
    sim.gone("a", Cause("oom", "out of memory", "oom", (Remedy("less", {"method": "POST", "path": "/x"}),)))
    record = sim.record("a")
    kept = next(c.record for c in reversed(sim.commands) if isinstance(c, Save))
    assert record == kept and record.cause and record.cause.remedies[0].action
    assert cattrs.structure(asdict(record) | {"from_the_future": 1}, Record) == record
    least = cattrs.structure({"id": "a", "model": "a", "state": "ready", "attempt": 3}, Record)
    assert replace(least) == Record("a", "a", "ready", 3)


def test_shared_fields_are_in_both() -> None:
    """A field that one side renames would be lost in silence."""
    mine, kept = ({f.name for f in fields(kind)} for kind in (Instance, Record))
    assert set(SHARED) <= mine & kept


class LifeWithDeaths(Life):
    """Everything that may happen to models, and the daemon is killed again and again."""

    def new(self, models: object, gpus: dict[str, float]) -> Mortal:
        return Mortal(models, gpus=gpus)  # type: ignore[arg-type]

    @precondition(lambda self: hasattr(self, "sim") and not self.shut)
    @rule(dead=st.sets(st.sampled_from(NAMES)), keep=st.sets(st.sampled_from(NAMES), min_size=1))
    def dies(self, dead: set[str], keep: set[str]) -> None:
        before = {name: self.sim.state(name) for name in self.sim.alive}
        self.sim.rise(configure(*(self.models[n] for n in NAMES if n in keep)), dead=dead)
        for name, state in before.items():
            if name in keep and name not in dead:
                assert self.sim.state(name) is state

    @precondition(lambda self: hasattr(self, "sim") and not self.shut)
    @rule(who=st.sampled_from(NAMES), done=st.integers(0, 8), what=st.sampled_from([Start, Stop, Restart]))
    def dies_at_work(self, who: str, done: int, what: type) -> None:
        self.sim.die_at(what(who, self.sim.ticket()), done)
        self.sim.rise()


TestLifeWithDeaths = LifeWithDeaths.TestCase
TestLifeWithDeaths.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
