"""The core's patience: who waits for what, who gives up, and what a daemon that slept itself may conclude."""

from dataclasses import replace

import pytest

from tests.sim import GIB, Sim, settings, spec
from vllmd.core import view, words
from vllmd.core.states import State
from vllmd.events import (
    Canary,
    CanaryBack,
    DevicesRead,
    Gone,
    Inspect,
    Inspected,
    Progress,
    Pulse,
    Reload,
    Spawn,
)
from vllmd.facts import EngineFacts, Inspection, ModelFacts, Phase
from vllmd.spec import Cause, RestartRule

FATAL = Cause("bad-flag", "unrecognized arguments: --nope", "bad flag", heals=False)
OOM = Cause("out-of-memory", "CUDA out of memory", "out of memory")


# -- a daemon that was itself stopped ---------------------------------------------------------------------------------


@pytest.mark.parametrize("asleep", [70.0, 300.0, 86_400.0])
def test_a_daemon_that_slept_calls_nobody_hung(asleep: float) -> None:
    """Ctrl-Z, SIGSTOP, a starved machine: silence that it could not hear is none. What follows is as if it had not slept."""
    sim = Sim(settings(spec("a", hang_after=120.0)))
    sim.up("a")
    sim.live(20)
    sim.sleep(asleep)
    assert sim.state("a") is State.READY and len(sim.notes("late")) == 1
    sim.live(45)
    assert sim.count(Canary) == 1
    sim.live(50)
    assert sim.state("a") is State.READY
    sim.live(15)
    assert sim.state("a") is State.STOPPING


def test_a_daemon_that_slept_hears_what_came_meanwhile_first() -> None:
    """Not the timer wakes it but whatever event comes first: the same."""
    sim = Sim(settings(spec("a", hang_after=120.0)))
    sim.up("a")
    sim.live(70)
    sim.now += 500.0
    sim.look()
    sim.send(None)
    assert sim.state("a") is State.READY and len(sim.notes("late")) == 1


def test_a_daemon_that_slept_over_a_test_request_waits_for_its_answer() -> None:
    """What is outstanding has the rest of its time from when the daemon runs again; then it is a hang."""
    sim = Sim(settings(spec("a", hang_after=120.0)))
    sim.up("a")
    sim.live(70)
    assert sim.count(Canary) == 1
    sim.sleep(600)
    sim.live(45)
    assert sim.state("a") is State.READY
    sim.live(10)
    assert sim.state("a") is State.STOPPING


def test_a_test_request_that_came_late_has_half_of_the_time() -> None:
    """Nobody is called hung whom nobody asked: after a silence of any length a request is sent and waited for."""
    sim = Sim(settings(spec("a", hang_after=120.0)))
    sim.up("a")
    sim.inst("a").proved -= 400.0  # silent for longer than hang_after, and never asked
    sim.pass_time(60)
    assert sim.state("a") is State.READY and sim.count(Canary) == 1
    sim.pass_time(59)
    assert sim.state("a") is State.READY
    sim.pass_time(2)
    assert sim.state("a") is State.STOPPING


def test_a_daemon_that_slept_gives_up_no_start() -> None:
    """A start's silence while nobody listened is none; after that it counts again."""
    sim = Sim(settings(spec("a", start_stall=180.0)))
    sim.start("a")
    sim.inspect("a")
    sim.live(100)
    sim.sleep(1000)
    assert sim.state("a") is State.STARTING
    sim.send(Progress("a", 1, Phase.LOAD))
    sim.pass_time(181)
    assert sim.state("a") is State.STOPPING


def test_a_timer_that_is_a_little_late_changes_nothing() -> None:
    """Seconds are a busy machine."""
    sim = Sim(settings(spec("a", start_stall=180.0)))
    sim.start("a")
    sim.inspect("a")
    sim.now += 183.0
    sim.send(None)
    assert sim.state("a") is State.STOPPING and not sim.notes("late")


def test_a_backoff_is_over_when_it_is_over() -> None:
    """What was slept through is not waited for again."""
    sim = Sim(settings(spec("a")))
    sim.up("a")
    sim.breaks("a")
    sim.gone("a", OOM)
    sim.sleep(500)
    assert sim.state("a") is State.WAITING


# -- in line ----------------------------------------------------------------------------------------------------------


def test_a_line_of_starts_is_served_to_its_end() -> None:
    """Seven on one card, a minute each: the last waits far beyond queue_timeout, and starts."""
    names = [f"m{n}" for n in range(7)]
    sim = Sim(settings(*[spec(n, 1, autostart=True, hang_after=1e6) for n in names]))
    for n in names:
        sim.inspect(n)
    for _ in names:
        (starting,) = [n for n in names if sim.state(n) is State.STARTING]
        sim.spawned(starting)
        for _ in range(7):
            sim.pass_time(10)
            sim.send(Progress(starting, 1, Phase.LOAD))
            sim.look()
        sim.measured(starting)
        sim.ready(starting)
    assert {sim.state(n) for n in names} == {State.READY}


