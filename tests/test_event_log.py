"""The ring of events: order, resuming, what is held back, and what a slow reader gets."""

import asyncio
import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vllmd.edge.stream import BATCH, Event, EventLog, encode, frame


def texts(events: list[Event] | None) -> list[Any]:
    """Their data."""
    return [json.loads(event.data) for event in events or []]


async def test_ids_grow_by_one_and_a_reader_gets_all_in_order() -> None:
    """A reader that is there sees every event once, in order."""
    log = EventLog()
    reader = log.subscribe()
    for n in range(3):
        log.publish("note", {"n": n})
    events = await reader.take(0)
    assert events is not None
    assert texts(events) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert [event.id for event in events] == [log.last - 2, log.last - 1, log.last]
    assert await reader.take(0) == []


async def test_a_waiting_reader_is_woken() -> None:
    """take() returns as soon as something is published."""
    log = EventLog()
    reader = log.subscribe()
    asyncio.get_running_loop().call_soon(log.publish, "note", {"n": 1})
    assert texts(await reader.take(20)) == [{"n": 1}]


async def test_ids_of_a_later_run_are_greater() -> None:
    """An id of an earlier run is older than all of this one: it is lost, not mistaken."""
    first, second = EventLog(clock=lambda: 1000.0), EventLog(clock=lambda: 1000.5)
    first.publish("note", {})
    second.publish("note", {})
    assert first.last < second.last - 1
    events = await second.subscribe(first.last).take(0)
    assert events is not None
    assert [event.kind for event in events] == ["lost"]


async def test_an_id_from_the_future_is_lost() -> None:
    """After the clock was set back, an id greater than all is not one of ours."""
    log = EventLog(clock=lambda: 1000.0)
    events = await log.subscribe(log.last + 10**9).take(0)
    assert events is not None
    assert [event.kind for event in events] == ["lost"]


async def test_a_reader_resumes_behind_its_id() -> None:
    """`after` gives what came since."""
    log = EventLog()
    log.publish("note", {"n": 0})
    place = log.last
    log.publish("note", {"n": 1})
    assert texts(await log.subscribe(place).take(0)) == [{"n": 1}]


async def test_a_slow_reader_is_told_that_it_lost_something_and_goes_on() -> None:
    """Who falls off the ring gets `lost` and then what is new; nothing is kept for it."""
    log = EventLog(size=10)
    reader = log.subscribe()
    for n in range(11):
        log.publish("note", {"n": n})
    events = await reader.take(0)
    assert events is not None
    assert [(event.id, event.kind) for event in events] == [(None, "lost")]
    log.publish("note", {"n": 99})
    assert texts(await reader.take(0)) == [{"n": 99}]


async def test_a_full_ring_loses_nothing_for_who_is_just_in_time() -> None:
    """With `size` events behind, none is lost."""
    log = EventLog(size=10)
    reader = log.subscribe()
    for n in range(10):
        log.publish("note", {"n": n})
    assert len(await reader.take(0) or []) == 10


async def test_a_reader_gets_batches() -> None:
    """One take gives at most BATCH events, the next goes on there."""
    log = EventLog()
    reader = log.subscribe()
    for n in range(BATCH + 5):
        log.publish("note", {"n": n})
    assert len(await reader.take(0) or []) == BATCH
    assert texts(await reader.take(0)) == [{"n": n} for n in range(BATCH, BATCH + 5)]


async def test_progress_is_thinned_and_the_last_one_comes_through() -> None:
    """Of many events of one key in an interval the first and the last are published."""
    log = EventLog(interval=0.05)
    reader = log.subscribe()
    for n in range(100):
        log.publish("model", {"state": "starting", "n": n}, key="a")
    assert texts(await reader.take(0)) == [{"state": "starting", "n": 0}]
    assert texts(await reader.take(20)) == [{"state": "starting", "n": 99}]


async def test_keys_do_not_hold_back_each_other_nor_notes() -> None:
    """Only the same key waits."""
    log = EventLog(interval=60)
    reader = log.subscribe()
    for key in ("a", "a", "b"):
        log.publish("model", {"state": "starting", "name": key}, key=key)
    log.publish("note", {"text": "x"})
    assert [e.get("name", "note") for e in texts(await reader.take(0))] == ["a", "b", "note"]


async def test_a_change_of_state_is_not_held_back() -> None:
    """ready is published at once, and what waited of the old state is dropped."""
    log = EventLog(interval=0.05)
    reader = log.subscribe()
    for state in ("starting", "starting", "ready"):
        log.publish("model", {"state": state}, key="a")
    assert [e["state"] for e in texts(await reader.take(0))] == ["starting", "ready"]
    assert await reader.take(0.2) == []


async def test_a_forgotten_key_publishes_nothing_later() -> None:
    """What waits of a model that was removed is dropped."""
    log = EventLog(interval=0.05)
    reader = log.subscribe()
    log.publish("model", {"n": 1}, key="a")
    log.publish("model", {"n": 2}, key="a")
    log.forget("a")
    assert texts(await reader.take(0)) == [{"n": 1}]
    assert await reader.take(0.2) == []


async def test_closing_gives_what_is_left_and_then_the_end() -> None:
    """close() publishes what is held back; the reader gets it, then None, for ever."""
    log = EventLog(interval=60)
    reader = log.subscribe()
    log.publish("model", {"n": 1}, key="a")
    log.publish("model", {"n": 2}, key="a")
    log.close()
    log.publish("note", {"n": 3})
    assert texts(await reader.take(20)) == [{"n": 1}, {"n": 2}]
    assert await reader.take(20) is None
    assert await reader.take(20) is None


async def test_a_cancelled_wait_loses_nothing() -> None:
    """take() may be cancelled at any time."""
    log = EventLog()
    reader = log.subscribe()
    task = asyncio.get_running_loop().create_task(reader.take(20))
    await asyncio.sleep(0)
    task.cancel()
    log.publish("note", {"n": 1})
    assert texts(await reader.take(0)) == [{"n": 1}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_no_text_can_forge_a_line_of_the_stream(data: dict[str, Any]) -> None:
    """Whatever is in an event, its frame is id, event, data and an empty line, in ASCII, and can be read."""
    raw = frame(Event(7, "note", encode(data)))
    lines = raw.decode("ascii").split("\n")
    assert [line.partition(": ")[0] for line in lines] == ["id", "event", "data", "", ""]
    assert "\r" not in raw.decode()
    json.loads(lines[2].removeprefix("data: "), parse_constant=lambda word: math.nan / (0 if word else 1))
