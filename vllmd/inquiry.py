"""What an engine is asked at its endpoint: does it serve as ours, how does it fare, does a token come through.

Each answer becomes an event with the attempt's number; silence becomes none, and the core counts it.
"""

import asyncio

from vllmd.edge.listener import connections, listener_owner
from vllmd.edge.probe import Counters, ProbeError
from vllmd.edge.procfs import read_table
from vllmd.edge.tasks import in_thread
from vllmd.edge.tree import TreeWatch, fast_members
from vllmd.events import CanaryBack, Pulse
from vllmd.facts import Launch
from vllmd.shared import Shared

PROBE_EVERY = 0.5  # seconds between probes of a start; the log's last line calls for one at once
PULSE_EVERY = 5.0  # seconds between looks at a ready engine's counters, at most
PROBE_TIMEOUT = 5.0
DELIVER = 10.0  # seconds for the API server to hand on the last words of an engine that has finished
CONNECTED_EVERY = 0.1  # seconds between looks at who is connected


class Inquiry:
    """Questions to one attempt's endpoint."""

    def __init__(self, instance: str, attempt: int, launch: Launch, hang_after: float, shared: Shared) -> None:
        self.instance, self.attempt, self.launch = instance, attempt, launch
        self.hang_after = hang_after
        self.shared = shared
        self._counters: Counters | None = None
        self._now = asyncio.Event()

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

    async def until_alone(self) -> None:
        """Until no client is connected any more, or DELIVER is over."""
        for _ in range(int(DELIVER / CONNECTED_EVERY)):
            if not await in_thread(lambda: connections(self.launch.endpoint), 1.0, 0):
                return
            await asyncio.sleep(CONNECTED_EVERY)
