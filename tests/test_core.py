"""The core by scripts of events: what follows from each, in which order, and when."""

import pytest

from tests.sim import GIB, Sim, settings, spec
from vllmd.core.states import State
from vllmd.events import (
    Broken,
    Canary,
    CanaryBack,
    DevicesRead,
    Finish,
    Forget,
    Gone,
    KillTree,
    Progress,
    Pulse,
    ReadDevices,
    Ready,
    Reload,
    Remember,
    Restart,
    Shutdown,
    Spawn,
    Start,
    Stop,
    Terminate,
)
from vllmd.facts import Phase
from vllmd.spec import Cause, Overrun, RestartRule

HEALS = Cause("oom", "CUDA out of memory", "out of memory")
FATAL = Cause("unknown-flag", "unrecognized arguments: --nope", "unknown flag", heals=False)


def start(sim: Sim, name: str) -> int:
    ticket = sim.ticket()
    sim.send(Start(name, ticket))
    return ticket


def stop(sim: Sim, name: str, now: bool = False) -> int:
    ticket = sim.ticket()
    sim.send(Stop(name, ticket, now))
    return ticket


def test_a_start_is_inspected_placed_spawned_and_ready() -> None:
    """The whole way up, with the answer given as soon as it is decided."""
    sim = Sim(settings(spec("a")))
    ticket = start(sim, "a")
    assert sim.state("a") is State.WAITING and ticket not in sim.answers
    sim.inspect("a")
    assert sim.state("a") is State.STARTING
    assert sim.answers[ticket].status == 202
    sim.spawned("a")
    sim.measured("a")
    sim.ready("a")
    assert sim.state("a") is State.READY
    assert sim.core.world.ledger.held["a"] == {"GPU-a": 3 * GIB}


def test_autostart_begins_at_boot_in_the_order_of_the_configuration() -> None:
    """Only models that say so are started."""
    sim = Sim(settings(spec("a", autostart=True), spec("b"), spec("c", autostart=True)))
    assert [sim.state(n) for n in "abc"] == [State.WAITING, State.STOPPED, State.WAITING]


def test_a_second_start_of_the_same_model_spawns_nothing() -> None:
    """Single flight: everybody is answered, one process exists."""
    sim = Sim(settings(spec("a")))
    tickets = [start(sim, "a") for _ in range(3)]
    sim.inspect("a")
    tickets += [start(sim, "a")]
    assert sim.count(Spawn) == 1
    assert {sim.answers[t].status for t in tickets} == {202}


def test_what_does_not_fit_is_refused_at_once_with_the_sum() -> None:
    """The message names need, room, budget, takers and what would help; the model is not failed."""
    sim = Sim(settings(spec("a"), spec("b"), spec("c")))
    for name in "ab":
        start(sim, name)
        sim.up(name)
    ticket = start(sim, "c")
    sim.inspect("c")
    answer = sim.answers[ticket]
    assert answer.status == 409
    for part in ("cannot start c: needs 3.0 GiB on GPU 0, 2.0 of 8.0 GiB left", "a 3.0 GiB", "b 3.0 GiB", "stop a"):
        assert part in answer.message
    assert sim.state("c") is State.STOPPED
    assert "vllmctl stop a" in answer.remedies


def test_the_limit_caps_what_models_take_together() -> None:
    """There is more memory in the device, but it was not given to vllmd."""
    sim = Sim(settings(spec("a"), spec("b"), limit=5))
    start(sim, "a")
    sim.up("a")
    ticket = start(sim, "b")
    sim.inspect("b")
    assert sim.answers[ticket].status == 409
    assert "2.0 of 5.0 GiB left" in sim.answers[ticket].message


def test_what_can_never_fit_fails_and_is_not_retried() -> None:
    """More than the whole budget is a permanent cause."""
    sim = Sim(settings(spec("a", 20)))
    ticket = start(sim, "a")
    sim.inspect("a")
    assert sim.answers[ticket].status == 422
    assert sim.state("a") is State.FAILED
    assert "whole budget of GPU 0 is 8.0 GiB" in sim.answers[ticket].message


def test_a_refused_preflight_fails_the_model_with_its_cause() -> None:
    """422, failed, and no deadline that would try again."""
    sim = Sim(settings(spec("a")))
    sim.problems["a"] = FATAL
    ticket = start(sim, "a")
    sim.inspect("a")
    assert (sim.answers[ticket].status, sim.answers[ticket].message) == (422, FATAL.text)
    assert sim.state("a") is State.FAILED and sim.core.next_deadline() is None