def test_an_operators_start_in_line_is_not_given_up_while_a_neighbour_starts() -> None:
    """It was accepted: the neighbour has its own limits."""
    sim = Sim(settings(spec("a", start_stall=1e6), spec("b", queue_timeout=300.0)))
    for n in "ab":
        sim.start(n)
        sim.inspect(n)
    sim.live(1000)
    assert sim.state("b") is State.WAITING
    sim.measured("a")
    sim.ready("a")
    assert sim.state("b") is State.STARTING


def test_an_automatic_start_waits_for_memory_as_long_as_it_must() -> None:
    """It is said once, with what it waits for; when there is room it starts."""
    sim = Sim(settings(spec("a", 6, hang_after=1e6), spec("b", 6, autostart=True)))
    sim.external["GPU-a"] = 6 * GIB
    sim.inspect("b")
    sim.live(3000)
    assert sim.state("b") is State.WAITING
    assert len(sim.notes("waiting")) == 1 and "needs 6.0 GiB on GPU 0" in sim.notes("waiting")[0]
    sim.external["GPU-a"] = 0
    sim.look()
    assert sim.state("b") is State.STARTING


def test_an_operators_start_is_told_when_the_memory_did_not_come() -> None:
    """Accepted for memory that was coming free; somebody else took it."""
    sim = Sim(settings(spec("a", 6), spec("b", 6, queue_timeout=300.0)))
    sim.up("a")
    sim.stop("a")
    ticket = sim.start("b")
    sim.inspect("b")
    assert sim.answers[ticket].status == 202
    sim.external["GPU-a"] = 6 * GIB
    sim.breaks("a", status=0)
    sim.gone("a")
    sim.live(301)
    assert sim.state("b") is State.FAILED
    assert sim.inst("b").cause.kind == "no-room"  # type: ignore[union-attr]


# -- trouble that passes ----------------------------------------------------------------------------------------------


def test_an_automatic_start_waits_for_a_driver_that_does_not_answer() -> None:
    """At boot too: nothing is known of the devices yet."""
    sim = Sim(settings(spec("a", autostart=True)), blind=True)
    sim.inspect("a")
    assert sim.state("a") is State.WAITING and "no device answers" in sim.inst("a").waiting_text
    assert words.explain(sim.core.world, sim.inst("a"), sim.now).short == "for a device"
    sim.live(1000)
    assert sim.state("a") is State.WAITING
    sim.silent = set()
    sim.look()
    assert sim.state("a") is State.STARTING


@pytest.mark.parametrize("gpus", [("1",), ("GPU-b",), 2])
def test_a_card_that_was_seen_is_waited_for(gpus: object) -> None:
    """It fell off the bus while the model ran: it keeps its place, and is back when the card is."""
    sim = Sim(settings(spec("a", gpus=gpus, autostart=True)), gpus={"GPU-a": 8, "GPU-b": 8})
    sim.up("a")
    sim.breaks("a")
    sim.gone("a", OOM)
    held = dict(sim.core.world.ledger.held["a"])
    sim.silent = {"GPU-b"}
    sim.pass_time(40)
    sim.inspect("a")
    assert sim.state("a") is State.WAITING and "does not answer" in sim.inst("a").waiting_text
    assert sim.core.world.ledger.held["a"] == held
    sim.silent = set()
    sim.look()
    assert sim.state("a") is State.STARTING


def test_a_card_that_is_absent_while_the_driver_is_in_trouble_is_waited_for() -> None:
    """Not seen since the daemon started, but something is said to be lost: that may be it."""
    sim = Sim(settings(spec("a", gpus=("GPU-b",), autostart=True)), gpus={"GPU-a": 8, "GPU-b": 8}, blind=True)
    sim.silent = {"GPU-b"}
    sim.inspect("a")
    assert sim.state("a") is State.WAITING
    sim.silent = set()
    sim.look()
    assert sim.state("a") is State.STARTING


def test_an_operator_is_told_of_a_silent_card_at_once() -> None:
    """Somebody stands at the door."""
    sim = Sim(settings(spec("a", gpus=("1",))), gpus={"GPU-a": 8, "GPU-b": 8})
    sim.silent = {"GPU-b"}
    sim.pass_time(40)
    ticket = sim.start("a")
    sim.inspect("a")
    assert sim.answers[ticket].status == 422 and "1 does not answer" in sim.answers[ticket].message


