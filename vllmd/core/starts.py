"""The way up: want -> inspect -> place -> spawn -> ready.

An instance is placed only when three things hold at once: its need fits what is left, every device it would use
answers, and nobody is in the middle of measuring (or moving, if it will measure itself) on them.
"""

from collections.abc import Mapping
from dataclasses import replace

from vllmd.core.failing import retry_or_give_up, set_cause
from vllmd.core.launch import launch
from vllmd.core.ledger import device_label
from vllmd.core.need import learned_key
from vllmd.core.placing import Blocked, Placed, find_place, freeing, will_measure
from vllmd.core.refusals import no_room
from vllmd.core.room import Later, make_room, timeline
from vllmd.core.states import Move, State
from vllmd.core.victims import turn
from vllmd.core.waiting import busy_word, hold_in_line, note_cause
from vllmd.core.waking import rouse, sleepers
from vllmd.core.world import Instance, World
from vllmd.events import Inspect, Inspected, Printed, Progress, Spawn
from vllmd.facts import Figures
from vllmd.spec import Cause, ModelSpec, Remedy
from vllmd.units import gib, span

SOCKET_LONGEST = 107  # bytes, the kernel's sun_path
NO_ROOM = "no-room"  # the kind of cause that passes with others' use
INSPECT_LIMIT = 20.0  # seconds; preflight takes well under one, but a dead network file system may hold it


def want(
    world: World,
    inst: Instance,
    now: float,
    *,
    patient: bool,
    spec: ModelSpec | None = None,
    move: Move = Move.WANT,
    by_demand: bool = False,
) -> None:
    """Begin a start: a new attempt, inspected first. `by_demand`: for requests that wait, and for nobody else."""
    if spec is not None:
        inst.spec = spec
    inst.wanted, inst.patient, inst.by_demand = True, patient, by_demand
    inst.evicted = inst.returns = False
    inst.accepted = inst.insisted = inst.crashed = False
    world.next_attempt(inst)
    world.move(inst, move, now)
    begin_inspection(world, inst, now)


def begin_inspection(world: World, inst: Instance, now: float) -> None:
    """Look at its files."""
    inst.inspecting, inst.found, inst.waits_for = True, None, ()
    inst.waiting_text = "checking files, flags, port and memory"
    inst.deadline = now + INSPECT_LIMIT
    world.emit(Inspect(inst.id, inst.attempt, inst.spec.name))


def follow(world: World, inst: Instance, now: float, spec: ModelSpec) -> None:
    """A new configuration for one that waits: inspected anew, in its place in line, for those who asked for it."""
    inst.spec = spec
    world.next_attempt(inst)
    world.dirty.add(inst.id)
    begin_inspection(world, inst, now)


def inspected(world: World, inst: Instance, event: Inspected, now: float) -> None:
    """Preflight is back: refuse what cannot start, else try to place it."""
    if inst.state is not State.WAITING or not inst.inspecting:
        return
    inst.inspecting, inst.found = False, event.found
    if event.problem is not None:
        refuse(world, inst, event.problem, now)
        return
    inst.deadline = inst.queue_until = now + inst.spec.queue_timeout
    place(world, inst, now)


def refuse(world: World, inst: Instance, cause: Cause, now: float) -> None:
    """Preflight said no. A port that is taken or a disk that is full may be free again: an automatic start tries again, an
    operator is told."""
    if not (cause.heals and inst.patient):
        give_up(world, inst, cause, now)
        return
    world.answer(inst, 422, cause.text, cause)
    set_cause(world, inst, cause, now)
    inst.broke_at = now
    retry_or_give_up(world, inst, cause, now, now)


def inspect_slow(world: World, inst: Instance, now: float) -> None:
    """Its files do not answer."""
    text = f"cannot start {inst.id}: its files could not be checked in time (a file system that hangs?)"
    inst.inspecting = False
    refuse(world, inst, Cause("inspect-slow", text, "files do not answer"), now)


def give_up(world: World, inst: Instance, cause: Cause, now: float) -> None:
    """A start that cannot be: failed, everybody told."""
    world.answer(inst, 422, cause.text, cause)
    set_cause(world, inst, cause, now)
    world.move(inst, Move.GIVE_UP, now, cause.text)


def pump(world: World, now: float) -> None:
    """Try all who wait, each in its turn. One that cannot be placed does not hold up those that fit elsewhere. Whom there was
    no room for, and would be now, is not told so any more."""
    waiting = [i for i in world.instances.values() if i.state is State.WAITING and not i.inspecting] + sleepers(world)
    for inst in sorted(waiting, key=lambda i: turn(i, now)) if waiting else ():
        if inst.state is State.WAITING and not inst.inspecting:
            place(world, inst, now)
        elif inst.state is State.ASLEEP:
            rouse(world, inst, now)
    for inst in world.instances.values():
        refused = inst.state is State.STOPPED and inst.found and inst.cause and inst.cause.kind == NO_ROOM
        if refused and isinstance(find_place(world, inst), Placed):
            inst.cause = None


