"""The ways in which a daemon ends, and what becomes of the models with each.

Told to stop, it ends them all, drained; told so twice, at once. When systemd stops it only to start it again (a restart, an
upgrade), and when it failed and systemd will start it again, it leaves them running: the next daemon goes on with them. In a
terminal nobody comes after it, so nothing is left.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from vllmd.edge.kill import end_runaways
from vllmd.edge.tasks import in_thread
from vllmd.events import Shutdown
from vllmd.ground import release
from vllmd.units import count

if TYPE_CHECKING:
    from vllmd.daemon import Daemon

LAST_WRITE = 5.0  # seconds that writing may take at the end: a disk that hangs must not hold up a shutdown
LISTENERS_END, TASKS_END, MODELS_END = 5.0, 5.0, 60.0  # seconds that each of these may take


class Ending:
    """How this daemon comes to its end."""

    def __init__(self, daemon: "Daemon") -> None:
        self._daemon = daemon
        self._asked = 0
        self._leaving = False

    def catch_signals(self) -> None:
        """From now on SIGTERM and SIGINT end in order, and SIGHUP reloads."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._told_to_end)
        loop.add_signal_handler(signal.SIGINT, self._end_all)
        loop.add_signal_handler(signal.SIGHUP, self._told_to_reload)

    def _told_to_reload(self) -> None:
        if self._daemon.serving:
            self._daemon.tasks.start(self._daemon.service.reload_by_signal(), "reload")

    def _told_to_end(self) -> None:
        if self._daemon.ties.unit is None or self._asked:
            self._end_all()
        elif not self._leaving:
            self._daemon.tasks.start(self._end_or_leave(), "end")

    async def _end_or_leave(self) -> None:
        if await self._daemon.ties.is_restart():
            self._leaving = True
            self._daemon.log.info("vllmd restarts: its models go on")
            self._daemon.given.notify.stopping("restarting; the models go on")
            self._daemon.finished.set()
        else:
            self._end_all()

    def _end_all(self) -> None:
        daemon = self._daemon
        self._asked += 1
        running = len([a for a in daemon.attempts.values() if a.live])
        again = " now" if self._asked > 1 else (" (once more to skip the drain)" if running else "")
        daemon.log.info(f"ending {count(running, 'model')}{again}")
        if self._asked == 1:
            daemon.given.notify.stopping()
            if daemon.serving and daemon.ties.supervised:
                daemon.tasks.start(daemon.ties.extend(daemon.core.world), "extend")
        daemon.post(Shutdown())

    async def give_up(self) -> None:
        """It cannot start: what was taken is given back, and what an earlier daemon left is let be."""
        await self._step("listeners", self._hang_up, LISTENERS_END)
        self._daemon.store.unlock()

    async def leave(self) -> None:
        """What is to be done at the end, each step for itself: whatever fails in one, the next is done. After a failure the
        models come first, as nobody knows what else has failed; otherwise they have ended by now, or are to stay."""
        daemon = self._daemon
        daemon.serving = False
        stay = self._leaving or (daemon.exit_code != 0 and daemon.ties.supervised)
        if daemon.exit_code != 0:
            await self._step("tasks", daemon.tasks.end, TASKS_END)
            await self._part(stay)
        # Before the tasks, so that requests in progress are answered; nobody asks a daemon that is going.
        await self._step("listeners", self._hang_up, LISTENERS_END)
        await self._step("tasks", daemon.tasks.end, TASKS_END)
        await self._part(stay)
        await self._step("spare", daemon.parking.spares.drop, LAST_WRITE)
        if not stay:
            await self._step("runaways", self._end_runaways, MODELS_END)
        await self._step("what was learned", lambda: in_thread(daemon.write, LAST_WRITE, None), LAST_WRITE + 1)
        write = daemon.saver.flush if stay else daemon.saver.clear
        await self._step("records", lambda: write(LAST_WRITE), LAST_WRITE + 1)
        if not stay:
            await self._step("scratch", self._release, LAST_WRITE + 1)
        daemon.store.unlock()
        daemon.log.info("vllmd has ended" + (", its models go on" if stay else ""))
        # A second signal now must not turn a good end into a death by signal.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    async def _step(self, name: str, work: Callable[[], Awaitable[object]], limit: float) -> None:
        try:
            async with asyncio.timeout(limit):
                await work()
        except Exception as error:
            self._daemon.log.error(f"cannot end {name}: {error!r}")

    async def _part(self, stay: bool) -> None:
        """End every attempt that is not over, or let go of it."""
        left = [attempt for attempt in self._daemon.attempts.values() if not attempt.over]
        works = ((each.instance, each.let_go if stay else each.end) for each in left)
        await asyncio.gather(*(self._step(name, work, MODELS_END) for name, work in works))

    async def _hang_up(self) -> None:
        self._daemon.gateway.close()
        await self._daemon.listeners.stop()

    async def _end_runaways(self) -> None:
        if left := await end_runaways():
            self._daemon.log.error("processes of models cannot be killed", pids=list(left))

    async def _release(self) -> None:
        places = self._daemon.core.world.places
        await in_thread(lambda: release(places.scratch, places.mark), LAST_WRITE, None)