def test_files_that_do_not_answer_are_asked_again() -> None:
    """A network file system that hangs for a moment: an automatic start backs off, with its place."""
    sim = Sim(settings(spec("a", autostart=True)))
    sim.pass_time(20.5)
    assert sim.state("a") is State.BACKOFF
    sim.pass_time(2)
    sim.up("a")
    assert sim.state("a") is State.READY


def test_memory_on_a_silent_card_is_no_leak() -> None:
    """Whether it came back nobody can say; the crash is answered as always."""
    sim = Sim(settings(spec("a")))
    sim.up("a")
    sim.live(5)
    sim.silent = {"GPU-a"}
    sim.live(5)
    sim.breaks("a")
    sim.gone("a", OOM)
    sim.live(61)
    assert not sim.notes("leak") and any("does not answer" in text for text in sim.notes("devices"))
    assert sim.inst("a").leak == ""


# -- removed, changed, asked again ------------------------------------------------------------------------------------


def test_a_removed_model_is_not_started_again() -> None:
    """While it drains it still has a name; a start of it is refused, and it is forgotten when it is gone."""
    sim = Sim(settings(spec("a"), spec("b")))
    sim.up("a")
    sim.send(Reload(settings(spec("b"))))
    ticket = sim.start("a")
    assert sim.answers[ticket].status == 409 and "removed" in sim.answers[ticket].message
    sim.breaks("a", status=0)
    sim.gone("a")
    assert "a" not in sim.core.world.instances


def test_a_removed_model_that_was_to_start_again_rests() -> None:
    """A restart was asked for before the reload."""
    sim = Sim(settings(spec("a"), spec("b")))
    sim.up("a")
    sim.stop("a")
    sim.start("a")
    sim.send(Reload(settings(spec("b"))))
    sim.inst("a").wanted = True  # whoever wants it
    sim.breaks("a", status=0)
    sim.gone("a")
    assert "a" not in sim.core.world.instances and sim.count(Spawn) == 1


def test_a_model_that_comes_back_while_it_drains_comes_new() -> None:
    """With what the new configuration says, autostart too; the process that drains keeps what it was started with."""
    old, new = spec("a"), spec("a", 5, autostart=True)
    sim = Sim(settings(old, spec("b")))
    sim.up("a")
    sim.send(Reload(settings(spec("b"))))
    sim.send(Reload(settings(new, spec("b"))))
    assert sim.inst("a").spec is old and sim.state("a") is State.DRAINING
    sim.breaks("a", status=0)
    sim.gone("a")
    assert sim.state("a") is State.WAITING
    sim.up("a")
    assert sim.inst("a").spec is new and sim.core.world.ledger.held["a"] == {"GPU-a": 5 * GIB}


def test_a_model_that_comes_back_without_autostart_rests() -> None:
    """Nobody wants it up."""
    sim = Sim(settings(spec("a"), spec("b")))
    sim.up("a")
    sim.send(Reload(settings(spec("b"))))
    sim.send(Reload(settings(spec("a"), spec("b"))))
    sim.breaks("a", status=0)
    sim.gone("a")
    assert sim.state("a") is State.STOPPED


def test_what_was_found_of_a_removed_model_is_not_taken_for_the_new_one() -> None:
    """Attempts are numbered on when a model comes back."""
    sim = Sim(settings(spec("a", autostart=True), spec("b")))
    sim.send(Reload(settings(spec("b"))))
    sim.send(Reload(settings(replace(spec("a", autostart=True), model="/m/other"), spec("b"))))
    old = Inspection(ModelFacts("/m/old", {}, 1, "old"), EngineFacts("/bin/vllm"), None)
    sim.send(Inspected("a", 1, old))
    assert sim.state("a") is State.WAITING and sim.inst("a").inspecting
    assert sim.inst("a").attempt == 2


def test_a_reload_does_not_end_the_wish_of_who_waits() -> None:
    """Its configuration changed while it was looked at: looked at anew, and the operator hears how that ends."""
    sim = Sim(settings(spec("a"), spec("b")))
    ticket = sim.start("a")
    sim.send(Reload(settings(spec("a", 2), spec("b")), frozenset({"a"})))
    assert ticket not in sim.answers and sim.state("a") is State.WAITING
    assert [c.attempt for c in sim.commands if isinstance(c, Inspect)] == [1, 2]
    sim.inspect("a")
    assert sim.answers[ticket].status == 202 and sim.state("a") is State.STARTING
    assert sim.core.world.ledger.held["a"] == {"GPU-a": 2 * GIB}