def place(world: World, inst: Instance, now: float) -> bool:
    """Admit a waiting instance, keep it in line, or refuse it. True when all that it waits for is a neighbour's move."""
    outcome = find_place(world, inst)
    match outcome:
        case Cause() if outcome.heals and (inst.patient or inst.accepted):
            # What holds it up may pass, and nobody stands at the door. It keeps what it was promised.
            inst.waits_for, inst.waiting_text = (), f"waiting for a device: {outcome.text.partition(': ')[2]}"
            note_cause(world, inst, outcome)
        case Cause():
            give_up(world, inst, outcome, now)
        case Blocked():
            world.ledger.release(inst.id)
            coming = freeing(world, outcome)
            cause = no_room(world, outcome.asked)
            if inst.line:
                wait_for_room(world, inst, outcome, cause, now)
            elif inst.by_demand and not inst.tickets:
                inst.wanted = False
                world.move(inst, Move.CANCEL, now, "nobody waits for it any more")
            elif inst.patient or inst.accepted or coming:
                hold_in_line(world, inst, outcome, cause, coming)
            else:
                inst.wanted = False
                set_cause(world, inst, cause, now)
                world.answer(inst, 409, cause.text, cause)
                world.move(inst, Move.CANCEL, now, cause.text)
        case Placed() if outcome.busy:
            names = ", ".join(sorted(outcome.busy))
            inst.waits_for = tuple(sorted(outcome.busy))
            label = ", ".join(map(device_label, outcome.devices))
            inst.waiting_text = f"waiting for {label}: {names} {busy_word(world, outcome.busy)}"
            inst.need, inst.devices = outcome.need, tuple(d.id for d in outcome.devices)
            inst.accepted = True
            world.answer(inst, 202, f"{inst.id}: {inst.waiting_text}")
            return True
        case Placed():
            admit(world, inst, outcome, now)
    return False


def wait_for_room(world: World, inst: Instance, blocked: Blocked, cause: Cause, now: float) -> None:
    """Requests wait for it: others make room, now or as soon as they may be asked. Where that cannot help nobody is kept
    waiting."""
    found = make_room(world, inst, now)
    match found:
        case Cause():
            world.turn_away(inst, found)
            if not inst.by_demand:  # it waits for room anyway
                hold_in_line(world, inst, blocked, cause, ())
                inst.deadline = inst.queue_until
                return
            inst.wanted = False
            set_cause(world, inst, found, now)
            world.answer(inst, 409, found.text, found)
            world.move(inst, Move.CANCEL, now, found.text)
        case Later():
            hold_in_line(world, inst, blocked, cause, ())
            inst.waiting_text += "; those that run were used a moment ago, or are busy"
            inst.deadline = min(inst.queue_until, max(found.at, now))
        case _ if isinstance(find_place(world, inst), Placed):  # what made room had no processes
            place(world, inst, now)
        case _:
            hold_in_line(world, inst, blocked, cause, found)
            inst.deadline = inst.queue_until


def waited_long(world: World, inst: Instance, now: float) -> None:
    """`queue_timeout` is over. A neighbour that starts has its own limits, and an automatic start does not give up what it
    is there for: both wait on. An operator's, accepted because memory was coming free, is told that it did not."""
    if now < inst.queue_until:  # only somebody may be asked now to make room, perhaps for another whose turn is first
        inst.deadline = inst.queue_until
        pump(world, now)
        return
    moves_only = place(world, inst, now)
    if inst.state is not State.WAITING:
        return
    if moves_only or inst.patient:
        if now - inst.since < 2 * inst.spec.queue_timeout:
            world.note("waiting", f"for {span(now - inst.since)} now: {inst.waiting_text}", inst, "warning")
        inst.queue_until = now + inst.spec.queue_timeout
        inst.deadline = inst.queue_until
    else:
        give_up(world, inst, inst.cause or Cause(NO_ROOM, inst.waiting_text, "waited too long"), now)


