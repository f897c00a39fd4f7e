"""Sleep as a middle step of making room: an engine that is empty gives its memory back and keeps its processes.

Only what a reading shows to be free is given to others: what the sleeper keeps stays promised to it. vLLM's sleep is
fragile, so each one is watched: memory that it keeps more of than at first, a waking that fails, a test request that is not
answered or answered otherwise than before, all end in a new start.
"""

from vllmd.core.health import arm
from vllmd.core.proofs import FREED_LEAST, called_for, given_asleep, proof_of, under_trial, unproved, withdraw
from vllmd.core.room import send_away
from vllmd.core.starts import pump
from vllmd.core.states import Move, State
from vllmd.core.stops import SETTLE_LIMIT, end, lie_down, release_drains
from vllmd.core.waking import ELSEWHERE
from vllmd.core.world import Cycle, Instance, World
from vllmd.events import Doze, ReadDevices, Slept, Woke
from vllmd.spec import Cause, Remedy
from vllmd.units import MIB, gib, span

REST = "(sleep)"  # in the place of whom it is shut for: an operator wants it asleep
SETTLED = 256 * MIB  # so far above what its proof says a reading may be
SETTLE = 3.0  # seconds after which a reading counts as it is
WOBBLE = 16 * MIB  # two readings that differ by less are the same
GROWTH = 512 * MIB  # so much more than after its first sleep is a leak


def wish(world: World, inst: Instance, event: Doze, now: float) -> None:
    """An operator wants it asleep."""
    if inst.state in (State.ASLEEP, State.DOZING):
        world.tell(event.ticket, 200, f"{inst.id} is {inst.state} already")
    elif inst.state is not State.READY or inst.shut_for or world.closing:
        world.tell(event.ticket, 422, f"{inst.id} is not ready: only what serves can sleep")
    elif proof_of(world, inst) is None:
        world.tell(event.ticket, 422, unproved(inst))
    else:
        inst.dozes = True
        world.note("sleep", "an operator wants it asleep", inst)
        send_away(world, inst, REST, now)
        world.tell(event.ticket, 202, f"{inst.id}: sleeps when its requests have ended")


def may_doze(world: World, inst: Instance) -> bool:
    """Whether one that is to go sleeps instead of ending."""
    wished = inst.shut_for == REST and proof_of(world, inst) is not None
    return wished or (inst.dozes and bool(given_asleep(world, inst)))


def slept(world: World, inst: Instance, event: Slept, now: float) -> None:
    """Its engine says that it sleeps. What it gave back is seen at the next reading."""
    if inst.state is not State.DOZING or inst.drain_held:
        return
    if event.problem:
        failed(world, inst, "sleep-failed", f"it does not fall asleep: {event.problem}", now)
        return
    inst.slept_at, inst.slept_s = now, event.seconds
    inst.deadline = now + SETTLE_LIMIT
    world.emit(ReadDevices())


def settle(world: World, inst: Instance, now: float) -> None:
    """A reading came while it falls asleep: what it keeps is known when that is as its proof says, or does not change any
    more. The first reading may have been under way when the engine slept."""
    if not inst.slept_at or any(world.seen.get(device, 0.0) < inst.slept_at for device in inst.full):
        return
    used = {device: world.ledger.readings[device].instances.get(inst.id, 0) for device in inst.full}
    proof = proof_of(world, inst)
    usual = proof is not None and all(size <= proof.residual + SETTLED for size in used.values())
    last, inst.kept = inst.kept, used
    calm = bool(last) and all(abs(size - last.get(device, 0)) <= WOBBLE for device, size in used.items())
    if not (calm or (usual and not under_trial(inst)) or now - inst.slept_at >= SETTLE):
        world.emit(ReadDevices())
        return
    inst.residual = inst.residual or used
    growth = max((size - inst.residual.get(device, 0) for device, size in used.items()), default=0)
    if growth > GROWTH:
        text = f"keeps {gib(growth)} more asleep than after its first sleep (a leak in vLLM's sleep mode)"
        failed(world, inst, "sleep-grew", text, now)
        return
    keeps = inst.full
    if not under_trial(inst) and proof is not None and proof.freed >= FREED_LEAST:
        keeps = {d: min(inst.full[d], max(size, proof.residual)) for d, size in used.items()}
    world.ledger.recall(inst.id, keeps)
    freed = sum(inst.full.values()) - sum(keeps.values())
    world.move(
        inst, Move.ASLEEP, now, f"after {span(now - inst.since)}, {gib(sum(keeps.values()))} kept, {gib(freed)} free"
    )
    release_drains(world, now)
    pump(world, now)


def overdue(world: World, inst: Instance, now: float) -> None:
    """Its time to fall asleep, or to wake, is over."""
    if inst.state is State.WAKING:
        failed(world, inst, "wake-failed", f"not awake after {span(now - inst.since)}", now)
    elif inst.drain_held:
        lie_down(world, inst, now)
    elif inst.slept_at:
        end(world, inst, now, "no reading shows what it keeps")
    else:
        failed(world, inst, "sleep-failed", f"not asleep after {span(now - inst.since)}", now)


def woke(world: World, inst: Instance, event: Woke, now: float) -> None:
    """It serves again, as before, or it is started anew."""
    if inst.state is not State.WAKING:
        return
    if event.problem:
        failed(world, inst, "wake-failed", event.problem, now)
        return
    if event.same is False:
        failed(world, inst, "wake-changed", "awake it answers otherwise than before it slept", now)
        return
    if inst.trial is not None and inst.trial.on:
        inst.trial.cycles.append(Cycle(inst.slept_s, event.seconds, dict(inst.kept), event.same))
    world.move(inst, Move.READY, now, f"awake after {span(now - inst.since)}")
    inst.proved, inst.canary_out, inst.asked, inst.tokens_at = now, False, None, now
    inst.under_way, inst.begun, inst.direct, inst.direct_seen, inst.over_since = 0, 0, 0, 0, None
    arm(inst)
    release_drains(world, now)
    world.emit(ReadDevices())
    pump(world, now)


def failed(world: World, inst: Instance, kind: str, text: str, now: float) -> None:
    """What sleeps is not what was proved: it ends, and is started anew if somebody wants it."""
    grew = kind == "sleep-grew"
    if not grew or under_trial(inst):
        withdraw(world, inst, text)
    if inst.trial is not None and inst.trial.on:
        inst.trial.result = text
    world.count("sleep_failures", inst.spec.name, kind)
    cause = Cause(kind, f"{inst.id}: {text}", kind.replace("-", " "), (Remedy(f"vllmctl swap-test {inst.id}"),))
    world.note("sleep", f"{text}: it is started anew", inst, "error")
    inst.wanted |= called_for(inst)
    # One that was about to go anyway, and whom nobody waits for, has not failed anybody.
    crashed = inst.wanted and not grew
    end(world, inst, now, text, crashed=crashed, verdict=cause if crashed else None)


def leave(world: World, inst: Instance, now: float) -> None:
    """One that sleeps and is to go."""
    why = "its line is served elsewhere" if inst.shut_for == ELSEWHERE else f"makes room for {inst.shut_for}"
    end(world, inst, now, f"asleep, {why}")
