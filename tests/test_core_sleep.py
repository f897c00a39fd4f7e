"""Sleep as a middle step of making room: only what was proved sleeps, only what is seen to be free is given away, nobody is
sent to a sleeper, and what does not wake as it was is started anew."""

import jsonschema
import pytest

from tests.crowd import Crowd
from tests.mortal import Mortal
from tests.sim import GIB, settings, spec
from vllmd.core import view
from vllmd.core.core import Core
from vllmd.core.states import State
from vllmd.edge.schemas import schemas
from vllmd.events import (
    Broken,
    Doze,
    KillTree,
    Lend,
    Printed,
    Prove,
    Reload,
    Restart,
    Sleep,
    Slept,
    Spawn,
    SwapTest,
    Terminate,
    Wake,
    Woke,
)
from vllmd.facts import Figures, Proof


def pair(*, residual: float = 1.0, proved: bool = True, gpus: dict[str, float] | None = None, **more: object) -> Crowd:
    """Two models that sleep, of which one fits awake beside the other asleep."""
    models = (spec(name, 5.0, swap="sleep1", **more) for name in "ab")
    return Crowd(settings(*models), residual=residual, proved=proved, gpus=gpus or {"GPU-a": 8.0})


def asleep(crowd: Crowd) -> None:
    """a sleeps, b is up."""
    crowd.ask("a")
    crowd.work()
    crowd.live_on(61)
    crowd.ask("b")
    crowd.work()
    assert crowd.state("a") is State.ASLEEP
    assert crowd.state("b") is State.READY


# -- making room ------------------------------------------------------------------------------------------------------


def test_one_that_is_proved_sleeps_and_keeps_what_it_still_uses() -> None:
    crowd = pair()
    asleep(crowd)
    assert crowd.core.world.ledger.held["a"] == {"GPU-a": GIB}
    assert crowd.count(Terminate) == crowd.count(KillTree) == 0
    assert any(
        "makes room for b (idle 61 s, sleeps, 4.0 GiB of 5.0 GiB, awake in 2 s" in t for t in crowd.notes("evict")
    )
    (told,) = crowd.notes("swap")
    assert "a emptied in 0 ms, asleep with its memory back in " in told


def test_without_a_proof_it_ends() -> None:
    crowd = pair(proved=False)
    crowd.ask("a")
    crowd.work()
    crowd.live_on(61)
    crowd.ask("b")
    crowd.work()
    assert crowd.state("a") is State.STOPPED
    assert crowd.count(Sleep) == 0


def test_a_proof_of_another_level_is_none() -> None:
    crowd = pair()
    crowd.ask("a")
    crowd.work()
    key = crowd.inst("a").key
    crowd.core.world.proofs[key] = Proof(2, GIB, 2 * GIB, 1.0, 2.0)
    crowd.live_on(61)
    crowd.ask("b")
    crowd.work()
    assert crowd.count(Sleep) == 0


def test_where_sleep_frees_nothing_it_ends() -> None:
    """As on "cpu", where vLLM's build only simulates it."""
    crowd = pair()
    crowd.ask("a")
    crowd.work()
    crowd.core.world.proofs[crowd.inst("a").key] = Proof(1, 2 * GIB, 0, 1.0, 2.0)
    crowd.live_on(61)
    crowd.ask("b")
    crowd.work()
    assert crowd.state("a") is State.STOPPED
    assert crowd.count(Sleep) == 0


def test_its_memory_is_nobodys_until_a_reading_shows_it() -> None:
    crowd = pair()
    crowd.ask("a")
    crowd.work()
    crowd.live_on(61)
    crowd.ask("b")
    crowd.inspect("b")
    crowd.tell()
    assert crowd.state("a") is State.DOZING
    crowd.send(Slept("a", 1, "", 1.0))
    assert crowd.state("b") is State.WAITING
    crowd.look()  # it still has all of it
    assert crowd.state("a") is State.DOZING
    assert crowd.core.world.ledger.held["a"] == {"GPU-a": 5 * GIB}
    crowd.uses["a"] = GIB
    crowd.look()
    assert crowd.state("a") is State.ASLEEP
    assert crowd.state("b") is State.STARTING