def admit(world: World, inst: Instance, place: Placed, now: float) -> None:
    """Reserve and spawn."""
    assert inst.found is not None
    devices = tuple(d.id for d in place.devices)
    socket = world.places.runtime / f"{inst.id}.sock"
    if not inst.found.port and len(str(socket)) > SOCKET_LONGEST:
        give_up(world, inst, long_socket(inst, str(socket)), now)
        return
    world.ledger.hold(inst.id, place.parts)
    inst.need, inst.devices = place.need, devices
    inst.key = learned_key(inst.spec, inst.found, place.devices)
    inst.launch = launch(inst.spec, inst.id, inst.attempt, place.need, inst.found, place.devices, world.places)
    inst.measuring = will_measure(place.need, place.devices)
    reset_start(inst, now)
    if inst.made_by:
        world.note("swap", timeline(world, inst, now), inst)
    world.answer(inst, 202, f"{inst.id}: starting")
    sizes = " + ".join(gib(size) for size in dict.fromkeys(place.parts.values()))
    world.move(inst, Move.ADMIT, now, f"{sizes} reserved on {', '.join(map(device_label, place.devices))}")
    inst.deadline = now + inst.spec.start_stall
    world.emit(Spawn(inst.id, inst.attempt, inst.spec.name, inst.launch))


def long_socket(inst: Instance, path: str) -> Cause:
    return Cause(
        "socket-path-too-long",
        f"cannot start {inst.id}: its socket {path} has {len(path)} bytes, a unix socket's path at most {SOCKET_LONGEST}",
        "socket path too long",
        (Remedy('daemon.runtime_dir = "/run/vllmd" (a short path)'), Remedy(f'models.{inst.spec.name}.port = "auto"')),
        heals=False,
    )


def reset_start(inst: Instance, now: float) -> None:
    """Forget everything about earlier attempts that this one must earn anew."""
    inst.started, inst.heard, inst.phase_since = now, now, now
    inst.phase, inst.phase_fraction, inst.phase_note, inst.phases = None, None, "", {}
    inst.figures, inst.learned, inst.peak, inst.over_since = Figures(), False, {}, None
    inst.pid, inst.pid_start, inst.pids, inst.ready_at = None, 0, (), None
    inst.canary_out, inst.canary_works, inst.asked = False, True, None
    inst.running, inst.waiting, inst.tokens, inst.tokens_per_s = 0, 0, 0.0, 0.0
    inst.crashed, inst.gone, inst.verdict, inst.drain_held, inst.leak = False, False, None, False, ""
    inst.hurried, inst.accepted = False, False
    inst.under_way, inst.begun, inst.direct, inst.direct_seen, inst.used_at = 0, 0, 0, 0, 0.0
    inst.shut_for, inst.told_empty = "", False
    inst.disturbed, inst.resumed = False, False
    inst.dozes, inst.full, inst.kept, inst.residual, inst.slept_at = False, {}, {}, {}, 0.0
    inst.waits_for, inst.waiting_text = (), ""


def alive(inst: Instance, now: float) -> None:
    """A sign of life: the stall clock starts anew."""
    if inst.state is State.STARTING:
        inst.heard = now
        inst.deadline = now + inst.spec.start_stall


def progressed(inst: Instance, event: Progress, now: float) -> None:
    """The start got on. Phases only go forward: a late line of an earlier one is a sign of life and nothing more."""
    if inst.state is not State.STARTING:
        return
    alive(inst, now)
    order = list(type(event.phase))
    if inst.phase is not None and order.index(event.phase) < order.index(inst.phase):
        return
    if event.phase is not inst.phase:
        close_phase(inst, now)
        inst.phase, inst.phase_since = event.phase, now
    inst.phase_fraction, inst.phase_note = event.fraction, event.note


def close_phase(inst: Instance, now: float) -> None:
    """Book the time of the phase that ends."""
    if inst.phase is not None:
        inst.phases[inst.phase] = inst.phases.get(inst.phase, 0.0) + now - inst.phase_since


def printed(world: World, inst: Instance, event: Printed, now: float) -> None:
    """Numbers from the log; the measuring window may open."""
    if inst.state is not State.STARTING:
        return
    alive(inst, now)
    known = {name: value for name in Figures.__slots__ if (value := getattr(event.figures, name)) is not None}
    inst.figures = replace(inst.figures, **known)
    if event.measured and inst.measuring:
        inst.measuring = False
        world.dirty.add(inst.id)
        world.note("window", "its memory is measured: others may move on its devices", inst, "debug")


def usual(world: World, inst: Instance) -> float | None:
    """Seconds that a start of this kind took so far, or None."""
    learned = world.learned.get(inst.key)
    return learned.total if learned and learned.total else None


def ready_text(world: World, inst: Instance, took: float) -> str:
    """ "after 61 s (usually 58 s)"."""
    known = usual(world, inst)
    return f"after {span(took)}" + (f" (usually {span(known)})" if known else "")


def phase_weights(world: World, inst: Instance) -> Mapping[str, float]:
    """Past seconds by phase, for the overall bar."""
    learned = world.learned.get(inst.key)
    return learned.phases if learned else {}
