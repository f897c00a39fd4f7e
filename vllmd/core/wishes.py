"""What an operator wants: the event Start, Stop or Restart, for whatever state its model is in. Each ticket is answered."""

import difflib
from collections.abc import Sequence

from vllmd.core import demand, starts, stops, waking
from vllmd.core.proofs import under_trial
from vllmd.core.states import State
from vllmd.core.world import Instance, World
from vllmd.events import Restart, Start, Stop


def find(world: World, model: str, ticket: int | None) -> Sequence[Instance]:
    """The model's instances; an unknown name is answered with the nearest known one."""
    found = list(world.of(model))
    if not found:
        near = difflib.get_close_matches(model, world.settings.models, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        world.tell(ticket, 404, f"there is no model {model!r}{hint}")
    return found


def start(world: World, event: Start, now: float) -> None:
    """Up, or awake."""
    for inst in find(world, event.model, event.ticket):
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
            case State.STARTING | State.WAKING:
                world.tell(event.ticket, 202, f"{inst.id} is {inst.state} already")
            case State.DOZING:
                inst.roused_at = now
                world.tell(event.ticket, 202, f"{inst.id} falls asleep, and wakes after that")
            case State.ASLEEP:
                inst.roused_at = now
                if event.ticket is not None:
                    inst.tickets.append(event.ticket)
                waking.rouse(world, inst, now)
            case State.READY if under_trial(inst):
                world.tell(event.ticket, 202, f"{inst.id} is up, and is being tested")
            case State.READY if inst.shut_for:
                inst.wanted = inst.insisted = True
                inst.roused_at = now if inst.dozes else 0.0
                world.tell(
                    event.ticket, 202, f"{inst.id} ends ({demand.why_shut(inst)}) and will start again after that"
                )
            case State.READY:
                world.tell(event.ticket, 200, f"{inst.id} is ready already")
            case State.DRAINING | State.STOPPING:
                inst.wanted = inst.insisted = True
                world.dirty.add(inst.id)
                world.tell(event.ticket, 202, f"{inst.id} is stopping and will start again after that")


def stop(world: World, event: Stop, now: float) -> None:
    """Down."""
    for inst in find(world, event.model, event.ticket):
        status, text = stops.stop(world, inst, now, at_once=event.now)
        world.tell(event.ticket, status, text)
        starts.pump(world, now)


def restart(world: World, event: Restart, now: float) -> None:
    """Down and up."""
    for inst in find(world, event.model, event.ticket):
        match inst.state:
            case State.READY if not world.closing:
                inst.wanted = True
                stops.drain(world, inst, now, "restart")
                world.tell(event.ticket, 202, f"{inst.id}: draining, then starting again")
            case State.STARTING | State.DOZING | State.ASLEEP | State.WAKING if not world.closing:
                inst.wanted = True
                stops.end(world, inst, now, "restart")
                world.tell(event.ticket, 202, f"{inst.id}: stopping, then starting again")
            case _:
                start(world, Start(event.model, event.ticket), now)
