"""Requests that wait: models start for them, others make room, nobody starves or is sent away without a reason."""

import pytest

from tests.crowd import Crowd
from tests.sim import GIB, settings, spec
from vllmd.core.states import State
from vllmd.events import Broken, Canary, Pulse, Reload
from vllmd.spec import Cause


def pair(**more: object) -> Crowd:
    """Two models of which one fits."""
    return Crowd(settings(spec("a", 5.0, **more), spec("b", 5.0, **more)))


def test_a_request_starts_its_model_and_is_answered() -> None:
    crowd = pair()
    request = crowd.ask("a")
    assert crowd.state("a") is State.WAITING
    crowd.work()
    assert crowd.state("a") is State.READY
    assert request.fate == "answered"


def test_many_requests_start_it_once() -> None:
    crowd = pair()
    requests = [crowd.ask("a") for _ in range(50)]
    crowd.work()
    assert crowd.inst("a").attempt == 1
    assert {request.fate for request in requests} == {"answered"}


def test_an_idle_model_that_was_used_long_ago_makes_room() -> None:
    crowd = pair()
    crowd.ask("a")
    crowd.work()
    crowd.live_on(61)
    request = crowd.ask("b")
    crowd.inspect("b")
    crowd.tell()
    assert crowd.state("a") is State.DRAINING
    crowd.work()
    assert crowd.ready_models() == ["b"]
    assert request.fate == "answered"
    assert any("makes room for b (idle 61 s" in text for text in crowd.notes("evict")), crowd.notes("evict")
    assert crowd.core.world.counters["swaps", "a", "b"] == 1
    (told,) = crowd.notes("swap")
    assert told.startswith("room after 0 ms: a emptied in 0 ms, drained in 0 ms, ended with its memory back in ")


def test_a_model_that_was_just_used_stays_for_min_resident() -> None:
    crowd = pair()
    crowd.ask("a")
    crowd.work()
    request = crowd.ask("b")
    crowd.work()
    assert crowd.ready_models() == ["a"]
    assert "used a moment ago" in crowd.inst("b").waiting_text
    crowd.live_on(59)
    assert crowd.ready_models() == ["a"]
    crowd.live_on(2)
    assert request.fate == "answered"


def test_a_model_that_nobody_has_used_makes_room_at_once() -> None:
    crowd = Crowd(settings(spec("a", 5.0, autostart=True), spec("b", 5.0)))
    crowd.work()
    crowd.ask("b")
    crowd.work()
    assert crowd.ready_models() == ["b"]


def test_a_busy_model_stays_until_the_patience_is_over_and_then_finishes_what_it_has() -> None:
    crowd = pair(max_wait=100.0)
    first = crowd.ask("a")
    crowd.work(answers=False)
    crowd.live_on(70, answers=False)
    request = crowd.ask("b")
    crowd.live_on(95, answers=False)
    assert not crowd.inst("a").shut_for
    crowd.live_on(10, answers=False)
    assert crowd.inst("a").shut_for == "b"
    late = crowd.ask("a")
    assert late in crowd.door("a").line, "it takes no new ones"
    assert crowd.state("a") is State.READY
    crowd.answer("a")
    assert first.fate == "answered"
    assert crowd.state("a") is State.DRAINING
    crowd.work()
    assert request.fate == "answered"
    crowd.live_on(200)
    assert late.fate == "answered"


def test_max_drain_is_the_end_of_patience_with_a_busy_one() -> None:
    crowd = pair(max_wait=10.0, max_drain=30.0)
    crowd.ask("a")
    crowd.work(answers=False)
    crowd.ask("b")
    crowd.live_on(11, answers=False)
    assert crowd.inst("a").shut_for == "b"
    crowd.pass_time(31)
    assert crowd.state("a") is State.DRAINING