def test_a_start_asked_for_while_a_crash_is_cleaned_up_is_kept() -> None:
    """Accepted is accepted: as with a failed model, the operator may always try again."""
    sim = Sim(settings(spec("a")))
    sim.up("a")
    sim.breaks("a")
    ticket = sim.start("a")
    assert sim.answers[ticket].status == 202
    sim.gone("a", FATAL)
    assert sim.state("a") is State.WAITING
    assert sim.inst("a").cause is FATAL and sim.inst("a").failures == []
    sim.up("a")
    assert sim.state("a") is State.READY


def test_a_stop_after_that_counts() -> None:
    """The last wish wins."""
    sim = Sim(settings(spec("a")))
    sim.up("a")
    sim.breaks("a")
    sim.start("a")
    sim.stop("a")
    sim.gone("a", OOM)
    assert sim.state("a") is State.STOPPED


def test_a_start_during_a_backoff_only_makes_it_sooner() -> None:
    """It would have waited for memory; asked for by hand it does not lose that, nor its place."""
    sim = Sim(settings(spec("a", autostart=True)))
    sim.up("a")
    sim.breaks("a")
    sim.gone("a", OOM)
    sim.external["GPU-a"] = 6 * GIB
    ticket = sim.start("a")
    sim.inspect("a")
    assert sim.answers[ticket].status == 202 and sim.state("a") is State.WAITING
    assert sim.inst("a").wanted
    sim.external["GPU-a"] = 0
    sim.look()
    assert sim.state("a") is State.STARTING


# -- what is known of an engine ---------------------------------------------------------------------------------------


def test_whether_it_answers_test_requests_is_found_out_anew() -> None:
    """One odd answer of an attempt says nothing of the next."""
    sim = Sim(settings(spec("a")))
    sim.up("a")
    sim.send(CanaryBack("a", 1, None))
    sim.stop("a", now=True)
    sim.gone("a")
    sim.up("a")
    sim.pass_time(61)
    assert sim.count(Canary) == 1


def test_a_start_that_stood_still_is_explained_by_its_log() -> None:
    """A rule knows why: that is the cause, and whether it heals. Anything vague is not."""
    for said, kind, state in (
        (FATAL, "bad-flag", State.FAILED),
        (Cause("engine-died", "its log does not say why", "died"), "stalled", State.BACKOFF),
        (None, "stalled", State.BACKOFF),
    ):
        sim = Sim(settings(spec("a", restart=RestartRule())))
        sim.start("a")
        sim.inspect("a")
        sim.pass_time(181)
        sim.gone("a", said)
        cause = sim.inst("a").cause
        assert cause is not None and (cause.kind, sim.state("a")) == (kind, state)
        assert "no sign of life for 3 min" in cause.text


def test_no_room_is_not_said_of_a_model_that_would_fit() -> None:
    """A refusal is about the moment: when there is room it is gone."""
    sim = Sim(settings(spec("a", 6), spec("b", 6)))
    sim.up("a")
    sim.start("b")
    sim.inspect("b")
    assert view.model(sim.core.world, sim.inst("b"), sim.now)["why"]["class"] == "no-room"
    sim.look()
    assert view.model(sim.core.world, sim.inst("b"), sim.now)["why"]["class"] == "no-room"
    sim.stop("a", now=True)
    sim.gone("a")
    assert view.model(sim.core.world, sim.inst("b"), sim.now)["why"] is None


def test_a_model_that_has_failed_uses_nothing() -> None:
    """The last reading still knows its processes; they are gone."""
    sim = Sim(settings(spec("a")), gpus={"cpu": 8})
    sim.start("a")
    sim.inspect("a")
    sim.look()
    sim.breaks("a")
    sim.send(Gone("a", sim.alive.pop("a"), FATAL))
    shown = view.model(sim.core.world, sim.inst("a"), sim.now)
    assert (shown["state"], shown["used"], shown["reserved"], shown["per_device"]) == ("failed", 0, 0, [])


def test_pulses_while_a_test_request_is_out_do_not_hide_a_later_freeze() -> None:
    """It worked on, then froze with the request still unanswered: hung from its last token on."""
    sim = Sim(settings(spec("a", hang_after=120.0)))
    sim.up("a")
    sim.pass_time(61)
    assert sim.count(Canary) == 1
    for n in range(10):
        sim.pass_time(10)
        sim.send(Pulse("a", 1, 1, 0, float(n), True))  # the last look that showed nothing new was 10 s before
    sim.pass_time(109)
    assert sim.state("a") is State.READY
    sim.pass_time(2)
    assert sim.state("a") is State.STOPPING


def test_devices_that_answer_again_are_no_trouble_any_more() -> None:
    """The sentence goes with the trouble."""
    sim = Sim(settings(spec("a")))
    sim.send(DevicesRead((), "driver gone"))
    assert sim.core.world.trouble == "driver gone"
    sim.look()
    assert sim.core.world.trouble == ""