def test_what_a_late_reading_shows_counts_as_it_is() -> None:
    """More than was proved: the one who waits gets less, or the sleeper is ended."""
    crowd = pair()
    crowd.ask("a")
    crowd.work()
    crowd.live_on(61)
    crowd.ask("b")
    crowd.inspect("b")
    crowd.tell()
    crowd.uses["a"] = 4 * GIB
    crowd.send(Slept("a", 1, "", 1.0))
    crowd.pass_time(4)
    crowd.look()
    crowd.work()
    assert crowd.ready_models() == ["b"]
    assert crowd.state("a") is State.STOPPED, "what it kept was too much for both"


def test_one_that_need_not_sleep_is_ended_only_where_sleep_does_not_suffice() -> None:
    """c needs more than the sleep of both gives."""
    models = (spec("a", 4.0, swap="sleep1"), spec("b", 4.0, swap="sleep1"), spec("c", 7.0))
    crowd = Crowd(settings(*models), gpus={"GPU-a": 8.0})
    for name in "ab":
        crowd.ask(name)
        crowd.work()
    crowd.live_on(61)
    request = crowd.ask("c")
    crowd.work()
    assert request.fate == "answered"
    states = sorted(str(crowd.state(name)) for name in "ab")
    assert states == ["asleep", "stopped"]


def test_a_sleeper_is_ended_for_what_it_keeps() -> None:
    crowd = Crowd(settings(spec("a", 5.0, swap="sleep1"), spec("b", 5.0), spec("c", 8.0)), gpus={"GPU-a": 8.0})
    asleep(crowd)
    crowd.live_on(61)
    request = crowd.ask("c")
    crowd.work()
    assert request.fate == "answered"
    assert crowd.state("a") is State.STOPPED
    assert any("asleep, ends: the 1.0 GiB that it keeps go to c" in text for text in crowd.notes("evict"))


def test_a_neighbour_that_measures_is_not_disturbed_by_sleep_or_waking() -> None:
    models = (spec("a", 3.0, swap="sleep1"), spec("b", 4.0, pinned=True), spec("c", 2.0), spec("d", 1.0))
    crowd = Crowd(settings(*models), gpus={"GPU-a": 8.0})
    for name in "ab":
        crowd.ask(name)
        crowd.work()
    crowd.live_on(61)
    crowd.ask("b")
    crowd.work()
    crowd.start("d")
    crowd.inspect("d")
    assert crowd.inst("d").measuring
    crowd.ask("c")
    crowd.inspect("c")
    crowd.tell()
    assert crowd.state("a") is State.DOZING
    assert crowd.count(Sleep) == 0
    crowd.send(Printed("d", 1, Figures(kv_bytes=GIB), True))
    assert crowd.count(Sleep) == 1


def test_it_does_not_wake_while_a_neighbour_measures() -> None:
    crowd = Crowd(settings(spec("a", 3.0, swap="sleep1"), spec("b", 6.0), spec("c", 2.0)), gpus={"GPU-a": 8.0})
    asleep(crowd)
    crowd.stop("b")
    crowd.work()
    crowd.start("c")
    crowd.inspect("c")
    assert crowd.inst("c").measuring
    crowd.ask("a")
    assert crowd.state("a") is State.ASLEEP
    assert "c is measuring its memory" in crowd.inst("a").waiting_text
    crowd.measured("c")
    assert crowd.state("a") is State.WAKING


def test_requests_that_come_while_it_falls_asleep_wake_it_in_their_turn() -> None:
    crowd = pair(min_resident=0.0)
    crowd.ask("a")
    crowd.work()
    crowd.live_on(5)
    crowd.ask("b")
    crowd.inspect("b")
    crowd.tell()
    assert crowd.state("a") is State.DOZING
    late = crowd.ask("a")
    assert late.begun is None
    crowd.live_on(200)
    assert late.fate == "answered"
    assert crowd.inst("a").attempt == 1


# -- waking -----------------------------------------------------------------------------------------------------------


def test_a_request_wakes_it_when_others_have_made_room() -> None:
    crowd = pair()
    asleep(crowd)
    request = crowd.ask("a")
    assert request.begun is None
    assert crowd.state("a") is State.ASLEEP, "b was used a moment ago"
    assert crowd.inst("a").deadline is not None
    crowd.live_on(62)
    assert request.fate == "answered"
    assert crowd.ready_models() == ["a"]
    assert crowd.state("b") is State.ASLEEP
    assert crowd.inst("a").attempt == 1
    assert crowd.core.world.ledger.held["a"] == {"GPU-a": 5 * GIB}