def test_a_victim_whose_waiter_left_is_opened_again() -> None:
    crowd = pair(max_wait=10.0)
    crowd.ask("a")
    crowd.work(answers=False)
    request = crowd.ask("b")
    crowd.live_on(11, answers=False)
    late = crowd.ask("a")
    assert late.begun is None
    crowd.leave(request)
    assert not crowd.inst("a").shut_for
    assert crowd.inst("a").wanted
    assert late.begun is not None
    assert crowd.state("b") is State.STOPPED


def test_a_load_goes_on_without_its_client() -> None:
    crowd = pair()
    request = crowd.ask("a")
    crowd.inspect("a")
    assert crowd.state("a") is State.STARTING
    crowd.leave(request)
    crowd.work()
    assert crowd.state("a") is State.READY


def test_pinned_models_never_make_room_and_the_request_is_told_at_once() -> None:
    crowd = Crowd(settings(spec("a", 5.0, autostart=True, pinned=True), spec("b", 5.0)))
    crowd.work()
    request = crowd.ask("b")
    crowd.work()
    assert request.fate == "refused"
    text = crowd.refusals[-1].cause.text
    assert "needs 5.0 GiB on GPU 0" in text
    assert "pinned on GPU 0: a 5.0 GiB" in text
    assert crowd.state("b") is State.STOPPED


def test_the_cheapest_set_goes_and_nothing_that_does_not_help() -> None:
    """Hot and slow to load is dear; small does not help; of equals the one that was not used for longest goes."""
    crowd = Crowd(
        settings(*(spec(n, 2.0, autostart=True) for n in ("hot", "cold", "cool")), spec("tiny", 1.0, autostart=True),
                 spec("new", 3.0)), gpus={"GPU-a": 8.0},
    )  # fmt: skip
    crowd.work()
    for name in ("cold", "cool", "hot", "tiny"):
        crowd.ask(name)
        crowd.work()
        crowd.live_on(5)
    for _ in range(20):
        crowd.ask("hot")
        crowd.work()
    crowd.live_on(100)
    crowd.ask("new")
    crowd.work()
    assert crowd.ready_models() == ["hot", "cool", "tiny", "new"]


def test_one_that_waits_does_not_block_what_fits_elsewhere() -> None:
    crowd = Crowd(settings(spec("a", 5.0), spec("b", 5.0), spec("c", 2.0)), gpus={"GPU-a": 8.0})
    crowd.ask("a")
    crowd.work(answers=False)
    crowd.ask("b")
    request = crowd.ask("c")
    crowd.work(answers=False)
    assert crowd.state("b") is State.WAITING
    assert request.begun is not None


@pytest.mark.parametrize("device", ["GPU-a", "cpu"])
def test_what_comes_free_is_for_the_one_it_was_freed_for(device: str) -> None:
    """a makes room for the large one; the small one, which would fit into what is free already, must not take it.
    On "cpu", where starts need not wait for each other, nothing but the claim keeps it."""
    crowd = Crowd(settings(spec("a", 4.0), spec("big", 8.0), spec("small", 3.0)), gpus={device: 8.0})
    crowd.ask("a")
    crowd.work()
    crowd.live_on(100)
    big = crowd.ask("big")
    crowd.inspect("big")
    crowd.tell()
    assert crowd.state("a") is State.DRAINING
    small = crowd.ask("small")
    crowd.inspect("small")
    assert crowd.state("small") is State.WAITING
    crowd.work()
    assert big.fate == "answered"
    crowd.live_on(300)
    assert small.fate == "answered"


def test_two_that_claim_the_same_do_not_wait_for_each_other() -> None:
    """Each claimed what was on its way out; then it was not, and nothing is any more: the turn decides."""
    crowd = Crowd(settings(spec("a", 5.0), spec("b", 5.0), spec("c", 8.0)), gpus={"GPU-a": 8.0})
    first, second = crowd.ask("b"), crowd.ask("c")
    for name in "bc":
        crowd.inst(name).claim = {"GPU-a": (5 if name == "b" else 8) * GIB}
    crowd.live_on(300)
    assert (first.fate, second.fate) == ("answered", "answered")


