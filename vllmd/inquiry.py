"""What an engine is asked at its endpoint: does it serve as ours, how does it fare, does a token come through.

Each answer becomes an event with the attempt's number; silence becomes none, and the core counts it.
"""

import asyncio
import time

from vllmd.edge.listener import connections, listener_owner
from vllmd.edge.probe import Counters, ProbeError, Words, alike
from vllmd.edge.procfs import read_table
from vllmd.edge.tasks import in_thread
from vllmd.edge.tree import TreeWatch, fast_members
from vllmd.events import Canary, CanaryBack, Pulse, Sleep, Slept, Wake, Woke
from vllmd.facts import Launch
from vllmd.shared import Shared

PROBE_EVERY = 0.5  # seconds between probes of a start; the log's last line calls for one at once
PULSE_EVERY = 5.0  # seconds between looks at a ready engine's counters, at most
PROBE_TIMEOUT = 5.0
SLEEP_TIMEOUT = 600.0  # one call's; the core has its own limits, and ends the engine then
DELIVER = 10.0  # seconds for the API server to hand on the last words of an engine that has finished
CONNECTED_EVERY = 0.1  # seconds between looks at who is connected

Wish = Canary | Sleep | Wake


class Inquiry:
    """Questions to one attempt's endpoint."""

    def __init__(self, instance: str, attempt: int, launch: Launch, hang_after: float, shared: Shared) -> None:
        self.instance, self.attempt, self.launch = instance, attempt, launch
        self.hang_after = hang_after
        self.shared = shared
        self._counters: Counters | None = None
        self._now = asyncio.Event()
        self._words: Words | None = None  # what it answered before it slept for the first time

    def soon(self) -> None:
        """Its log says that it is about to listen."""
        self._now.set()

    async def until_ready(self, watch: TreeWatch) -> None:
        """Ask until it serves, names us, and the listening socket is our tree's."""
        while not await self._serves(watch):
            try:
                async with asyncio.timeout(PROBE_EVERY):
                    await self._now.wait()
                await asyncio.sleep(0.02)  # the last line is printed just before it listens
            except TimeoutError:
                continue
            self._now.clear()

    async def _serves(self, watch: TreeWatch) -> bool:
        endpoint = self.launch.endpoint
        try:
            if not await self.shared.probe.health(endpoint, timeout=PROBE_TIMEOUT):
                return False
            if self.launch.served_name not in await self.shared.probe.served(endpoint, timeout=PROBE_TIMEOUT):
                return False
        except ProbeError:
            return False

        def members() -> frozenset[int]:
            return frozenset(member.pid for member in fast_members(watch.leader, watch.known, table=read_table()))

        own = await in_thread(members, 2.0, frozenset[int]())
        owners = await in_thread(lambda: listener_owner(endpoint, own), 2.0, None)
        return owners is not None and bool(owners & own)

    async def pulses(self) -> None:
        """Counters of the ready engine, for ever. One that does not answer gives no pulse."""
        while True:
            try:
                self._pulse(await self.shared.probe.counters(self.launch.endpoint, timeout=PROBE_TIMEOUT))
            except ProbeError:
                pass
            await asyncio.sleep(min(PULSE_EVERY, self.hang_after / 4))

    def _pulse(self, seen: Counters) -> None:
        before, self._counters = self._counters, seen
        moved = before is not None and seen.progress != before.progress
        self.shared.post(
            Pulse(
                self.instance, self.attempt, seen.running, seen.waiting, seen.generation_tokens, moved, seen.kv_usage
            )
        )  # fmt: skip

    async def fulfil(self, wish: Wish, category: tuple[str, ...]) -> None:
        """What a command asks of the engine, with the event that it asks for."""
        match wish:
            case Canary():
                await self.canary(category)
            case Sleep():
                await self.sleep(wish.level, category)
            case Wake():
                await self.wake(wish.level, category)

    async def canary(self, category: tuple[str, ...]) -> None:
        """One token through the engine, within hang_after."""
        ok = None
        try:
            ok = await self.shared.probe.canary(
                self.launch.endpoint, self.launch.served_name, category, timeout=self.hang_after
            )
        except ProbeError:
            ok = False
        self.shared.post(CanaryBack(self.instance, self.attempt, ok))

    async def sleep(self, level: int, category: tuple[str, ...]) -> None:
        """Have it sleep, and before the first time say something to be compared with later."""
        problem, began = "", time.monotonic()
        try:
            if self._words is None:
                self._words = await self._answer(category)
                began = time.monotonic()
            await self.shared.probe.sleep(self.launch.endpoint, level, SLEEP_TIMEOUT)
        except ProbeError as error:
            problem = str(error)
        self.shared.post(Slept(self.instance, self.attempt, problem, time.monotonic() - began))

    async def wake(self, level: int, category: tuple[str, ...]) -> None:
        """Have it wake, and say the same again."""
        problem, same, began = "", None, time.monotonic()
        took = 0.0
        try:
            await self.shared.probe.wake(self.launch.endpoint, level, SLEEP_TIMEOUT)
            took = time.monotonic() - began
            words = await self._answer(category)
            same = None if self._words is None or words is None else alike(self._words, words)
        except ProbeError as error:
            problem = f"it does not answer after waking: {error}" if took else f"it does not wake: {error}"
        self.shared.post(Woke(self.instance, self.attempt, problem, same, took))

    async def _answer(self, category: tuple[str, ...]) -> Words | None:
        endpoint, name = self.launch.endpoint, self.launch.served_name
        return await self.shared.probe.answer(endpoint, name, category, timeout=self.hang_after)

    async def until_alone(self) -> None:
        """Until no client is connected any more, or DELIVER is over."""
        for _ in range(int(DELIVER / CONNECTED_EVERY)):
            if not await in_thread(lambda: connections(self.launch.endpoint), 1.0, 0):
                return
            await asyncio.sleep(CONNECTED_EVERY)