def test_it_wakes_at_once_where_there_is_room() -> None:
    crowd = pair()
    asleep(crowd)
    crowd.stop("b")
    crowd.work()
    request = crowd.ask("a")
    assert crowd.state("a") is State.WAKING
    assert request.begun is None, "never to one that does not serve"
    crowd.work()
    assert request.fate == "answered"


def test_one_that_woke_stays_for_min_resident() -> None:
    crowd = pair()
    asleep(crowd)
    crowd.stop("b")
    crowd.work()
    crowd.ask("a")
    crowd.work()
    crowd.live_on(30)
    request = crowd.ask("b")
    crowd.work()
    assert request.begun is None
    crowd.live_on(31)
    assert request.fate == "answered"


def test_a_line_that_leaves_lets_it_sleep_on() -> None:
    crowd = pair()
    asleep(crowd)
    request = crowd.ask("a")
    crowd.leave(request)
    crowd.live_on(300)
    assert crowd.state("a") is State.ASLEEP
    assert not crowd.inst("a").claim


def test_the_wake_does_not_overcommit_when_others_took_the_memory() -> None:
    crowd = pair()
    asleep(crowd)
    crowd.programs["GPU-a"]["Xorg"] = 2 * GIB
    request = crowd.ask("a")
    crowd.live_on(200)
    assert crowd.state("a") in (State.ASLEEP, State.READY)
    assert request.fate


def test_an_operator_wakes_it_with_start_and_is_told_when_there_is_no_room() -> None:
    crowd = pair()
    asleep(crowd)
    assert crowd.answers[crowd.start("a")].status == 409
    assert crowd.state("a") is State.ASLEEP
    crowd.stop("b")
    crowd.work()
    assert crowd.answers[crowd.start("a")].status == 202
    crowd.work()
    assert crowd.state("a") is State.READY


def test_its_line_is_served_elsewhere_if_that_is_sooner() -> None:
    models = (spec("a", 5.0, swap="sleep1"), spec("b", 5.0, pinned=True), spec("c", 6.0, pinned=True))
    crowd = Crowd(settings(*models), gpus={"g0": 8.0, "g1": 6.0})
    crowd.ask("c")  # on the smaller card
    crowd.work()
    asleep(crowd)
    crowd.stop("c")
    crowd.work()
    request = crowd.ask("a")
    crowd.live_on(5)
    assert request.fate == "answered"
    assert crowd.inst("a").devices == ("g1",)


def test_home_wakes_when_there_is_room() -> None:
    crowd = Crowd(settings(spec("a", 5.0, swap="sleep1", home=True, autostart=True), spec("b", 5.0, ttl=100.0)))
    crowd.work()
    crowd.ask("b")
    crowd.work()
    assert crowd.state("a") is State.ASLEEP
    crowd.live_on(150)
    assert crowd.ready_models() == ["a"]
    assert crowd.inst("a").attempt == 1


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("news", "kind"),
    [(("no memory", None), "wake-failed"), (("", False), "wake-changed")],
    ids=["fails", "other answer"],
)
def test_one_that_does_not_wake_as_it_was_is_started_anew_and_not_relied_on(
    news: tuple[str, bool | None], kind: str
) -> None:
    crowd = pair()
    asleep(crowd)
    crowd.stop("b")
    crowd.work()
    request = crowd.ask("a")
    crowd.wakes("a", *news)
    assert crowd.state("a") is State.STOPPING
    crowd.live_on(10)
    assert request.fate == "answered"
    assert crowd.inst("a").attempt == 2
    assert any(isinstance(c, Prove) and c.proof is None for c in crowd.commands)
    assert crowd.inst("a").last.kind == kind  # type: ignore[union-attr]


def test_one_that_does_not_fall_asleep_ends_instead() -> None:
    crowd = pair()
    crowd.ask("a")
    crowd.work()
    crowd.live_on(61)
    request = crowd.ask("b")
    crowd.inspect("b")
    crowd.tell()
    crowd.send(Slept("a", 1, "status 500"))
    crowd.work()
    assert request.fate == "answered"
    assert crowd.state("a") is State.STOPPED
    assert crowd.inst("a").key not in {c.key for c in crowd.commands if isinstance(c, Prove) and c.proof}


@pytest.mark.parametrize("waking", [False, True])
def test_silence_has_an_end(waking: bool) -> None:
    crowd = pair()
    if waking:
        asleep(crowd)
        crowd.stop("b")
        crowd.work()
        crowd.ask("a")
    else:
        crowd.ask("a")
        crowd.work()
        crowd.live_on(61)
        crowd.ask("b")
        crowd.inspect("b")
        crowd.tell()
    crowd.pass_time(181)
    assert crowd.state("a") is State.STOPPING


