"""Lines and doors by themselves: whose turn it is, what is bounded, and what the core is told and when."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.engines import model
from vllmd.events import Event, Open, Refuse, Shut, Used, Wanted
from vllmd.gateway.doors import Doors, Entry
from vllmd.gateway.errors import Trouble
from vllmd.gateway.line import Line, Place
from vllmd.spec import Cause, ModelSpec

NOWHERE = "http://127.0.0.1:1"


def place(key: str = "", since: float = 0.0, priority: int = 0) -> Place:
    return Place(key, since, priority, asyncio.get_running_loop().create_future())


def emptied(line: Line) -> Iterator[Place]:
    while (one := line.next()) is not None:
        yield one


class Told:
    """Doors, and what they tell."""

    def __init__(self, *models: ModelSpec) -> None:
        self.events: list[Event] = []
        self.doors = Doors(self.events.append, asyncio.get_running_loop())
        self.doors.configure({each.name: each for each in models})

    def entry(self, name: str = "a") -> Entry:
        return self.doors.entry(name)

    def join(self, name: str = "a", key: str = "", since: float = 1.0, *, first: bool = False) -> Place:
        return self.doors.join(self.entry(name), key, 0, since, first=first)

    def open(self, name: str = "a", attempt: int = 1) -> None:
        self.doors.open(Open(name, attempt, name, NOWHERE))

    def shut(self, name: str = "a", attempt: int = 1) -> None:
        self.doors.shut(Shut(name, attempt, name))

    def use(self) -> list[tuple[str, int, int]]:
        return [(e.instance, e.running, e.begun) for e in self.events if isinstance(e, Used)]


# -- the line ---------------------------------------------------------------------------------------------------------


async def test_keys_take_turns_and_each_is_served_in_its_order() -> None:
    line = Line()
    places = [place(key, float(n)) for n, key in enumerate("aaaabbc")]
    for one in places:
        line.join(one)
    assert [(one.key, one.since) for one in emptied(line)] == [
        ("a", 0.0), ("b", 4.0), ("c", 6.0), ("a", 1.0), ("b", 5.0), ("a", 2.0), ("a", 3.0),
    ]  # fmt: skip
    assert line.length == 0


async def test_who_comes_back_is_before_all_others() -> None:
    line = Line()
    for key in "ab":
        line.join(place(key, 5.0))
    line.join(place("b", 1.0), first=True)
    assert line.oldest() == 1.0
    assert next(emptied(line)).since == 1.0


async def test_a_leaver_leaves_at_once_and_once() -> None:
    line = Line()
    one, two = place("a", 1.0, 7), place("a", 2.0)
    line.join(one)
    line.join(two)
    assert (line.length, line.oldest(), line.priority()) == (2, 1.0, 7)
    assert line.leave(one) and not line.leave(one)
    assert (line.length, line.oldest(), line.priority()) == (1, 2.0, 0)
    assert list(emptied(line)) == [two]
    assert (line.oldest(), line.priority(), line.by_key) == (0.0, 0, {})


# -- doors ------------------------------------------------------------------------------------------------------------


async def test_a_full_line_refuses_all_but_who_was_in_it_before() -> None:
    told = Told(model("a", queue=2))
    told.join()
    told.join()
    with pytest.raises(Trouble) as refused:
        told.join()
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert refused.value.retry_after
    told.join(first=True)
    assert dict(told.doors.lengths()) == {"a": 3}


async def test_nobody_passes_those_who_stand_before_the_door() -> None:
    told = Told(model("a", concurrency=1))
    told.open()
    entry = told.entry()
    door = told.doors.enter(entry)
    assert door is not None and told.doors.enter(entry) is None
    waiting = told.join()
    told.doors.end(entry, door)
    assert waiting.turn.done(), "who ends lets the next one in"
    assert told.doors.enter(entry) is None


async def test_the_core_hears_of_all_use_before_it_hears_of_a_line() -> None:
    """It decides on a line with what is told before it: that must be the truth."""
    told = Told(model("a"), model("b"))
    told.open("a")
    for _ in range(3):
        told.doors.enter(told.entry("a"))
    assert told.events == [], "a request is no event"
    told.join("b")
    assert [type(event) for event in told.events] == [Used, Wanted]
    assert told.use() == [("a", 3, 3)]
    told.doors.close()


async def test_while_somebody_waits_an_engine_that_becomes_idle_or_busy_is_told_at_once() -> None:
    told = Told(model("a"), model("b"))
    told.open("a")
    told.join("b")
    told.events.clear()
    entry = told.entry("a")
    first, second = told.doors.enter(entry), told.doors.enter(entry)
    assert first is not None and second is not None
    assert told.use() == [("a", 1, 1)], "the second one changes nothing that the core decides with"
    told.doors.end(entry, first)
    told.doors.end(entry, second)
    assert told.use() == [("a", 1, 1), ("a", 0, 2)]
    told.doors.close()


async def test_a_line_that_moves_through_its_door_is_no_event_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that it has begun and that it is over; and where it stands when the door shuts, as it is decided with that."""
    monkeypatch.setattr("vllmd.gateway.doors.TELL_EVERY", 3600.0)
    told = Told(model("a", concurrency=1))
    entry = told.entry()
    told.open()
    door = told.doors.enter(entry)
    assert door is not None
    for n in range(1, 51):
        told.join(since=float(n))
    for _ in range(20):
        told.doors.end(entry, door)
        told.join(since=100.0)
    lines = [(event.waiting, event.since) for event in told.events if isinstance(event, Wanted)]
    assert lines == [(1, 1.0)] and len(told.events) == 2
    told.shut()
    assert isinstance(told.events[-2], Used) and told.events[-2].begun == 21
    assert told.events[-1] == Wanted("a", 50, 21.0, 0)
    told.open()
    while door.under_way:
        told.doors.end(entry, door)
    assert [event.waiting for event in told.events if isinstance(event, Wanted)] == [1, 50, 0]
    told.doors.close()