def test_a_start_waits_for_memory_that_is_on_its_way() -> None:
    """Stop one, start another: accepted, and placed when the memory is back."""
    sim = Sim(settings(spec("a", 6), spec("b", 6)))
    start(sim, "a")
    sim.up("a")
    stop(sim, "a")
    ticket = start(sim, "b")
    sim.inspect("b")
    assert sim.answers[ticket].status == 202 and sim.state("b") is State.WAITING
    assert sim.inst("b").waits_for == ("a",)
    sim.breaks("a", status=0)
    sim.gone("a")
    assert sim.state("a") is State.STOPPED and sim.state("b") is State.STARTING


def test_memory_is_held_until_the_device_shows_it_back() -> None:
    """On a GPU the driver may be slow: the successor waits for the reading, not for the process table."""
    sim = Sim(settings(spec("a", 6), spec("b", 6)))
    start(sim, "a")
    sim.up("a")
    sim.send(sim.reading())
    stop(sim, "a", now=True)
    start(sim, "b")
    sim.inspect("b")
    sim.external["GPU-a"] = 6 * GIB  # no process has it, and it is not free
    sim.gone("a")
    assert sim.state("a") is State.STOPPING and sim.state("b") is State.WAITING
    assert isinstance(sim.last(ReadDevices), ReadDevices)
    sim.external["GPU-a"] = 0
    sim.send(sim.reading())
    assert sim.state("b") is State.STARTING


def test_memory_that_never_comes_back_is_called_a_leak_and_counts_as_external() -> None:
    """After the limit the instance moves on, and what is missing is nobody's to promise."""
    sim = Sim(settings(spec("a", 6), spec("b", 6)))
    start(sim, "a")
    sim.up("a")
    sim.send(sim.reading())
    stop(sim, "a", now=True)
    sim.external["GPU-a"] = 6 * GIB
    sim.gone("a")
    sim.pass_time(61)
    assert sim.state("a") is State.STOPPED
    assert any("leak suspected" in text for text in sim.notes("leak"))
    ticket = start(sim, "b")
    sim.inspect("b")
    assert sim.answers[ticket].status == 409


def test_the_end_of_all_does_not_wait_for_memory() -> None:
    """A driver that is dead answers no more, and nothing will be started."""
    sim = Sim(settings(spec("a", 3), spec("b", 3)))
    for name in "ab":
        start(sim, name)
        sim.up(name)
    sim.send(sim.reading())
    stop(sim, "a", now=True)
    sim.send(Gone("a", sim.alive.pop("a")))
    assert sim.state("a") is State.STOPPING
    sim.send(Shutdown())
    sim.breaks("b", status=0)
    sim.send(Gone("b", sim.alive.pop("b")))
    assert sim.state("b") is State.STOPPED
    sim.send(DevicesRead((), "the driver is dead"))
    assert sim.state("a") is State.STOPPED and sim.count(Finish) == 1


def test_a_measuring_start_excludes_every_other_start_on_its_device() -> None:
    """vLLM measures device-wide: a second one waits until the first serves, on another GPU nobody waits."""
    sim = Sim(settings(spec("a", gpus=("0",)), spec("b", gpus=("0",)), spec("c", gpus=("1",))), gpus={"g0": 8, "g1": 8})
    for name in "abc":
        start(sim, name)
        sim.inspect(name)
    assert [sim.state(n) for n in "abc"] == [State.STARTING, State.WAITING, State.STARTING]
    assert "waiting for GPU 0: a is measuring" in sim.inst("b").waiting_text
    sim.spawned("a")
    sim.measured("a")
    assert sim.state("b") is State.WAITING  # graphs are still captured: that memory would be charged to b
    sim.ready("a")
    assert sim.state("b") is State.STARTING


def test_a_pinned_start_waits_only_until_its_neighbour_has_measured() -> None:
    """What allocates without measuring disturbs a measurement, and is not disturbed by graphs."""
    sim = Sim(settings(spec("a"), spec("b", kv_cache=GIB)))
    for name in "ab":
        start(sim, name)
        sim.inspect(name)
    assert sim.state("b") is State.WAITING
    sim.spawned("a")
    sim.measured("a")
    assert sim.state("b") is State.STARTING


