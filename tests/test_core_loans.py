"""`vllmctl lend`: memory for something else, freed with manners and given back by itself."""

from tests.crowd import Crowd
from tests.sim import GIB, settings, spec
from vllmd.core.states import State
from vllmd.events import Lend


def lend(crowd: Crowd, size: float, seconds: float = 3600.0, device: str | None = None) -> int:
    ticket = crowd.ticket()
    crowd.send(Lend(int(size * GIB), seconds, device, ticket))
    crowd.tell()
    return ticket


def two(**more: object) -> Crowd:
    crowd = Crowd(settings(spec("a", 4.0, autostart=True), spec("b", 3.0, autostart=True, **more)))
    crowd.work()
    return crowd


def test_what_is_free_is_lent_at_once() -> None:
    crowd = two()
    answer = crowd.answers[lend(crowd, 1.0)]
    assert (answer.status, answer.message) == (200, "1.0 GiB of GPU 0 free for 60 min")
    assert sorted(crowd.ready_models()) == ["a", "b"]


def test_the_cheapest_goes_when_it_is_empty_and_comes_back_after_the_loan() -> None:
    crowd = two()
    for name in ("a", "b"):
        crowd.ask(name)
        crowd.work(answers=False)
    ticket = lend(crowd, 3.5)
    assert crowd.answers[ticket].status == 202
    assert "freed when" in crowd.answers[ticket].message
    (victim,) = [name for name in ("a", "b") if crowd.inst(name).shut_for]
    assert crowd.state(victim) is State.READY, "its request is not cut"
    crowd.answer(victim)
    crowd.live_on(100, answers=False)
    assert victim not in crowd.ready_models()
    crowd.live_on(3600, answers=False)
    assert sorted(crowd.ready_models()) == ["a", "b"]


def test_a_request_for_what_had_to_go_is_told_of_the_loan() -> None:
    crowd = Crowd(settings(spec("a", 4.0, autostart=True)))
    crowd.work()
    lend(crowd, 5.0)
    crowd.live_on(20)
    request = crowd.ask("a")
    crowd.work()
    assert request.fate == "refused"
    assert "3.0 of 8.0 GiB left: lent 5.0 GiB" in crowd.refusals[-1].cause.text
    crowd.live_on(3600)
    assert crowd.ready_models() == ["a"]


def test_what_the_borrower_takes_is_not_counted_twice() -> None:
    crowd = two()
    lend(crowd, 1.0)
    crowd.programs["GPU-a"]["ComfyUI"] = GIB
    crowd.look()
    account = crowd.core.world.ledger.account("GPU-a")
    assert account.lent == 0
    assert account.left == 0


def test_pinned_memory_is_not_lent() -> None:
    crowd = two(pinned=True)
    answer = crowd.answers[lend(crowd, 6.0)]
    assert answer.status == 409
    assert "cannot lend 6.0 GiB of GPU 0" in answer.message
    assert not crowd.core.world.ledger.loans


def test_an_unknown_device_is_named() -> None:
    crowd = two()
    answer = crowd.answers[lend(crowd, 1.0, device="7")]
    assert (answer.status, answer.message) == (404, "there is no device '7' (seen: GPU 0 (GPU-a))")


def test_all_is_given_back_on_demand() -> None:
    crowd = two()
    lend(crowd, 5.0)
    crowd.live_on(50)
    assert len(crowd.ready_models()) < 2
    assert crowd.answers[lend(crowd, 0)].status == 200
    crowd.live_on(50)
    assert sorted(crowd.ready_models()) == ["a", "b"]