async def test_a_line_that_moves_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllmd.gateway.doors.TELL_EVERY", 0.01)
    told = Told(model("a", concurrency=1))
    entry = told.entry()
    told.open()
    door = told.doors.enter(entry)
    assert door is not None
    for n in range(1, 4):
        told.join(since=float(n))
    told.doors.end(entry, door)
    async with asyncio.timeout(20):
        while told.events[-1] != Wanted("a", 2, 2.0, 0):
            await asyncio.sleep(0.005)
    told.doors.close()


async def test_a_victim_that_is_opened_again_is_as_busy_as_it_is() -> None:
    """What began before it was shut is still under way: neither forgotten nor told as if it were all."""
    told = Told(model("a"))
    entry = told.entry()
    told.open()
    old = told.doors.enter(entry)
    assert old is not None
    told.shut()
    told.open()
    new = told.doors.enter(entry)
    assert new is not None
    told.shut()
    assert told.use()[-1] == ("a", 2, 2)
    told.doors.end(entry, old)
    told.doors.end(entry, new)
    assert told.use()[-1] == ("a", 0, 2)
    assert ("a", 0, 1) not in told.use(), "idle while a request was at it"
    told.doors.close()


async def test_what_was_begun_counts_from_when_it_serves() -> None:
    """One that slept and is awake again, or a new attempt, begins at nought."""
    told = Told(model("a"))
    entry = told.entry()
    for attempt in (1, 1, 2):
        told.open(attempt=attempt)
        door = told.doors.enter(entry)
        assert door is not None
        told.doors.end(entry, door)
        told.shut(attempt=attempt)
        assert told.use()[-1] == ("a", 0, 1)
    told.doors.close()


async def test_a_late_command_for_an_earlier_attempt_shuts_nothing() -> None:
    told = Told(model("a"))
    told.open(attempt=2)
    told.shut(attempt=1)
    assert told.doors.enter(told.entry()) is not None
    told.doors.close()


async def test_who_leaves_when_his_turn_has_come_leaves_room_for_the_next() -> None:
    told = Told(model("a", concurrency=1))
    entry = told.entry()
    one, two = told.join(), told.join()
    told.open()
    assert one.turn.done() and not two.turn.done()
    told.doors.leave(entry, one)
    assert two.turn.done()
    told.doors.leave(entry, two)
    assert entry.door is not None and entry.door.under_way == 0
    told.doors.close()


async def test_who_waits_in_vain_hears_why_and_the_next_one_begins_a_line_anew() -> None:
    told = Told(model("a"))
    one = told.join()
    told.doors.refuse(Refuse("a", Cause("no-room", "it does not fit", "no room"), 5.0))
    with pytest.raises(Trouble, match="it does not fit"):
        await one.turn
    told.join()
    lines = [(event.waiting, event.since) for event in told.events if isinstance(event, Wanted)]
    assert lines == [(1, 1.0), (1, 1.0)]
    told.doors.close()


async def test_nobody_is_sent_to_an_engine_that_lost_a_request_until_it_is_known_what_it_has() -> None:
    """The core shuts its door within milliseconds of a death; who is let in meanwhile would lose a try."""
    told = Told(model("a"))
    entry = told.entry()
    told.open()
    door, beside = told.doors.enter(entry), told.doors.enter(entry)
    assert door is not None and beside is not None
    told.doors.doubt(entry, door)
    told.doors.end(entry, door)
    again = told.join(first=True)
    told.doors.end(entry, beside)
    assert told.doors.enter(entry) is None and not again.turn.done()
    told.shut()
    told.open(attempt=2)
    assert again.turn.done()
    told.doors.close()


async def test_an_engine_that_lives_on_is_trusted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It broke one connection only: nobody else would ever move that line."""
    monkeypatch.setattr("vllmd.gateway.doors.BREATH", 0.01)
    told = Told(model("a"))
    entry = told.entry()
    told.open()
    door = told.doors.enter(entry)
    assert door is not None
    told.doors.doubt(entry, door)
    told.doors.end(entry, door)
    again, behind = told.join(first=True), told.join()
    async with asyncio.timeout(20):
        assert await asyncio.gather(again.turn, behind.turn) == [door, door]
    assert told.doors.enter(entry) is door
    told.doors.close()


async def test_one_that_was_shut_meanwhile_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllmd.gateway.doors.BREATH", 0.01)
    told = Told(model("a"))
    entry = told.entry()
    told.open()
    door = told.doors.enter(entry)
    assert door is not None
    told.doors.doubt(entry, door)
    told.doors.end(entry, door)
    told.shut()
    over = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.05, over.set_result, None)
    await over
    assert told.doors.enter(entry) is None
    told.doors.close()