def test_a_stop_waits_while_a_neighbour_measures() -> None:
    """Memory freed in the window would fool the one who measures; now=true does not wait."""
    sim = Sim(settings(spec("a"), spec("b")))
    start(sim, "a")
    sim.up("a")
    start(sim, "b")
    sim.inspect("b")
    stop(sim, "a")
    assert sim.state("a") is State.DRAINING and sim.count(Terminate) == 0
    sim.spawned("b")
    sim.measured("b")
    assert sim.count(Terminate) == 1


def test_pinned_kv_starts_in_parallel() -> None:
    """With kv_cache set nothing is measured, so nobody waits."""
    sim = Sim(settings(spec("a", kv_cache=GIB), spec("b", kv_cache=GIB)))
    for name in "ab":
        start(sim, name)
        sim.inspect(name)
    assert [sim.state(n) for n in "ab"] == [State.STARTING, State.STARTING]


@pytest.mark.parametrize("status", [0, 1, -9])
def test_every_exit_that_was_not_asked_for_is_a_crash(status: int) -> None:
    """vLLM exits 0 when its engine dies: only our own intent tells."""
    sim = Sim(settings(spec("a")))
    start(sim, "a")
    sim.up("a")
    sim.breaks("a", status=status)
    assert sim.state("a") is State.STOPPING
    assert sim.last(KillTree) == KillTree("a", 1, True)
    sim.gone("a", HEALS)
    assert sim.state("a") is State.BACKOFF


def test_a_crash_is_restarted_after_its_backoff_and_keeps_its_place() -> None:
    """A neighbour that asks meanwhile does not get the memory of a crashed model."""
    sim = Sim(settings(spec("a", 6), spec("b", 6)))
    start(sim, "a")
    sim.up("a")
    sim.breaks("a")
    sim.gone("a", HEALS)
    ticket = start(sim, "b")
    sim.inspect("b")
    assert sim.answers[ticket].status == 409
    sim.pass_time(1.2)
    assert sim.state("a") is State.WAITING and sim.inst("a").restarts == 1
    sim.up("a")
    assert sim.state("a") is State.READY


def test_backoff_grows_and_the_fifth_failure_in_the_window_is_the_end() -> None:
    """1, 2, 4, 8 s, then failed with the memory released."""
    sim = Sim(settings(spec("a")))
    start(sim, "a")
    pauses = []
    for _ in range(4):
        sim.up("a")
        sim.breaks("a")
        sim.gone("a", HEALS)
        due = sim.core.next_deadline()
        assert due is not None
        pauses.append(due - sim.now)
        sim.pass_time(pauses[-1])
    assert [int(p) for p in pauses] == [1, 2, 4, 8]
    sim.up("a")
    sim.breaks("a")
    sim.gone("a", HEALS)
    assert sim.state("a") is State.FAILED
    assert "a" not in sim.core.world.ledger.held
    assert sim.inst("a").cause is not None and "failed 5 times in 15 min" in sim.inst("a").cause.text


def test_failures_are_forgotten_after_long_health() -> None:
    """reset_after of service clears the count."""
    sim = Sim(settings(spec("a", restart=RestartRule(max_failures=2, window=1e6))))
    start(sim, "a")
    sim.up("a")
    sim.breaks("a")
    sim.gone("a", HEALS)
    sim.pass_time(2)
    sim.up("a")
    sim.now += 601
    sim.send(Pulse("a", 2, 0, 0, 1.0, True))
    sim.breaks("a")
    sim.gone("a", HEALS)
    assert sim.state("a") is State.BACKOFF


def test_failures_outside_the_window_do_not_count() -> None:
    """Two crashes further apart than `window` are two first ones."""
    sim = Sim(settings(spec("a", restart=RestartRule(max_failures=2, window=100, reset_after=1e6))))
    start(sim, "a")
    sim.up("a")
    sim.breaks("a")
    sim.gone("a", HEALS)
    sim.pass_time(2)
    sim.up("a")
    sim.now += 101
    sim.breaks("a")
    sim.gone("a", HEALS)
    assert sim.state("a") is State.BACKOFF and len(sim.inst("a").failures) == 1


def test_the_pause_has_a_longest() -> None:
    """It doubles up to backoff_max, jitter aside."""
    sim = Sim(settings(spec("a", restart=RestartRule(backoff=1, backoff_max=4, max_failures=9))))
    start(sim, "a")
    pauses = []
    for _ in range(6):
        sim.up("a")
        sim.breaks("a")
        sim.gone("a", HEALS)
        due = sim.inst("a").deadline
        assert due is not None
        pauses.append(due - sim.now)
        sim.pass_time(5)
    for pause, base in zip(pauses, (1, 2, 4, 4, 4, 4), strict=True):
        assert base <= pause <= base * 1.1


