"""Where requests for each model go: through the door of an instance that serves, or into the line before it.

Counts are kept here, in memory; the core is told their edges (events Wanted and Used), at once where it may have to decide
with them, else twice a second.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from vllmd.events import Event, Open, Refuse, Shut, Used, Wanted
from vllmd.gateway.errors import Trouble
from vllmd.gateway.line import Line, Place
from vllmd.gateway.pool import Pool
from vllmd.spec import ModelSpec

TELL_EVERY = 0.5  # seconds between news of use that nobody waits for
AGAIN = 10.0  # seconds after which to try again where nobody knows better
BREATH = 0.5  # seconds that a door is doubted; the core hears of a death within milliseconds


@dataclass(eq=False, slots=True)
class Door:
    """One attempt of an instance, while it takes requests and until the last of them has ended."""

    instance: str
    attempt: int
    pool: Pool
    open: bool = True
    under_way: int = 0
    begun: int = 0
    at: float = 0.0  # when the last request began or ended
    untold: bool = False
    busy: bool = False  # as was told


@dataclass(eq=False, slots=True)
class Entry:
    """One model: its door, if it is open, and its line."""

    spec: ModelSpec
    door: Door | None = None
    line: Line = field(default_factory=Line)
    told: tuple[bool, float, int] = (False, 0.0, 0)


class Doors:
    """All models. `post` hands an event to the core. Used from the event loop only."""

    def __init__(self, post: Callable[[Event], None], loop: asyncio.AbstractEventLoop) -> None:
        self._post, self._loop = post, loop
        self._entries: dict[str, Entry] = {}
        self._doors: dict[str, Door] = {}  # the latest of each instance
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closing: Trouble | None = None

    def configure(self, models: Mapping[str, ModelSpec]) -> None:
        """These models from now on. Who waits for one that is no more is told so."""
        for name in [name for name in self._entries if name not in models]:
            self._turn_away(self._entries.pop(name), Trouble(404, "model_not_found", f"{name} was removed"))
        for name, spec in models.items():
            if name in self._entries:
                self._entries[name].spec = spec
            else:
                self._entries[name] = Entry(spec)

    def entry(self, model: str) -> Entry:
        """A configured model. Raises Trouble(404)."""
        try:
            return self._entries[model]
        except KeyError:
            raise Trouble(404, "model_not_found", f"{model} was removed") from None

    def lengths(self) -> Iterator[tuple[str, int]]:
        """How many wait for each model."""
        return ((name, entry.line.length) for name, entry in self._entries.items())

    # -- a request

    def enter(self, entry: Entry) -> Door | None:
        """Through the open door, if there is one, it is not crowded and nobody stands before it."""
        door = entry.door
        if door is None or entry.line.length or door.under_way >= entry.spec.concurrency:
            return None
        self._begin(door)
        return door

    def join(self, entry: Entry, key: str, priority: int, since: float, *, first: bool) -> Place:
        """Stand in line. Raises Trouble: 429 when it is full, 503 when vllmd ends."""
        if self._closing is not None:
            raise self._closing
        if entry.line.length >= entry.spec.queue and not first:
            text = f"{entry.line.length} requests wait for {entry.spec.name} already"
            raise Trouble(429, "queue_full", text, "try again later", AGAIN)
        place = Place(key, since, priority, self._loop.create_future())
        entry.line.join(place, first=first)
        self._waiting += 1
        self._tell(entry)
        return place

    def leave(self, entry: Entry, place: Place) -> None:
        """Out of the line, or, where its turn had just come, away from the door."""
        if entry.line.leave(place):
            self._waiting -= 1
            self._tell(entry)
        elif place.turn.done() and not place.turn.cancelled() and place.turn.exception() is None:
            self.end(entry, place.turn.result())
        place.turn.cancel()

    def end(self, entry: Entry, door: Door) -> None:
        """A request that went through the door has ended, in whatever way."""
        door.under_way -= 1
        door.at = self._loop.time()
        if door is entry.door and entry.line.length:
            self._admit(entry, door)
            self._tell(entry)
        if not door.under_way:
            if not door.open:
                door.pool.close()
            self._used(door)
        else:
            self._later(door)

    def doubt(self, entry: Entry, door: Door) -> None:
        """The engine lost a request. If it is dead the core shuts the door in a moment: until then nobody else is sent there.
        If it is not, nobody but us would ever move the line again."""
        if entry.door is door:
            entry.door = None
            self._loop.call_later(BREATH, self._trust, entry, door)

    # -- what the core says

    def open(self, command: Open) -> None:
        """The model serves: who waits goes in. The attempt may be one that was shut before, and not be empty yet."""
        pool = Pool(command.endpoint, self._loop)
        door = self._doors.get(command.instance)
        if door is not None:
            door.pool.close()
        if door is None or door.attempt != command.attempt:
            door = self._doors[command.instance] = Door(command.instance, command.attempt, pool)
        else:
            door.pool, door.open = pool, True
            if not door.under_way:
                door.begun = 0  # it slept: it serves anew
        entry = self._entries.get(command.model)
        if entry is None:
            return
        entry.door = door
        self._admit(entry, door)
        self._tell(entry)

    def shut(self, command: Shut) -> None:
        """It takes no more. What is under way is told, whatever was told before."""
        door = self._doors.get(command.instance)
        if door is None or door.attempt != command.attempt:
            return
        door.open = False
        entry = self._entries.get(command.model)
        if entry is not None and entry.door is door:
            entry.door = None
        if not door.under_way:
            door.pool.close()
        self._post_used(door)
        if entry is not None:
            self._tell(entry)  # from now on it is decided with who waits, and since when

    def refuse(self, command: Refuse) -> None:
        """Who waits for the model waits in vain."""
        entry = self._entries.get(command.model)
        if entry is not None:
            cause = command.cause
            hint = "; ".join(remedy.text for remedy in cause.remedies)
            after = AGAIN if command.after is None else command.after
            self._turn_away(entry, Trouble(503, cause.kind.replace("-", "_"), cause.text, hint, after))
            entry.told = (False, 0.0, 0)  # the core knows

    def close(self) -> None:
        """vllmd ends: who waits is told, and who comes."""
        self._closing = Trouble(503, "closing", "vllmd is shutting down", retry_after=AGAIN)
        for entry in self._entries.values():
            self._turn_away(entry, self._closing)
        if self._timer is not None:
            self._timer.cancel()

    # -- within

    def _trust(self, entry: Entry, door: Door) -> None:
        """Nothing was heard of its death."""
        if door.open and entry.door is None and self._doors.get(door.instance) is door:
            entry.door = door
            self._admit(entry, door)
            self._tell(entry)

    def _begin(self, door: Door) -> None:
        door.begun += 1
        door.under_way += 1
        door.at = self._loop.time()
        if door.under_way == 1:
            self._used(door)
        else:
            self._later(door)

    def _admit(self, entry: Entry, door: Door) -> None:
        """Let in who waits, each in its turn, as many as may be at the engine at once."""
        while door.under_way < entry.spec.concurrency and (place := entry.line.next()) is not None:
            self._waiting -= 1
            if not place.turn.done():
                self._begin(door)
                place.turn.set_result(door)

    def _turn_away(self, entry: Entry, trouble: Trouble) -> None:
        while (place := entry.line.next()) is not None:
            self._waiting -= 1
            if not place.turn.done():
                place.turn.set_exception(trouble)

    def _tell(self, entry: Entry, *, late: bool = False) -> None:
        """The core hears of a line when it begins or ends, and when its oldest or its priority is another. First what it must
        know of all engines to decide on that. While a line moves through its door there is nothing to decide, and each
        request changes it: then it is told later."""
        line = entry.line
        now = (line.length > 0, line.oldest(), line.priority())
        if now == entry.told:
            return
        if now[0] and entry.told[0] and entry.door is not None and not late:
            self._start_timer()
            return
        entry.told = now
        self._tell_use()
        self._post(Wanted(entry.spec.name, line.length, now[1], now[2]))

    def _used(self, door: Door) -> None:
        """An engine became busy or idle. Told now if somebody waits anywhere, or for just that."""
        if not door.open or (self._waiting and door.busy != (door.under_way > 0)):
            self._post_used(door)
        else:
            self._later(door)

    def _later(self, door: Door) -> None:
        door.untold = True
        self._start_timer()

    def _start_timer(self) -> None:
        if self._timer is None and self._closing is None:
            self._timer = self._loop.call_later(TELL_EVERY, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._tell_use()
        for entry in self._entries.values():
            self._tell(entry, late=True)

    def _tell_use(self) -> None:
        for door in self._doors.values():
            if door.untold:
                self._post_used(door)

    def _post_used(self, door: Door) -> None:
        door.untold, door.busy = False, door.under_way > 0
        self._post(Used(door.instance, door.attempt, door.under_way, door.begun, door.at))
