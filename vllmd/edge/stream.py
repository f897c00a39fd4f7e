"""Events for whoever watches: a ring that remembers the last ones.

There is one ring and no queue per reader: a reader is a place in the ring. One that is too slow falls off its old end
and is told so (`lost`), so a thousand of them cost no memory. Ids are microseconds of the wall clock at the daemon's
start, counted up by one: they grow over restarts too, and an id of another run is never taken for one of ours.

What comes often (a model's progress) is given with a key: at most two a second per key, the last one always gets
through, and a change of `state` is never held back. An event is kept as JSON text: a fifth of the memory of its
objects, encoded once.
"""

import asyncio
import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

BATCH = 64  # events given to a reader at once, so that one write stays small


@dataclass(frozen=True, slots=True)
class Event:
    """One entry, `data` as JSON. An `id` of None is no place in the ring (lost, clock, bye): nobody resumes there."""

    id: int | None
    kind: str
    data: str


def frame(event: Event) -> bytes:
    """The event as text/event-stream. JSON in ASCII has no newline, so hostile strings cannot forge a line."""
    head = "" if event.id is None else f"id: {event.id}\n"
    return f"{head}event: {event.kind}\ndata: {event.data}\n\n".encode()


def encode(value: Any) -> str:
    """Compact ASCII JSON of anything: NaN becomes null (no browser reads NaN), what JSON lacks becomes its nearest."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    match value:
        case Mapping():
            return dict(value)
        case set() | frozenset():
            return sorted(value, key=str)
        case _:
            return str(value)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value


class EventLog:
    """The ring. Used from the event loop only."""

    def __init__(self, *, size: int = 2000, interval: float = 0.5, clock: Callable[[], float] = time.time) -> None:
        """Keep `size` events; publish each key at most every `interval` seconds."""
        self._last = int(clock() * 1e6)
        self._ring: deque[Event] = deque(maxlen=size)
        self._interval = interval
        self._states: dict[str, object] = {}  # key -> state that was last published
        self._held: dict[str, tuple[str, Mapping[str, Any]] | None] = {}  # key in its pause -> what waits for the end
        self._waiters: set[asyncio.Future[None]] = set()
        self.closed = False

    @property
    def last(self) -> int:
        """Id of the newest event, or the one before the first."""
        return self._last

    def publish(self, kind: str, data: Mapping[str, Any], key: str | None = None) -> None:
        """Add an event; with a `key`, one of that key which still waits is replaced."""
        if self.closed:
            return
        if key is None:
            self._append(kind, data)
        elif key not in self._held:
            self._append_keyed(key, kind, data)
            self._pause(key)
        elif data.get("state") != self._states.get(key):
            self._held[key] = None
            self._append_keyed(key, kind, data)
        else:
            self._held[key] = kind, data

    def _append(self, kind: str, data: Mapping[str, Any]) -> None:
        self._last += 1
        self._ring.append(Event(self._last, kind, encode(data)))
        self._wake()

    def _append_keyed(self, key: str, kind: str, data: Mapping[str, Any]) -> None:
        self._states[key] = data.get("state")
        self._append(kind, data)

    def _pause(self, key: str) -> None:
        self._held[key] = None
        asyncio.get_running_loop().call_later(self._interval, self._resume, key)

    def _resume(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._append_keyed(key, *held)
            self._pause(key)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def forget(self, key: str) -> None:
        """The key is gone for good: what waits of it is dropped."""
        self._states.pop(key, None)
        if key in self._held:
            self._held[key] = None

    def close(self) -> None:
        """Publish what is held back; readers get what is left and then the end."""
        for key, held in self._held.items():
            if held is not None:
                self._append_keyed(key, *held)
        self._held.clear()
        self.closed = True
        self._wake()

    def subscribe(self, after: int | None = None) -> "Subscription":
        """A reader of everything after the id `after`; None = of what comes from now on."""
        return Subscription(self, self._last if after is None else after)

    def has(self, after: int) -> bool:
        """Whether nothing since `after` is forgotten, and `after` is an id of this run."""
        return self._last - len(self._ring) <= after <= self._last

    def after(self, place: int, count: int | None = None) -> list[Event]:
        """The events behind `place`, at most `count`; all that are left when `place` is forgotten."""
        skip = max(0, len(self._ring) - (self._last - place))
        return list(islice(self._ring, skip, None if count is None else skip + count))

    async def news(self) -> None:
        """Wait until something is published or the log is closed. Cancelling it loses nothing."""
        if self.closed:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)


@dataclass(slots=True)
class Subscription:
    """A reader's place in the log."""

    log: EventLog
    place: int

    async def take(self, patience: float) -> list[Event] | None:
        """The next events, oldest first; [] when `patience` seconds brought none; None at the end of the log.

        A `lost` event alone says that what stood here is forgotten; reading goes on at the newest."""
        if self.place == self.log.last and not self.log.closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self.log.news()
        if not self.log.has(self.place):
            lost = Event(None, "lost", encode({"after": self.place}))
            self.place = self.log.last
            return [lost]
        events = self.log.after(self.place, BATCH)
        self.place += len(events)
        return events if events or not self.log.closed else None