def test_what_cannot_heal_is_not_retried() -> None:
    """One crash with a permanent cause is the end."""
    sim = Sim(settings(spec("a")))
    start(sim, "a")
    sim.inspect("a")
    sim.spawned("a")
    sim.breaks("a")
    sim.gone("a", FATAL)
    assert sim.state("a") is State.FAILED


def test_failed_is_left_by_a_start() -> None:
    """The operator may always try again."""
    sim = Sim(settings(spec("a")))
    sim.problems["a"] = FATAL
    start(sim, "a")
    sim.inspect("a")
    sim.problems.clear()
    start(sim, "a")
    sim.up("a")
    assert sim.state("a") is State.READY and sim.inst("a").cause is None


def test_late_reports_of_an_earlier_attempt_change_nothing() -> None:
    """Dropped by comparison of the attempt."""
    sim = Sim(settings(spec("a")))
    start(sim, "a")
    sim.up("a")
    sim.breaks("a")
    sim.gone("a", HEALS)
    sim.pass_time(2)
    sim.inspect("a")
    sim.send(Ready("a", 1))
    sim.send(Broken("a", 1, "late", 0))
    assert sim.state("a") is State.STARTING


def test_a_stop_drains_by_sigterm_and_kills_what_stays() -> None:
    """Terminate first; past drain + stop_timeout the tree is killed."""
    sim = Sim(settings(spec("a", drain=30.0, stop_timeout=20.0)))
    start(sim, "a")
    sim.up("a")
    ticket = stop(sim, "a")
    assert sim.answers[ticket].status == 202
    assert sim.count(Terminate) == 1 and sim.count(KillTree) == 0
    sim.pass_time(49)
    assert sim.state("a") is State.DRAINING
    sim.pass_time(2)
    assert sim.count(KillTree) == 1
    sim.gone("a")
    assert sim.state("a") is State.STOPPED


def test_a_drained_leader_is_still_swept_for_stragglers() -> None:
    """Exit after SIGTERM leads to the same kill of the tree, and is no crash."""
    sim = Sim(settings(spec("a")))
    start(sim, "a")
    sim.up("a")
    stop(sim, "a")
    sim.breaks("a", status=0)
    assert sim.last(KillTree) == KillTree("a", 1, False)
    sim.gone("a")
    assert sim.state("a") is State.STOPPED and sim.inst("a").cause is None


def test_a_start_is_cancelled_by_killing_the_tree() -> None:
    """SIGTERM during a start is swallowed by vLLM."""
    sim = Sim(settings(spec("a")))
    start(sim, "a")
    sim.inspect("a")
    sim.spawned("a")
    stop(sim, "a")
    assert sim.count(Terminate) == 0 and sim.count(KillTree) == 1


def test_a_kill_that_reports_nothing_is_repeated() -> None:
    """No dead end in stopping."""
    sim = Sim(settings(spec("a")))
    start(sim, "a")
    sim.up("a")
    stop(sim, "a", now=True)
    sim.pass_time(16)
    assert sim.count(KillTree) == 2


def test_a_start_without_a_sign_of_life_is_given_up() -> None:
    """The stall clock, not wall time: signs of life extend it."""
    sim = Sim(settings(spec("a", start_stall=180.0)))
    start(sim, "a")
    sim.inspect("a")
    sim.spawned("a")
    for _ in range(5):
        sim.pass_time(170)
        sim.send(Progress("a", 1, Phase.LOAD, 0.5))
    assert sim.state("a") is State.STARTING
    sim.pass_time(181)
    assert sim.state("a") is State.STOPPING
    assert "no sign of life for 3 min" in sim.inst("a").verdict.text  # type: ignore[union-attr]


def test_an_idle_engine_is_asked_for_a_token_and_called_hung_when_it_does_not_answer() -> None:
    """Canary half-way, hang at hang_after since the last proof."""
    sim = Sim(settings(spec("a", hang_after=120.0)))
    start(sim, "a")
    sim.up("a")
    sim.pass_time(59)
    assert sim.count(Canary) == 0
    sim.pass_time(2)
    assert sim.count(Canary) == 1
    sim.pass_time(57)
    assert sim.state("a") is State.READY
    sim.pass_time(3)
    assert sim.state("a") is State.STOPPING and sim.core.world.counters["hangs", "a"] == 1
    sim.gone("a", HEALS)
    assert sim.inst("a").cause.kind == "hung"  # type: ignore[union-attr]


