"""What systemd is told while the daemon lives, and what it asks of us: alive, how many models are up, how long an end may
still take; and whether a SIGTERM means stop or restart.
"""

import asyncio
from collections.abc import Callable

from vllmd.core.states import ALIVE, State
from vllmd.core.world import World
from vllmd.edge.systemd import Given, Unit, pending_job
from vllmd.units import count

EXTEND_EVERY, EXTEND_BY = 1.0, 5.0  # seconds; the core's own deadlines bound how often
RESTARTS = frozenset({"restart", "try-restart"})


class Ties:
    """The daemon's side of its service manager; without one everything here does nothing."""

    def __init__(self, given: Given, unit: Unit | None) -> None:
        self.notify, self.watchdog, self.unit = given.notify, given.watchdog, unit
        self._fed = float("-inf")

    @property
    def supervised(self) -> bool:
        """Whether somebody starts us again when we fail."""
        return self.notify.active

    @property
    def user_cgroup(self) -> str | None:
        """The cgroup of the service that we are, if it is one of a user's own manager."""
        return self.unit.cgroup if self.unit is not None and self.unit.user else None

    def tell(self, world: World) -> None:
        """One line on how things are."""
        self.notify.status(summary(world))

    def feed(self, now: float) -> None:
        """The loop that decides is alive: to be called by it, and by nobody else."""
        if self.watchdog is not None and now - self._fed >= self.watchdog / 4:
            self._fed = now
            self.notify.watchdog()

    async def beat(self, nudge: Callable[[], None]) -> None:
        """Have the loop come by often enough, were nothing to happen."""
        while self.watchdog is not None:
            nudge()
            await asyncio.sleep(self.watchdog / 4)

    async def extend(self, world: World) -> None:
        """While everything is ended: more time, and what it is for."""
        while True:
            self.notify.extend(EXTEND_BY)
            self.tell(world)
            await asyncio.sleep(EXTEND_EVERY)

    async def is_restart(self) -> bool:
        """Whether systemd ends us only to start us again: then the models go on."""
        return self.unit is not None and await pending_job(self.unit) in RESTARTS


def summary(world: World) -> str:
    """ "2 of 3 models up, 1 starting, 1 failed"; at the end "ending: 2 models left"."""
    states = [inst.state for inst in world.instances.values()]
    if world.closing:
        return f"ending: {count(sum(state in ALIVE for state in states), 'model')} left"
    moving = tuple(state for state in State if state not in (State.READY, State.STOPPED))
    parts = [f"{states.count(state)} {state}" for state in moving if state in states]
    return ", ".join([f"{states.count(State.READY)} of {count(len(states), 'model')} up", *parts])
