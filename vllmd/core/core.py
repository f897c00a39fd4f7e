"""The core: events in, commands out. All that vllmd decides is decided in here, at one place, one event at a time.

It knows no clock (`now` is an argument), no loop, file, socket, process or log. Reports of attempts that are over are
dropped by comparing their number.
"""

import difflib
from collections.abc import Mapping, Sequence

from vllmd.core import adoption, demand, health, loans, reload, room, starts, stops, usage
from vllmd.core.launch import Places
from vllmd.core.ledger import Ledger
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
    Spawned,
    Start,
    Stop,
    Used,
    Wanted,
)
from vllmd.facts import Learned
from vllmd.spec import ModelSpec, Settings

Report = Inspected | Spawned | Alive | Progress | Printed | Ready | Pulse | CanaryBack | Broken | Gone | Used


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
            ):
                inst = world.instances.get(event.instance)
                if inst is not None and inst.attempt == event.attempt:
                    self._report(inst, event, now)
            case Wanted():
                demand.wanted(world, event, now)
            case Lend():
                loans.lend(world, event, now)
            case DevicesRead():
                usage.devices_read(world, event, now)
            case Boot():
                self._boot(event, now)
            case Start():
                self._start(event, now)
            case Stop():
                self._stop(event, now)
            case Restart():
                self._restart(event, now)
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
        """Whatever the event was: nobody stands in line at a model that rests, nobody is shut for one that needs no room."""
        world, shut = self.world, False
        for inst in world.instances.values():
            shut |= bool(inst.shut_for)
            if inst.line and inst.state in (State.STOPPED, State.FAILED):
                demand.serve(world, inst, now)
        if shut:
            for inst in room.reopen(world, now):
                health.arm(inst)

    def _ready_due(self, inst: Instance, now: float) -> None:
        """One that serves: it has had time enough to empty, nobody has used it, or it must prove that it lives."""
        idle_until = health.ttl_due(inst)
        if inst.shut_for and now >= inst.shut_at + inst.spec.max_drain:
            demand.leave_when_empty(self.world, inst, now)
        elif idle_until is not None and now >= idle_until:
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

    def _find(self, model: str, ticket: int | None) -> Sequence[Instance]:
        """The model's instances; an unknown name is answered with the nearest known one."""
        found = list(self.world.of(model))
        if not found:
            near = difflib.get_close_matches(model, self.world.settings.models, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            self.world.tell(ticket, 404, f"there is no model {model!r}{hint}")
        return found

    def _start(self, event: Start, now: float) -> None:
        world = self.world
        for inst in self._find(event.model, event.ticket):
            spec = world.settings.models.get(inst.spec.name)
            if world.closing:
                world.tell(event.ticket, 503, "vllmd is shutting down")
                continue
            if spec is None:
                world.tell(event.ticket, 409, f"{inst.id} was removed from the configuration and is {inst.state}")
                continue
            match inst.state:
                case State.STOPPED | State.FAILED | State.BACKOFF:
                    again = inst.state is State.BACKOFF  # it would start by itself in a moment: only sooner
                    if not again:
                        inst.failures.clear()
                    if event.ticket is not None:
                        inst.tickets.append(event.ticket)
                    starts.want(world, inst, now, patient=again, spec=spec)
                case State.WAITING:
                    inst.by_demand = False
                    if event.ticket is not None:
                        inst.tickets.append(event.ticket)
                    if not inst.inspecting:
                        world.answer(inst, 202, f"{inst.id}: {inst.waiting_text}")
                case State.STARTING:
                    world.tell(event.ticket, 202, f"{inst.id} is starting already")
                case State.READY if inst.shut_for:
                    inst.wanted = inst.insisted = True
                    world.tell(
                        event.ticket, 202, f"{inst.id} ends ({demand.why_shut(inst)}) and will start again after that"
                    )
                case State.READY:
                    world.tell(event.ticket, 200, f"{inst.id} is ready already")
                case State.DRAINING | State.STOPPING:
                    inst.wanted = inst.insisted = True
                    world.dirty.add(inst.id)
                    world.tell(event.ticket, 202, f"{inst.id} is stopping and will start again after that")

    def _stop(self, event: Stop, now: float) -> None:
        for inst in self._find(event.model, event.ticket):
            status, text = stops.stop(self.world, inst, now, at_once=event.now)
            self.world.tell(event.ticket, status, text)
            starts.pump(self.world, now)

    def _restart(self, event: Restart, now: float) -> None:
        for inst in self._find(event.model, event.ticket):
            match inst.state:
                case State.READY if not self.world.closing:
                    inst.wanted = True
                    stops.drain(self.world, inst, now, "restart")
                    self.world.tell(event.ticket, 202, f"{inst.id}: draining, then starting again")
                case State.STARTING if not self.world.closing:
                    inst.wanted = True
                    stops.end(self.world, inst, now, "restart")
                    self.world.tell(event.ticket, 202, f"{inst.id}: stopping, then starting again")
                case _:
                    self._start(Start(event.model, event.ticket), now)

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