def test_moving_counters_are_proof_of_life() -> None:
    """A slow canary behind real work is no hang."""
    sim = Sim(settings(spec("a", hang_after=120.0)))
    start(sim, "a")
    sim.up("a")
    for step in range(20):
        sim.pass_time(50)
        sim.send(Pulse("a", 1, 3, 0, float(step), True))
    assert sim.state("a") is State.READY


def test_requests_running_without_a_token_for_hang_after_is_a_hang() -> None:
    """Flat counters prove nothing, however often they are read."""
    sim = Sim(settings(spec("a", hang_after=120.0)))
    start(sim, "a")
    sim.up("a")
    sim.send(CanaryBack("a", 1, None))  # this model answers no canary
    for _ in range(13):
        sim.pass_time(10)
        sim.send(Pulse("a", 1, 2, 0, 5.0, False))
    assert sim.state("a") is State.STOPPING


def test_an_idle_engine_that_answers_no_canary_is_left_alone() -> None:
    """Nothing to do and nothing to ask is no reason to kill."""
    sim = Sim(settings(spec("a", hang_after=120.0)))
    start(sim, "a")
    sim.up("a")
    sim.send(CanaryBack("a", 1, None))
    for _ in range(100):
        sim.pass_time(10)
        sim.send(Pulse("a", 1, 0, 0, 5.0, False))
    assert sim.state("a") is State.READY


def test_a_good_start_teaches_its_need() -> None:
    """Base = peak use without the KV cache that vLLM printed."""
    sim = Sim(settings(spec("a")))
    start(sim, "a")
    sim.up("a")
    sim.send(sim.reading())
    learned = sim.last(Remember).learned  # type: ignore[attr-defined]
    assert (learned.base, learned.kv) == (2 * GIB, GIB)


def test_overrun_warns_by_default_and_restarts_when_told() -> None:
    """Use beyond the promise is noted once; on_overrun decides."""
    for rule, state in ((Overrun.WARN, State.READY), (Overrun.RESTART, State.DRAINING), (Overrun.STOP, State.DRAINING)):
        sim = Sim(settings(spec("a", on_overrun=rule)))
        start(sim, "a")
        sim.up("a")
        for _ in range(5):
            reading = sim.reading().devices[0]
            sim.send(DevicesRead((type(reading)(*[
                {"instances": {"a": 4 * GIB}, "used": 4 * GIB}.get(f, getattr(reading, f)) for f in type(reading).__slots__
            ]),)))  # fmt: skip
            sim.now += 5
        assert sim.state("a") is state
        assert len(sim.notes("overrun")) == 1
        assert sim.inst("a").wanted is (rule is not Overrun.STOP)


def test_outside_growth_is_noted_once_and_kills_nothing() -> None:
    """Running models are left alone, nothing new is started."""
    sim = Sim(settings(spec("a"), spec("b", 1)))
    start(sim, "a")
    sim.up("a")
    sim.external["GPU-a"] = 6 * GIB
    sim.send(sim.reading())
    sim.send(sim.reading())
    assert sim.state("a") is State.READY and len(sim.notes("external")) == 1
    ticket = start(sim, "b")
    sim.inspect("b")
    assert sim.answers[ticket].status == 409


def test_reload_restarts_only_what_it_must() -> None:
    """One of two changed: the other keeps its attempt; a removed one is drained and forgotten; a new one appears."""
    sim = Sim(settings(spec("a", 2), spec("b", 2), spec("c", 2)))
    for name in "abc":
        start(sim, name)
        sim.up(name)
    new = settings(spec("a", 2), spec("b", 3), spec("d", 2, autostart=True))
    ticket = sim.ticket()
    sim.send(Reload(new, frozenset({"b"}), ticket))
    assert sim.answers[ticket].status == 200
    assert [sim.state(n) for n in "abc"] == [State.READY, State.DRAINING, State.DRAINING]
    for name in "bc":
        sim.breaks(name, status=0)
        sim.gone(name)
    assert "c" not in sim.core.world.instances
    assert [each.instance for each in sim.commands if isinstance(each, Forget)] == ["c"]
    assert sim.state("b") is State.WAITING
    sim.up("b")
    assert sim.inst("b").spec.vram == 3 * GIB and sim.inst("a").attempt == 1
    assert sim.state("d") is State.WAITING