def test_a_leak_from_sleep_to_sleep_ends_in_a_new_start() -> None:
    crowd = pair(min_resident=0.0)
    asleep(crowd)
    crowd.stop("b")
    crowd.work()
    crowd.ask("a")
    crowd.work()
    assert crowd.state("a") is State.READY
    crowd.residual = int(1.6 * GIB)
    request = crowd.ask("b")
    crowd.live_on(10)
    assert request.fate == "answered"
    assert crowd.state("a") is State.STOPPED
    assert any("keeps 0.6 GiB more asleep than after its first sleep" in text for text in crowd.notes("sleep"))


@pytest.mark.parametrize("waits", [False, True])
def test_a_crash_asleep_is_as_stopped_unless_somebody_waits(waits: bool) -> None:
    crowd = pair(max_wait=1000.0)
    asleep(crowd)
    if waits:
        crowd.ask("b")
        crowd.work(answers=False)
        request = crowd.ask("a")
        crowd.live_on(5, answers=False)
    crowd.crash("a")
    crowd.gone("a")
    assert crowd.state("a") is (State.BACKOFF if waits else State.STOPPED)
    assert "a" not in crowd.core.world.ledger.held or waits
    if waits:
        crowd.answer("b")
        crowd.live_on(100)
        assert request.fate == "answered"


def test_a_stop_ends_it_asleep_too() -> None:
    crowd = pair()
    asleep(crowd)
    assert crowd.answers[crowd.stop("a")].status == 202
    crowd.work()
    assert crowd.state("a") is State.STOPPED
    assert crowd.count(Terminate) == 0


def test_restart_and_reload_end_it() -> None:
    crowd = pair()
    asleep(crowd)
    crowd.send(Restart("a", crowd.ticket()))
    crowd.work()
    assert crowd.inst("a").attempt == 2
    crowd = pair()
    asleep(crowd)
    models = (spec("a", 4.0, swap="sleep1"), spec("b", 5.0, swap="sleep1"))
    crowd.send(Reload(settings(*models), frozenset({"a"})))
    crowd.work()
    assert crowd.state("a") is State.STOPPED


def test_ttl_leaves_sleepers_alone() -> None:
    crowd = pair(ttl=100.0)
    asleep(crowd)
    crowd.live_on(90)
    assert crowd.state("a") is State.ASLEEP
    crowd.live_on(400)
    assert crowd.state("a") is State.ASLEEP


@pytest.mark.parametrize(("device", "flag"), [("GPU-a", True), ("cpu", False)])
def test_only_models_that_sleep_get_the_endpoints_and_only_gpus_the_flag(device: str, flag: bool) -> None:
    """vLLM's CPU build refuses the flag. The endpoints are on a unix socket only."""
    crowd = Crowd(settings(spec("a", 3.0, swap="sleep2"), spec("b", 3.0)), gpus={device: 8.0})
    for name in "ab":
        crowd.ask(name)
        crowd.work()
    first, second = (c.launch for c in crowd.commands if isinstance(c, Spawn))
    assert ("--enable-sleep-mode" in first.argv) is flag
    assert first.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert first.endpoint.startswith("unix:")
    assert "--enable-sleep-mode" not in second.argv
    assert "VLLM_SERVER_DEV_MODE" not in second.env


def test_a_loan_takes_what_sleepers_keep() -> None:
    crowd = pair()
    asleep(crowd)
    crowd.stop("b")
    crowd.work()
    crowd.send(Lend(8 * GIB, 600.0, None, crowd.ticket()))
    crowd.work()
    assert crowd.state("a") is State.STOPPED
    request = crowd.ask("a")
    crowd.live_on(620)
    assert request.fate


# -- an operator ------------------------------------------------------------------------------------------------------


def test_an_operator_puts_it_to_sleep_once_it_is_proved() -> None:
    crowd = pair(proved=False)
    crowd.ask("a")
    crowd.work(answers=False)
    ticket = crowd.ticket()
    crowd.send(Doze("a", ticket))
    assert crowd.answers[ticket].status == 422
    assert "vllmctl swap-test a" in crowd.answers[ticket].message
    crowd.core.world.proofs[crowd.inst("a").key] = Proof(1, GIB, 2 * GIB, 1.0, 2.0)
    ticket = crowd.ticket()
    crowd.send(Doze("a", ticket))
    assert crowd.answers[ticket].status == 202
    assert crowd.state("a") is State.READY, "it finishes what it has"
    crowd.answer("a")
    crowd.work()
    assert crowd.state("a") is State.ASLEEP
    assert crowd.core.world.ledger.held["a"] == {"GPU-a": GIB}


