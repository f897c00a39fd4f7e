"""The core: events in, commands out. All that vllmd decides is decided in here, at one place, one event at a time.

It knows no clock (`now` is an argument), no loop, file, socket, process or log. Reports of attempts that are over are
dropped by comparing their number.
"""

from collections.abc import Mapping

from vllmd.core import adoption, demand, health, loans, reload, room, sleep, starts, stops, trial, usage, waking, wishes
from vllmd.core.launch import Places
from vllmd.core.ledger import Ledger
from vllmd.core.proofs import under_trial
from vllmd.core.refusals import never_fit
from vllmd.core.states import ALIVE, State
from vllmd.core.world import Instance, World
from vllmd.events import (
    Alive,
    Boot,
    Broken,
    CanaryBack,
    Command,
    DevicesRead,
    Doze,
    Event,
    Finish,
    Forget,
    Gone,
    Inspected,
    KillTree,
    Lend,
    Printed,
    Progress,
    Pulse,
    Ready,
    Reload,
    Restart,
    Shutdown,
    Slept,
    Spawned,
    Start,
    Stop,
    SwapTest,
    Used,
    Wanted,
    Woke,
)
from vllmd.facts import Learned
from vllmd.spec import ModelSpec, Settings

Report = (
    Inspected | Spawned | Alive | Progress | Printed | Ready | Pulse | CanaryBack | Broken | Gone | Used | Slept | Woke
)