def test_restart_drains_and_starts_again() -> None:
    """The same model, the next attempt."""
    sim = Sim(settings(spec("a")))
    start(sim, "a")
    sim.up("a")
    sim.send(Restart("a", sim.ticket()))
    sim.breaks("a", status=0)
    sim.gone("a")
    sim.up("a")
    assert sim.inst("a").attempt == 2 and sim.inst("a").restarts == 0


def test_shutdown_ends_everything_and_then_finishes() -> None:
    """Waiting, backing off, starting, ready: all end; a second shutdown skips the drains."""
    sim = Sim(settings(spec("a", 2), spec("b", 2), spec("c", 2), spec("d", 2)), gpus={"g0": 32})
    start(sim, "a")
    sim.up("a")
    start(sim, "b")
    sim.inspect("b")
    waiting = start(sim, "c")
    sim.send(Shutdown())
    assert sim.answers[waiting].status == 409
    assert sim.state("a") is State.DRAINING and sim.count(Finish) == 0
    late = start(sim, "d")
    assert sim.answers[late].status == 503
    sim.send(Shutdown())
    assert sim.state("a") is State.STOPPING
    for name in "ab":
        sim.gone(name)
    assert sim.count(Finish) == 1


def test_an_unknown_model_is_answered_with_the_nearest_name() -> None:
    """404, and nothing else happens."""
    sim = Sim(settings(spec("dots-ocr")))
    ticket = start(sim, "dot-ocr")
    assert sim.answers[ticket].status == 404 and "dots-ocr" in sim.answers[ticket].message


def test_a_missing_device_fails_that_model_only() -> None:
    """A GPU that is named but not present is a permanent cause of one model."""
    sim = Sim(settings(spec("a", gpus=("GPU-x",)), spec("b")))
    ticket = start(sim, "a")
    sim.inspect("a")
    assert sim.answers[ticket].status == 422 and "GPU-x is not present" in sim.answers[ticket].message
    start(sim, "b")
    sim.up("b")
    assert sim.state("b") is State.READY


def test_tensor_parallel_reserves_on_all_its_devices_at_once() -> None:
    """Two GPUs, one promise on each."""
    sim = Sim(settings(spec("a", gpus=2)), gpus={"g0": 8, "g1": 8})
    start(sim, "a")
    sim.inspect("a")
    assert sim.core.world.ledger.held["a"] == {"g0": 3 * GIB, "g1": 3 * GIB}
    spawn = sim.last(Spawn)
    assert spawn.launch.env["CUDA_VISIBLE_DEVICES"] == "g0,g1"  # type: ignore[attr-defined]
    assert "--tensor-parallel-size" in spawn.launch.argv  # type: ignore[attr-defined]


def test_nothing_is_started_on_a_device_that_fell_silent() -> None:
    """What others hold there is not known any more: refused with the reason, until it answers again."""
    sim = Sim(settings(spec("a")))
    sim.silent = set(sim.totals)
    sim.pass_time(31)
    ticket = start(sim, "a")
    sim.inspect("a")
    assert sim.answers[ticket].status == 422 and "no device answers" in sim.answers[ticket].message
    sim.silent = set()
    start(sim, "a")
    sim.up("a")
    assert sim.state("a") is State.READY


def test_an_automatic_start_refused_for_what_may_pass_is_tried_again() -> None:
    """A port that is taken may be free at the next try; five times in the window are the end. An operator is told at once."""
    busy = Cause("port-taken", "port 8000 is taken by nginx (pid 7)", "port taken")
    sim = Sim(settings(spec("a", autostart=True), spec("b")))
    sim.problems = {"a": busy, "b": busy}
    ticket = start(sim, "b")
    sim.inspect("b")
    assert sim.answers[ticket].status == 422 and sim.state("b") is State.FAILED
    for _ in range(4):
        sim.inspect("a")
        assert sim.state("a") is State.BACKOFF
        sim.pass_time(10)
    sim.inspect("a")
    assert sim.state("a") is State.FAILED
    assert "failed 5 times" in sim.inst("a").cause.text  # type: ignore[union-attr]


def test_a_pinned_kv_cache_is_learned_as_it_was_pinned() -> None:
    """vLLM prints sizes rounded to 0.01 GiB; what was passed to it is exact."""
    sim = Sim(settings(spec("a", kv_cache=GIB // 2)))
    start(sim, "a")
    sim.up("a")  # prints 1 GiB
    sim.send(sim.reading())
    assert sim.last(Remember).learned.kv == GIB // 2  # type: ignore[attr-defined]