# -- the test ---------------------------------------------------------------------------------------------------------


def swap_test(crowd: Crowd, name: str = "a") -> int:
    ticket = crowd.ticket()
    crowd.send(SwapTest(name, ticket))
    crowd.tell()
    crowd.pass_time(1)
    crowd.look()
    return ticket


def test_a_swap_test_proves_what_its_sleep_frees() -> None:
    crowd = pair(proved=False, residual=1.5)
    crowd.ask("a")
    crowd.work()
    assert crowd.answers[swap_test(crowd)].status == 202
    waits = crowd.ask("a")
    crowd.live_on(60)
    trial = crowd.inst("a").trial
    assert trial is not None
    assert (
        trial.proof
        == crowd.core.world.proofs[crowd.inst("a").key]
        == Proof(1, int(1.5 * GIB), int(3.5 * GIB), 1.0, 2.0)
    )
    assert (len(trial.cycles), crowd.count(Sleep), crowd.count(Wake)) == (5, 5, 5)
    assert waits.fate == "answered", "it waited, and was let in"
    assert crowd.inst("a").attempt == 1
    assert "its sleep frees 3.5 GiB, 1.5 GiB stay in use" in crowd.notes("swap-test")[-1]


def test_every_step_is_shown_as_promised() -> None:
    """Words, figures and the trial, in every state of sleep."""
    promise = jsonschema.Draft202012Validator(
        {"$ref": "#/components/schemas/Model", "components": {"schemas": schemas()}}
    )
    crowd = pair(proved=False)
    crowd.ask("a")
    crowd.work()
    texts = {}

    def look() -> None:
        row = view.model(crowd.core.world, crowd.inst("a"), crowd.now)
        promise.validate(row)
        texts[row["state"]] = row["why"] and row["why"]["text"]

    swap_test(crowd)
    look()
    crowd.falls_asleep("a")
    crowd.look()
    look()
    crowd.live_on(60)
    crowd.send(Doze("a", crowd.ticket()))
    crowd.tell()
    crowd.work()
    look()
    assert texts == {
        "dozing": "gives its memory back · swap-test, 0 done",
        "waking": "takes its memory back · swap-test, 0 done",
        "asleep": "asleep, 1.0 GiB kept, awake in about 2 s",
    }


def test_what_it_gives_back_meanwhile_is_given_to_nobody() -> None:
    crowd = pair(proved=False)
    crowd.ask("a")
    crowd.work()
    crowd.live_on(61)
    crowd.core.world.proofs[crowd.inst("a").key] = Proof(1, GIB, 4 * GIB, 1.0, 2.0)  # of an earlier test
    swap_test(crowd)
    crowd.ask("b")
    crowd.inspect("b")
    crowd.falls_asleep("a")
    crowd.look()
    assert crowd.state("a") is State.WAKING
    assert crowd.core.world.ledger.held["a"] == {"GPU-a": 5 * GIB}
    assert crowd.state("b") is State.WAITING


def test_it_is_started_for_the_test() -> None:
    crowd = pair(proved=False)
    assert swap_test(crowd)
    crowd.live_on(60)
    assert crowd.inst("a").trial.proof is not None  # type: ignore[union-attr]
    assert crowd.state("a") is State.READY


def test_a_test_needs_swap() -> None:
    crowd = Crowd(settings(spec("a", 5.0)))
    assert crowd.answers[swap_test(crowd)].status == 422


def test_one_that_sleeps_or_waits_for_memory_is_not_tested() -> None:
    """Its memory may be in use by one that waits for what it keeps: both would wait for ever."""
    crowd = Crowd(settings(spec("a", 7.0, swap="sleep1"), spec("b", 5.0)))
    asleep(crowd)
    assert crowd.answers[swap_test(crowd)].status == 422
    assert crowd.inst("a").trial is None


