"""Requests as the core sees them: lines that wait for a model, engines that are in use, and those that nobody needs.

The gateway tells edges only (Wanted, Used); a request for a model that is up is never an event.
"""

from vllmd.core import room, sleep, starts, stops
from vllmd.core.health import arm
from vllmd.core.states import State
from vllmd.core.victims import heat, up_since
from vllmd.core.waking import rouse
from vllmd.core.world import Instance, World
from vllmd.events import Used, Wanted
from vllmd.spec import Cause, Remedy
from vllmd.units import span

TTL = "(ttl)"  # in the place of whom it makes room for: nobody, it was idle for too long


def wanted(world: World, event: Wanted, now: float) -> None:
    """A line begins, changes or is empty."""
    inst = next(iter(world.of(event.model)), None)
    if inst is None:
        return  # removed: the gateway knows the configuration
    began = not inst.line and event.waiting > 0
    inst.line, inst.line_since, inst.line_priority = event.waiting, event.since, event.priority
    if event.waiting:
        serve(world, inst, now)
        if began and (inst.state is State.ASLEEP or (inst.state is State.WAITING and not inst.inspecting)):
            starts.pump(world, now)
    elif inst.state is State.WAITING and not inst.inspecting:
        inst.claim = {}
        starts.pump(world, now)
    elif inst.state is State.ASLEEP:
        rouse(world, inst, now)  # or rather let it sleep
        starts.pump(world, now)


def serve(world: World, inst: Instance, now: float) -> None:
    """Somebody waits for it: start it if it is down, or say why not."""
    spec = world.settings.models.get(inst.spec.name)
    if world.closing or spec is None:
        text = "vllmd is shutting down" if world.closing else f"{inst.id} was removed from the configuration"
        world.turn_away(inst, Cause("closing" if world.closing else "removed", text, "going"))
        return
    match inst.state:
        case State.STOPPED if not spec.on_demand:
            text = f"{inst.id} is stopped, and no request starts it (on_demand = false)"
            world.turn_away(inst, Cause("stopped", text, "stopped", (Remedy(f"vllmctl start {inst.id}"),)))
        case State.STOPPED:
            starts.want(world, inst, now, patient=True, spec=spec, by_demand=True)
        case State.FAILED:
            failed(world, inst, now)


def failed(world: World, inst: Instance, now: float) -> None:
    """One that failed is tried again for a request, but not for each: what may heal gets its time."""
    cause = inst.cause or Cause("failed", f"{inst.id} failed", "failed")
    rest = inst.since + inst.spec.restart.backoff_max - now
    if not cause.heals or not inst.spec.on_demand:
        world.turn_away(inst, cause)
    elif rest > 0:
        world.turn_away(inst, cause, rest)
    else:
        inst.failures.clear()
        starts.want(world, inst, now, patient=True, spec=world.settings.models[inst.spec.name], by_demand=True)


def used(world: World, inst: Instance, event: Used, now: float) -> None:
    """What the gateway has at it."""
    if inst.state is not State.READY:
        inst.under_way = event.running
        return
    new = max(0, event.begun - inst.begun)
    if new:
        inst.heat, inst.heat_at = heat(inst, now) + new, now
    if new or event.running != inst.under_way:
        inst.used_at = max(inst.used_at, event.at)
    inst.under_way, inst.begun = event.running, event.begun
    if inst.shut_for:
        inst.told_empty = not event.running  # what follows, Core._tend sees
    else:
        arm(inst)
        if not event.running and any(other.line for other in world.instances.values()):
            starts.pump(world, now)


def leave_when_empty(world: World, inst: Instance, now: float) -> None:
    """One that is shut ends when nothing is under way, nor came past the gateway, or when it had time enough."""
    late = now >= inst.shut_at + inst.spec.max_drain
    if not late and not (inst.told_empty and not inst.direct):
        return
    if not late and sleep.may_doze(world, inst):
        stops.doze(world, inst, now, why_shut(inst, now))
    else:
        stops.drain(world, inst, now, why_shut(inst, now) + (", its time is over" if late else ""))


def why_shut(inst: Instance, now: float | None = None) -> str:
    """Why a ready one takes no requests."""
    if inst.shut_for == sleep.REST:
        return "an operator wants it asleep"
    if inst.shut_for != TTL:
        return f"makes room for {inst.shut_for}"
    return f"idle for {span(now - (inst.used_at or up_since(inst) or now))}" if now is not None else "idle for too long"


def rest(world: World, inst: Instance, now: float) -> None:
    """It was idle for its ttl."""
    world.count("idle_stops", inst.spec.name)
    room.send_away(world, inst, TTL, now)
