"""The line of requests before one model. Who comes first is served first, but of several API keys each has its turn."""

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllmd.gateway.doors import Door


@dataclass(eq=False, slots=True)
class Place:
    """One request in line. `turn` resolves with the door that it may go through, or with why it may not."""

    key: str  # name of its API key; "" without one
    since: float
    priority: int
    turn: "asyncio.Future[Door]"


@dataclass(slots=True)
class Line:
    """Places by key; the keys take turns."""

    by_key: "OrderedDict[str, deque[Place]]" = field(default_factory=OrderedDict)
    length: int = 0

    def join(self, place: Place, *, first: bool = False) -> None:
        """Stand in line; `first`: at its head, as one whose engine died under it."""
        queue = self.by_key.setdefault(place.key, deque())
        if first:
            queue.appendleft(place)
            self.by_key.move_to_end(place.key, last=False)
        else:
            queue.append(place)
        self.length += 1

    def leave(self, place: Place) -> bool:
        """Out of the line; whether it was in it."""
        queue = self.by_key.get(place.key)
        if queue is None or place not in queue:
            return False
        queue.remove(place)
        self._left(place.key, queue)
        return True

    def next(self) -> Place | None:
        """Whose turn it is, out of the line; None when nobody waits."""
        if not self.by_key:
            return None
        key, queue = next(iter(self.by_key.items()))
        place = queue.popleft()
        self.by_key.move_to_end(key)
        self._left(key, queue)
        return place

    def _left(self, key: str, queue: "deque[Place]") -> None:
        self.length -= 1
        if not queue:
            del self.by_key[key]

    def oldest(self) -> float:
        """Since when the oldest waits; of an empty line 0."""
        return min((queue[0].since for queue in self.by_key.values()), default=0.0)

    def priority(self) -> int:
        """The highest priority of those at the head."""
        return max((queue[0].priority for queue in self.by_key.values()), default=0)