@pytest.mark.parametrize("trouble", ["other answer", "no wake", "leak", "crash", "stop"])
def test_a_test_that_fails_proves_nothing(trouble: str) -> None:
    crowd = pair(proved=False)
    crowd.ask("a")
    crowd.work()
    key = crowd.inst("a").key
    crowd.core.world.proofs[key] = Proof(1, GIB, 2 * GIB, 1.0, 2.0)
    swap_test(crowd)
    for _ in range(2):
        crowd.falls_asleep("a")
        crowd.pass_time(4)
        crowd.look()
        if crowd.count(Wake) < 2:
            crowd.wakes("a")
    match trouble:
        case "other answer":
            crowd.wakes("a", same=False)
        case "no wake":
            crowd.wakes("a", "no memory")
        case "leak":
            crowd.wakes("a")
            crowd.residual = 3 * GIB
            crowd.falls_asleep("a")
            crowd.pass_time(4)
            crowd.look()
        case "crash":
            crowd.send(Broken("a", 1, "died", -9))
        case "stop":
            crowd.stop("a")
    trial = crowd.inst("a").trial
    assert trial is not None
    assert trial.result
    assert trial.proof is None
    assert key not in crowd.core.world.proofs
    crowd.live_on(60)
    assert crowd.state("a") is (State.STOPPED if trouble == "stop" else State.READY)
    assert crowd.ask("a").begun is not None or trouble == "stop"


def test_on_cpu_it_says_that_memory_cannot_be_shown() -> None:
    crowd = pair(proved=False, residual=5.0, gpus={"cpu": 8.0})
    crowd.ask("a")
    crowd.work()
    swap_test(crowd)
    crowd.live_on(60)
    proof = crowd.core.world.proofs[crowd.inst("a").key]
    assert (proof.freed, proof.level) == (0, 1)
    assert "vLLM's CPU build only simulates sleep" in crowd.notes("swap-test")[-1]


def test_a_model_under_test_makes_no_room() -> None:
    crowd = pair(proved=False, max_wait=10.0, min_resident=0.0)
    crowd.ask("a")
    crowd.work(answers=False)
    swap_test(crowd)
    crowd.ask("b")
    crowd.live_on(60, answers=False)
    assert crowd.state("a") is State.READY
    assert crowd.inst("a").shut_for == "(swap-test)"
    crowd.answer("a")
    crowd.live_on(200)
    assert crowd.inst("a").trial.proof is not None  # type: ignore[union-attr]


# -- another daemon ---------------------------------------------------------------------------------------------------


def sleeper(state: State) -> Mortal:
    """A daemon with a model in that state."""
    sim = Mortal(settings(spec("a", 5.0, swap="sleep1")))
    sim.up("a")
    sim.core.world.proofs[sim.inst("a").key] = Proof(1, GIB, 2 * GIB, 1.0, 2.0)
    sim.core.world.instances["a"].under_way = 0
    sim.send(Doze("a", sim.ticket()))
    from vllmd.events import Used

    sim.send(Used("a", 1, 0, 0, sim.now))
    assert sim.state("a") is State.DOZING
    if state is State.DOZING:
        return sim
    sim.uses["a"] = GIB
    sim.send(Slept("a", 1, "", 1.0))
    sim.look()
    if state is State.WAKING:
        sim.start("a")
    assert sim.state("a") is state
    return sim


def test_the_next_daemon_lets_it_sleep_on_and_wakes_it() -> None:
    sim = sleeper(State.ASLEEP)
    proofs = sim.core.world.proofs
    sim.rise()
    sim.core.world.proofs.update(proofs)
    assert sim.state("a") is State.ASLEEP
    assert sim.core.world.ledger.held["a"] == {"GPU-a": GIB}
    sim.start("a")
    assert sim.state("a") is State.WAKING
    assert sim.core.world.ledger.held["a"] == {"GPU-a": 5 * GIB}
    sim.uses.pop("a")
    sim.send(Woke("a", 1, "", None, 2.0))
    assert sim.state("a") is State.READY


@pytest.mark.parametrize("state", [State.DOZING, State.WAKING])
def test_what_moved_when_the_daemon_died_is_ended(state: State) -> None:
    sim = sleeper(state)
    sim.rise()
    assert sim.state("a") is State.STOPPING
    sim.gone("a")
    assert sim.state("a") is (State.WAITING if state is State.WAKING else State.STOPPED)


def test_a_core_without_proofs_is_one_without_sleep() -> None:
    assert Core(settings(spec("a")), Mortal(settings(spec("a"))).core.world.places).world.proofs == {}