def test_priority_goes_first_but_not_for_ever() -> None:
    crowd = Crowd(
        settings(spec("a", 8.0), spec("low", 8.0, max_wait=100.0), spec("high", 8.0, priority=5, max_wait=100.0))
    )
    crowd.ask("a")
    crowd.work(answers=False)
    low = crowd.ask("low")
    crowd.live_on(50, answers=False)
    high = crowd.ask("high")
    crowd.work(answers=False)
    crowd.answer("a")
    crowd.live_on(15)
    assert high.fate == "answered"
    assert not low.fate
    crowd.live_on(150)
    assert low.fate == "answered"


def test_thrash_guard() -> None:
    """A B A B ... forty requests, one a second: few swaps, all answered, none later than max_wait and one load."""
    crowd = pair()
    load = 30.0
    waits = []
    requests = []
    for n in range(40):
        requests.append(crowd.ask("ab"[n % 2]))
        crowd.work()
        crowd.live_on(1)
    crowd.live_on(200)
    for request in requests:
        assert request.fate == "answered"
        assert request.begun is not None
        waits.append(request.begun - request.since)
    assert crowd.evictions() <= 3
    assert max(waits) <= 120 + load


def test_a_hung_model_holds_nobody_hostage() -> None:
    crowd = pair()
    stuck = crowd.ask("a")
    crowd.work(answers=False)
    crowd.live_on(10, answers=False)
    request = crowd.ask("b")
    asked = crowd.now
    while not request.fate and crowd.now - asked < 400:
        crowd.pass_time(5)
        crowd.look()
        inst = crowd.inst("a")
        if inst.state is State.READY:
            crowd.send(Pulse("a", inst.attempt, 1, 0, 0.0, False))
        if inst.state is State.STOPPING and "a" in crowd.alive:
            crowd.gone("a", Cause("hung", "hung", "hung"))
        crowd.tell()
        if crowd.state("b") in (State.WAITING, State.STARTING, State.READY):
            for name in ("b",):
                if crowd.inst(name).inspecting:
                    crowd.inspect(name)
                if crowd.state(name) is State.STARTING:
                    crowd.measured(name)
                    crowd.ready(name)
                crowd.tell()
                crowd.answer(name)
    assert request.fate == "answered"
    assert crowd.now - asked <= 125
    assert stuck.fate == ""


def test_ttl_counts_from_the_end_of_the_last_request() -> None:
    crowd = pair(ttl=100.0)
    crowd.ask("a")
    crowd.work(answers=False)
    crowd.live_on(300, answers=False)
    assert crowd.state("a") is State.READY, "busy is not idle"
    crowd.answer("a")
    crowd.live_on(95)
    assert crowd.state("a") is State.READY
    crowd.live_on(10)
    assert crowd.state("a") is State.STOPPED
    assert crowd.ask("a")
    crowd.work()
    assert crowd.state("a") is State.READY


def test_requests_past_the_gateway_count_as_use() -> None:
    crowd = pair(ttl=100.0)
    crowd.ask("a")
    crowd.work()
    crowd.direct["a"] = 1
    crowd.live_on(300)
    assert crowd.state("a") is State.READY
    crowd.direct.clear()
    crowd.live_on(110)
    assert crowd.state("a") is State.STOPPED


def test_home_comes_back_when_there_is_room_and_only_then() -> None:
    crowd = Crowd(settings(spec("home", 5.0, autostart=True, home=True), spec("guest", 5.0, ttl=200.0)))
    crowd.work()
    crowd.ask("guest")
    crowd.work()
    assert crowd.ready_models() == ["guest"]
    assert crowd.state("home") is State.WAITING
    crowd.live_on(150)
    assert crowd.ready_models() == ["guest"]
    crowd.live_on(100)
    assert crowd.ready_models() == ["home"]


def test_a_model_that_is_not_on_demand_is_not_started_by_a_request() -> None:
    crowd = pair(on_demand=False)
    request = crowd.ask("a")
    assert request.fate == "refused"
    assert "on_demand = false" in crowd.refusals[-1].cause.text
    assert crowd.refusals[-1].cause.remedies[0].text == "vllmctl start a"


