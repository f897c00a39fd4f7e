"""Waking one that sleeps: like a start it needs its memory back, waits for its turn, and has others make room for its line.

It wakes where it is. Where that takes others' time, and a start elsewhere would not, its sleep is given up.
"""

from vllmd.core.failing import set_cause
from vllmd.core.ledger import device_label
from vllmd.core.placing import Blocked, Placed, find_bed, find_starts, freeing
from vllmd.core.proofs import wanted_awake
from vllmd.core.refusals import no_room
from vllmd.core.room import Later, make_room, timeline
from vllmd.core.states import Move, State
from vllmd.core.waiting import busy_word, hold_in_line, note_cause
from vllmd.core.world import Instance, World
from vllmd.events import Wake
from vllmd.spec import Cause, level_of
from vllmd.units import gib, span

ELSEWHERE = "(elsewhere)"  # in the place of whom it is ended for: its own line


def rouse(world: World, inst: Instance, now: float) -> None:
    """Wake one that sleeps, have it wait, or say why not. One that nobody waits for sleeps on."""
    if not wanted_awake(inst):
        rest(world, inst)
        return
    if inst.queue_until <= now:
        inst.queue_until = now + inst.spec.queue_timeout
    inst.deadline = inst.queue_until
    outcome = find_bed(world, inst)
    match outcome:
        case Placed() if outcome.busy:
            inst.waits_for = tuple(sorted(outcome.busy))
            label = ", ".join(map(device_label, outcome.devices))
            names = ", ".join(inst.waits_for)
            inst.waiting_text = f"waiting for {label}: {names} {busy_word(world, outcome.busy)}"
            world.answer(inst, 202, f"{inst.id}: {inst.waiting_text}")
        case Placed():
            wake(world, inst, now)
        case Blocked():
            blocked(world, inst, outcome, now)
        case Cause():
            inst.waits_for, inst.waiting_text = (), f"waiting for a device: {outcome.text.partition(': ')[2]}"
            note_cause(world, inst, outcome)
            world.answer(inst, 202, f"{inst.id}: {inst.waiting_text}")


def rest(world: World, inst: Instance) -> None:
    """Nobody waits for it any more."""
    inst.claim, inst.made_by, inst.deadline, inst.queue_until = {}, (), None, 0.0
    inst.waits_for, inst.waiting_text, inst.cause = (), "", None
    world.answer(inst, 409, f"{inst.id} sleeps on: it is not wanted any more")


def blocked(world: World, inst: Instance, outcome: Blocked, now: float) -> None:
    """What it gave up is in use. For requests others make room; an operator is told, as at a start."""
    cause = no_room(world, outcome.asked)
    coming = freeing(world, outcome)
    if not inst.line:
        if inst.roused_at and not coming and not inst.accepted:
            inst.roused_at = 0.0
            world.answer(inst, 409, cause.text, cause)
            rest(world, inst)
            set_cause(world, inst, cause, now)
        else:
            hold_in_line(world, inst, outcome, cause, coming)
        return
    found = make_room(world, inst, now)
    if isinstance(found, Later | Cause) and fits_elsewhere(world, inst):
        inst.shut_for = ELSEWHERE  # ended as soon as this event is handled
        return
    match found:
        case Cause():
            world.turn_away(inst, found)
            rest(world, inst)
        case Later():
            hold_in_line(world, inst, outcome, cause, ())
            inst.waiting_text += "; those that run were used a moment ago, or are busy"
            inst.deadline = min(inst.queue_until, max(found.at, now))
        case _ if isinstance(find_bed(world, inst), Placed):  # what made room had no processes
            rouse(world, inst, now)
        case _:
            hold_in_line(world, inst, outcome, cause, found)


def fits_elsewhere(world: World, inst: Instance) -> bool:
    """Whether it could be started on other devices at once."""
    return any(
        isinstance(each, Placed) and not each.busy and not {d.id for d in each.devices} & set(inst.full)
        for each in find_starts(world, inst)
    )


def wake(world: World, inst: Instance, now: float) -> None:
    """Promise it again what it had, and tell its engine."""
    kept = sum(world.ledger.held.get(inst.id, {}).values())
    world.ledger.widen(inst.id, inst.full)
    if inst.made_by:
        world.note("swap", timeline(world, inst, now), inst)
    world.answer(inst, 202, f"{inst.id}: waking")
    inst.wanted, inst.accepted, inst.evicted, inst.cause = True, False, False, None
    inst.roused_at, inst.queue_until, inst.waits_for, inst.waiting_text = 0.0, 0.0, (), ""
    more = sum(inst.full.values()) - kept
    world.move(inst, Move.WAKE, now, f"slept {span(now - inst.slept_at)}, takes {gib(more)} back")
    inst.deadline = now + inst.spec.start_stall
    world.emit(Wake(inst.id, inst.attempt, level_of(inst.spec)))


def waited_long(world: World, inst: Instance, now: float) -> None:
    """`queue_timeout` is over, or somebody may be asked now to make room. What it waits for is looked at anew by `pump`."""
    if now >= inst.queue_until and inst.line:
        world.note("waiting", f"to wake: {inst.waiting_text}", inst, "warning")
    inst.queue_until = now + inst.spec.queue_timeout if now >= inst.queue_until else inst.queue_until
    inst.deadline = inst.queue_until if wanted_awake(inst) else None


def sleepers(world: World) -> list[Instance]:
    """Those that sleep and that somebody waits for."""
    return [i for i in world.instances.values() if i.state is State.ASLEEP and wanted_awake(i)]
