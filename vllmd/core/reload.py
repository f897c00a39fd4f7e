"""A new configuration for a running world: only what must is restarted."""

from vllmd.core import health, starts, stops
from vllmd.core.proofs import called_for
from vllmd.core.refusals import TOO_BIG, never_fit
from vllmd.core.states import Move, State
from vllmd.core.world import Instance, World
from vllmd.events import Reload
from vllmd.spec import ModelSpec


def reload(world: World, event: Reload, now: float) -> None:
    """Take over a checked configuration."""
    old, new = world.settings, event.settings
    world.settings, world.ledger.rules = new, event.settings.devices
    for inst in list(world.instances.values()):
        spec = new.models.get(inst.spec.name)
        if spec is None:
            stops.stop(world, inst, now)
        elif inst.spec.name not in old.models:
            # It was removed, is still on its way down, and is configured again: as if it came new, after that.
            inst.wanted, inst.insisted = spec.autostart and not world.closing, False
            world.dirty.add(inst.id)
        elif inst.spec.name in event.restart:
            changed(world, inst, spec, now)
        elif inst.state not in (State.DRAINING, State.STOPPING):
            inst.spec = spec
            if inst.state is State.READY:
                health.arm(inst)
    reconsider(world, now)
    for spec in new.models.values():
        if spec.name not in world.instances:
            world.instances[spec.name] = inst = Instance(spec.name, spec, since=now)
            if spec.autostart and not world.closing:
                starts.want(world, inst, now, patient=True)
    order = {name: place for place, name in enumerate(new.models)}
    world.instances = dict(sorted(world.instances.items(), key=lambda item: order.get(item[0], len(order))))
    world.tell(event.ticket, 200, "configuration reloaded")
    starts.pump(world, now)


def changed(world: World, inst: Instance, spec: ModelSpec, now: float) -> None:
    """Something changed that a running engine cannot follow."""
    match inst.state:
        case State.READY:
            stops.drain(world, inst, now, "its configuration changed")
        case State.STARTING | State.DOZING | State.ASLEEP | State.WAKING:
            inst.wanted |= called_for(inst)
            stops.end(world, inst, now, "its configuration changed")
        case State.WAITING:
            starts.follow(world, inst, now, spec)
        case State.FAILED if inst.wanted and not world.closing:
            starts.want(world, inst, now, patient=True, spec=spec)
        case State.STOPPED | State.FAILED | State.BACKOFF:
            inst.spec = spec


def reconsider(world: World, now: float) -> None:
    """Those that could never fit and now may, because the devices' limits changed."""
    judged = [i for i in world.instances.values() if i.state is State.FAILED and i.cause and i.cause.kind == TOO_BIG]
    if not judged:
        return
    impossible = never_fit(world, world.settings)
    for inst in judged:
        if inst.id in impossible or world.closing:
            continue
        if inst.wanted:
            starts.want(world, inst, now, patient=True)
        else:
            inst.cause = None
            world.move(inst, Move.CANCEL, now, "it may fit now")
