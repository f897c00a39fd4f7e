"""The daemon's eyes: processes and devices every few seconds, and a model's files before it starts.

Everything here may hang as long as a driver or a network file system does, so each look runs in a thread that is given up
after its time; none of them can keep the daemon from answering, or from ending.
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vllmd.edge.devices import Devices
from vllmd.edge.inspect import inspect
from vllmd.edge.process import reap_orphans
from vllmd.edge.procfs import read_table
from vllmd.edge.tasks import in_thread
from vllmd.events import DevicesRead
from vllmd.facts import Inspection
from vllmd.places import hf_home
from vllmd.spec import Cause, DaemonSpec, ModelSpec

if TYPE_CHECKING:
    from vllmd.attempt import Attempt

INSPECT_LIMIT = 30.0  # seconds; the core gives up sooner
DEVICES_LIMIT = 10.0  # seconds that a look at the devices may take
TABLE_LIMIT = 5.0
EVERY, BUSY, SOONEST = 5.0, 1.0, 0.1  # seconds between looks: when all is quiet, while something moves, when asked
STUCK = "the devices do not answer (a driver that hangs? see dmesg)"


class Lookout:
    """Looks, and reports what it saw."""

    def __init__(self, attempts: Mapping[str, "Attempt"], report: Callable[[DevicesRead], None]) -> None:
        self._attempts = attempts
        self._report = report
        self._devices = Devices()
        self._reading = False
        self._soon = asyncio.Event()

    def soon(self) -> None:
        """Somebody waits for the next look."""
        self._soon.set()

    async def watch(self) -> None:
        """Look for ever: often while something moves, rarely when all is quiet."""
        while True:
            busy = any(attempt.live and not attempt.is_ready for attempt in self._attempts.values())
            try:
                async with asyncio.timeout(BUSY if busy else EVERY):  # wait_for loses a cancellation before Python 3.12
                    await self._soon.wait()
                await asyncio.sleep(SOONEST)
            except TimeoutError:
                pass
            self._soon.clear()
            table = await in_thread(read_table, TABLE_LIMIT, None)
            if table is not None:
                reap_orphans(table)
                # Those that are being ended too: what they hold is theirs until the last of them is gone.
                self._report(await self.devices({name: each.look(table) for name, each in self._attempts.items()}))

    async def devices(self, pids: Mapping[str, frozenset[int]]) -> DevicesRead:
        """One look at the devices, by one thread at a time: a driver that hangs holds that thread and nothing else."""
        if self._reading:
            return DevicesRead((), STUCK)

        def read() -> DevicesRead:
            self._reading = True
            try:
                return self._devices.read(pids)
            finally:
                self._reading = False

        return await in_thread(read, DEVICES_LIMIT, DevicesRead((), STUCK))

    async def preflight(
        self, spec: ModelSpec, taken: Mapping[int, str], daemon: DaemonSpec
    ) -> Inspection | Cause | None:
        """A model's files, flags, port and disk. None when the files do not answer: the core's own limit tells then."""
        hf = hf_home(daemon.cache_dir)
        env = {**os.environ, **({"HF_HOME": str(hf)} if hf else {})}

        def look() -> Inspection | Cause:
            try:
                return inspect(
                    spec,
                    cache_dir=daemon.cache_dir,
                    log_dir=daemon.log_dir,
                    state_dir=daemon.state_dir,
                    taken_ports=taken,
                    env=env,
                )
            except Exception as error:
                # A file that nobody thought of is one model's trouble, not the end of all others.
                text = f"cannot check the files of {spec.name}: {error!r} (a defect of vllmd: please report it)"
                return Cause("inspect-failed", text, "files not readable", heals=False)

        return await in_thread(look, INSPECT_LIMIT, None)
