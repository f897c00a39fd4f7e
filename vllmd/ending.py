"""The ways in which a daemon ends, and what becomes of the models with each.

Told to stop, it ends them all, drained; told so twice, at once. When systemd stops it only to start it again (a restart, an
upgrade), and when it failed and systemd will start it again, it leaves them running: the next daemon goes on with them. In a
terminal nobody comes after it, so nothing is left.
"""

import asyncio
import signal
from typing import TYPE_CHECKING

from vllmd.core.states import ALIVE
from vllmd.edge.kill import in_thread
from vllmd.events import Shutdown
from vllmd.units import count

if TYPE_CHECKING:
    from vllmd.daemon import Daemon

LAST_WRITE = 5.0  # seconds that writing may take at the end: a disk that hangs must not hold up a shutdown


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

    async def leave(self) -> None:
        """Listeners first, so that nobody asks a daemon that is going; then what is still to be written."""
        daemon = self._daemon
        daemon.serving = False
        await daemon.listeners.stop()
        await daemon.tasks.end()
        stay = self._leaving or (daemon.exit_code != 0 and daemon.ties.supervised)
        for inst in daemon.core.world.instances.values():
            if inst.state in ALIVE and inst.id in daemon.attempts:  # none is, unless we leave them or have failed
                attempt = daemon.attempts[inst.id]
                await (attempt.let_go() if stay else attempt.end())
        await in_thread(daemon.write, LAST_WRITE, None)
        await (daemon.saver.flush(LAST_WRITE) if stay else daemon.saver.clear(LAST_WRITE))
        daemon.store.unlock()
        daemon.log.info("vllmd has ended" + (", its models go on" if stay else ""))
        # A second signal now must not turn a good end into a death by signal.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