class Core:
    """Holds the world and changes it, event by event."""

    def __init__(self, settings: Settings, places: Places, learned: Mapping[str, Learned] | None = None) -> None:
        self.world = World(settings, places, Ledger(settings.devices), learned=dict(learned or {}))
        self._due: float | None = None
        for spec in settings.models.values():
            self.world.instances[spec.name] = Instance(spec.name, spec)

    def handle(self, event: Event | None, now: float) -> list[Command]:
        """All that follows from one event (None: the timer fired) at `now`. The caller does the commands in order.

        Raises IllegalMove on a bug; the caller logs `world.story` and exits.
        """
        world = self.world
        if self._due is not None and now - self._due > health.OVERSLEPT < now - world.now:
            health.overslept(world, now - world.now)
        world.now = now
        match event:
            case None:
                self._deadlines(now)
            case (
                Inspected()
                | Spawned()
                | Alive()
                | Progress()
                | Printed()
                | Ready()
                | Pulse()
                | CanaryBack()
                | Broken()
                | Gone()
                | Used()
                | Slept()
                | Woke()
            ):
                inst = world.instances.get(event.instance)
                if inst is not None and inst.attempt == event.attempt:
                    self._report(inst, event, now)
            case Wanted():
                demand.wanted(world, event, now)
            case Lend():
                loans.lend(world, event, now)
            case Doze():
                for inst in wishes.find(world, event.model, event.ticket):
                    sleep.wish(world, inst, event, now)
            case SwapTest():
                for inst in wishes.find(world, event.model, event.ticket):
                    trial.begin(world, inst, event, now)
            case DevicesRead():
                usage.devices_read(world, event, now)
            case Boot():
                self._boot(event, now)
            case Start():
                wishes.start(world, event, now)
            case Stop():
                wishes.stop(world, event, now)
            case Restart():
                wishes.restart(world, event, now)
            case Reload():
                reload.reload(world, event, now)
            case Shutdown():
                self._shutdown(now)
        self._tend(now)
        self._drop_removed()
        if world.closing and not world.finished and not any(i.state in ALIVE for i in world.instances.values()):
            world.finished = True
            world.emit(Finish())
        # First what must be on disk before the rest may happen.
        saves: list[Command] = [adoption.keep(world, i) for i in world.instances.values() if i.id in world.dirty]
        world.dirty.clear()
        commands, world.out = saves + world.out, []
        dues = [i.deadline for i in world.instances.values() if i.deadline is not None]
        self._due = min(dues + ([loan.until for loan in world.ledger.loans]), default=None)
        return commands

    def next_deadline(self) -> float | None:
        """When the timer must fire next, or None."""
        return self._due

    def _report(self, inst: Instance, event: Report, now: float) -> None:
        world = self.world
        match event:
            case Inspected():
                starts.inspected(world, inst, event, now)
            case Spawned():
                inst.pid, inst.pid_start = event.pid, event.start
                inst.pids = (event.pid,)
                world.dirty.add(inst.id)
            case Alive():
                starts.alive(inst, now)
            case Progress():
                starts.progressed(inst, event, now)
            case Printed():
                measuring = inst.measuring
                starts.printed(world, inst, event, now)
                if measuring and not inst.measuring:
                    stops.release_drains(world, now)
                    starts.pump(world, now)
            case Ready():
                health.ready(world, inst, event, now)
            case Pulse():
                health.pulse(inst, event, now)
            case CanaryBack():
                health.canary_back(inst, event, now)
            case Used():
                demand.used(world, inst, event, now)
            case Slept():
                sleep.slept(world, inst, event, now)
            case Woke():
                sleep.woke(world, inst, event, now)
            case Broken():
                stops.broken(world, inst, event, now)
            case Gone():
                stops.gone(world, inst, event, now)

    def _deadlines(self, now: float) -> None:
        """Whoever's time has come; what it means follows from the state. Only when the timer fires, so that every state that
        an event leads to can be seen, were it for a moment."""
        world = self.world
        loans.expire(world, now)
        for inst in list(world.instances.values()):
            if inst.deadline is None or inst.deadline > now:
                continue
            match inst.state:
                case State.WAITING if inst.inspecting:
                    starts.inspect_slow(world, inst, now)
                case State.WAITING:
                    starts.waited_long(world, inst, now)
                case State.STARTING:
                    health.stalled(world, inst, now)
                case State.READY:
                    self._ready_due(inst, now)
                case State.DOZING | State.WAKING:
                    sleep.overdue(world, inst, now)
                case State.ASLEEP:
                    waking.waited_long(world, inst, now)
                    starts.pump(world, now)
                case State.DRAINING if inst.drain_held:
                    stops.terminate(world, inst, now)
                case State.DRAINING:
                    stops.end(world, inst, now, "drain time is over")
                case State.STOPPING if inst.gone:
                    stops.give_up_settling(world, inst, now)
                case State.STOPPING:
                    inst.deadline = now + stops.KILL_AGAIN
                    world.emit(KillTree(inst.id, inst.attempt, inst.crashed))
                case State.BACKOFF:
                    inst.restarts += 1
                    starts.want(world, inst, now, patient=True, spec=world.settings.models.get(inst.spec.name))

    def _tend(self, now: float) -> None:
        """Whatever the event was: nobody stands in line at a model that rests, nobody is shut for one that needs no room,
        what is empty goes."""
        world, shut = self.world, False
        for inst in list(world.instances.values()):
            if under_trial(inst):
                trial.go_on(world, inst, now)
            elif inst.shut_for and inst.state is State.ASLEEP:
                sleep.leave(world, inst, now)
            elif inst.shut_for and inst.state is State.READY:
                demand.leave_when_empty(world, inst, now)
            shut |= bool(inst.shut_for)
            if inst.line and inst.state in (State.STOPPED, State.FAILED):
                demand.serve(world, inst, now)
        if shut:
            for inst in room.reopen(world, now):
                health.arm(inst)

    def _ready_due(self, inst: Instance, now: float) -> None:
        """One that serves: nobody has used it, or it must prove that it lives. `_tend` sees whether it must go."""
        idle_until = health.ttl_due(inst)
        if idle_until is not None and now >= idle_until:
            demand.rest(self.world, inst, now)
        elif now >= inst.alive_at:
            health.silent(self.world, inst, now)
        else:
            health.arm(inst)

    def _boot(self, event: Boot, now: float) -> None:
        world = self.world
        for inst in world.instances.values():
            inst.since = now
        for survivor in event.survivors:
            record = survivor.record
            # A model that is configured no more is known by its record, until it is ended.
            inst = world.instances.setdefault(record.id, Instance(record.id, ModelSpec(record.model, "")))
            adoption.restore(world, inst, survivor, now)
        known = {survivor.record.id for survivor in event.survivors}
        impossible = never_fit(world, world.settings)
        for inst in world.instances.values():
            if inst.id in known or world.closing:
                continue
            if inst.id in impossible:
                inst.wanted = inst.spec.autostart  # as soon as another configuration makes it possible
                starts.give_up(world, inst, impossible[inst.id], now)
            elif inst.spec.autostart:
                starts.want(world, inst, now, patient=True)

    def _shutdown(self, now: float) -> None:
        """End everything; a second call skips the drains."""
        again, self.world.closing = self.world.closing, True
        for inst in list(self.world.instances.values()):
            if inst.drain_held:
                stops.terminate(self.world, inst, now)
            if inst.state is not State.STOPPED:
                stops.stop(self.world, inst, now, at_once=again)

    def _drop_removed(self) -> None:
        """Forget instances that are no longer configured, once they have come to rest."""
        world = self.world
        for inst in list(world.instances.values()):
            if inst.spec.name not in world.settings.models and inst.state in (State.STOPPED, State.FAILED):
                world.answer(inst, 409, f"{inst.id} was removed from the configuration")
                world.ledger.release(inst.id)
                del world.instances[inst.id]
                world.emit(Forget(inst.id))
