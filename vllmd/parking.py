"""When a spare is parked, and that starts use it: an engine that has imported already, for the next start of any model.

It is parked while nothing moves, so that its import does not compete with a start, and with the environment of the latest
launch, or, where there was none yet, of the first model that may be asked for. What keeps a start from using it is told.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from vllmd.core.launch import environment
from vllmd.core.states import State
from vllmd.edge.process import Child, spawn
from vllmd.edge.spare import IMPORTING, NONE, Spares
from vllmd.events import Note
from vllmd.facts import Inspection, Launch
from vllmd.spec import ModelSpec
from vllmd.units import GIB

if TYPE_CHECKING:
    from vllmd.daemon import Daemon

LOOK_EVERY = 5.0  # seconds
UNSUITED = 2  # starts in a row after which another one is parked
QUIET = 2  # looks in a row at which nothing moved, before one is parked
MEMORY = 8 * GIB  # of the host that must be free where nobody said whether to park
MOVING = frozenset({State.WAITING, State.STARTING, State.STOPPING, State.BACKOFF})


class Parking:
    """The daemon's spares."""

    def __init__(self, daemon: "Daemon", scratch: Path, mark: str) -> None:
        self._daemon = daemon
        self.spares = Spares(scratch, mark)
        self._latest: tuple[str, Mapping[str, str]] | None = None
        self._told = ""
        self._refusals = 0  # starts in a row that the parked one did not suit

    def begin(self, launch: Launch, *, log_fd: int, cwd: Path, cgroup: Path | None = None) -> Child:
        """Start an engine: from the spare if it fits, else by itself. Raises OSError as `spawn` does."""
        self._latest = launch.argv[0], launch.env
        taken: Child | str = "there are no spares (daemon.spare = 0)"
        if self._wanted():
            taken = self.spares.take(launch, log_fd=log_fd, cwd=cwd, cgroup=cgroup)
        if isinstance(taken, Child):
            self._refusals = 0
            self._say(launch, "started from the warm spare: vLLM is imported already", "info")
            return taken
        if taken not in (IMPORTING, NONE):
            self._refusals += 1
        self._say(launch, f"started by itself, not from the warm spare: {taken}", "debug")
        return spawn(launch, log_fd=log_fd, cwd=cwd, cgroup=cgroup)

    def _say(self, launch: Launch, text: str, level: str) -> None:
        self._daemon.voice.note(Note("spare", text, level, launch.served_name))

    def _wanted(self) -> bool:
        spare = self._daemon.settings.daemon.spare
        return bool(spare) if spare is not None else psutil.virtual_memory().available >= MEMORY or bool(self.used())

    def used(self) -> int:
        """Bytes that parked processes hold."""
        return self.spares.rss()

    async def run(self) -> None:
        """For ever: park one when all is quiet, give it up when it is not wanted any more."""
        quiet = 0
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if not self._wanted() or self._refusals >= UNSUITED:
                self._refusals = 0
                await self.spares.drop()  # the next one is parked as the latest launch was
                continue
            world = self._daemon.core.world
            quiet = 0 if world.closing or any(i.state in MOVING for i in world.instances.values()) else quiet + 1
            if quiet < QUIET:
                continue
            if self._latest is None:
                self._latest = await self._likely()
            if self._latest is not None and (why := self.spares.prepare(*self._latest)) != self._told:
                self._told = why
                if why:
                    self._daemon.voice.note(Note("spare", f"no spare is parked: {why}", "debug"))

    async def _likely(self) -> tuple[str, Mapping[str, str]] | None:
        """The command and environment of the first model that a request may ask for."""
        world = self._daemon.core.world
        spec: ModelSpec | None = next((s for s in world.settings.models.values() if s.on_demand), None)
        if spec is None or not world.ledger.readings:
            return None
        found = await self._daemon.lookout.preflight(spec, {}, self._daemon.settings.daemon)
        if not isinstance(found, Inspection):
            return None
        device = next(iter(world.ledger.readings.values()))
        return found.engine.executable, environment(spec, found, [device], world.places, str(world.places.scratch))