def test_a_failed_model_refuses_with_its_cause_and_is_tried_again_after_a_rest() -> None:
    crowd = pair()
    crowd.problems["a"] = Cause("no-token", "a needs a token", "no token", heals=False)
    first = crowd.ask("a")
    crowd.work()
    assert first.fate == "refused"
    assert crowd.refusals[-1].cause.text == "a needs a token"
    second = crowd.ask("a")
    assert second.fate == "refused"
    crowd.live_on(1000)
    assert crowd.ask("a").fate == "refused", "what cannot heal is not tried again"
    crowd.problems.pop("a")
    crowd.start("a")
    crowd.work()
    assert crowd.ask("a").begun is not None


def test_requests_wait_through_a_crash_and_its_backoff() -> None:
    crowd = pair()
    request = crowd.ask("a")
    crowd.work(answers=False)
    crowd.crash("a")
    assert request in crowd.door("a").line
    crowd.gone("a", Cause("crashed", "crashed", "crashed"))
    crowd.live_on(5)
    assert request.fate == "answered"


def test_a_crashed_model_gives_its_place_to_who_has_waited_long_enough() -> None:
    crowd = pair(max_wait=60.0)
    crowd.ask("a")
    crowd.work(answers=False)
    crowd.live_on(10, answers=False)
    request = crowd.ask("b")
    crowd.live_on(61, answers=False)
    crowd.crash("a")
    crowd.gone("a", Cause("crashed", "crashed", "crashed"))
    crowd.work()
    assert request.fate == "answered"


def test_an_operators_stop_turns_the_line_away_and_a_later_request_starts_it_again() -> None:
    crowd = pair()
    request = crowd.ask("a")
    crowd.inspect("a")
    crowd.stop("a")
    assert request.fate == "refused"
    assert crowd.refusals[-1].cause.text == "a was stopped"
    crowd.work()
    assert crowd.state("a") is State.STOPPED
    again = crowd.ask("a")
    crowd.work()
    assert again.fate == "answered"


def test_a_restart_keeps_its_line() -> None:
    crowd = pair()
    crowd.ask("a")
    crowd.work()
    from vllmd.events import Restart

    crowd.send(Restart("a"))
    request = crowd.ask("a")
    assert request.begun is None
    crowd.work()
    assert request.fate == "answered"


def test_a_model_that_is_removed_refuses_its_line() -> None:
    crowd = pair()
    request = crowd.ask("a")
    crowd.send(Reload(settings(spec("b", 5.0))))
    assert request.fate == "refused"


def test_health_is_watched_while_it_empties() -> None:
    """A shut model that hangs is killed, not waited for."""
    crowd = pair(max_wait=10.0, hang_after=60.0)
    crowd.ask("a")
    crowd.work(answers=False)
    crowd.ask("b")
    crowd.live_on(15, answers=False)
    assert crowd.inst("a").shut_for == "b"
    for _ in range(30):
        crowd.pass_time(5)
        if crowd.state("a") is State.READY:
            crowd.send(Pulse("a", crowd.inst("a").attempt, 1, 0, 0.0, False))
    assert crowd.state("a") is State.STOPPING
    assert any(isinstance(c, Canary) for c in crowd.commands)


def test_more_than_twenty_swaps_an_hour_are_said() -> None:
    crowd = pair(min_resident=0.0)
    for n in range(24):
        crowd.ask("ab"[n % 2])
        crowd.work()
        crowd.live_on(20)
    (text,) = crowd.notes("swaps")
    assert text.startswith("21 swaps in the last hour, most between a and b")


def test_a_drained_engine_that_breaks_meanwhile_ends_as_usual() -> None:
    crowd = pair()
    crowd.ask("a")
    crowd.work()
    crowd.live_on(61)
    crowd.ask("b")
    crowd.send(Broken("a", crowd.inst("a").attempt, "died", -9))
    crowd.work()
    assert crowd.ready_models() == ["b"]
    assert crowd.state("a") is State.STOPPED
