"""The way down: drain, end, settle, and what follows: rest, retry, again or give up.

`end` is the one door out of every live state. It kills the whole tree, whatever the reason; only when nothing of it is
left and the memory is back does the instance move on.
"""

from dataclasses import replace

from vllmd.core.cause import VAGUE
from vllmd.core.failing import retry_or_give_up, set_cause
from vllmd.core.ledger import device_label
from vllmd.core.proofs import called_for
from vllmd.core.starts import pump, want
from vllmd.core.states import Move, State
from vllmd.core.world import Instance, World
from vllmd.events import Broken, Gone, KillTree, ReadDevices, Sleep, Terminate
from vllmd.spec import Cause, level_of
from vllmd.units import MIB, gib, span

KILL_AGAIN = 15.0  # seconds until a kill that reported nothing is repeated
SETTLE_LIMIT = 60.0  # seconds that memory may take to come back before it counts as leaked
SETTLED = 256 * MIB  # how exactly a device must return to what others used before the end
HOLD_LIMIT = 600.0  # seconds that a drain waits for a neighbour that measures
DOZE_LIMIT = 120.0  # seconds that falling asleep may take: 22 GiB to host memory were seen to take 11 s


def stop(world: World, inst: Instance, now: float, *, at_once: bool = False) -> tuple[int, str]:
    """The instance is not wanted any more. The status and sentence to answer with."""
    inst.wanted = inst.insisted = inst.evicted = inst.returns = False
    world.dirty.add(inst.id)
    if inst.line:
        text = "vllmd is shutting down" if world.closing else f"{inst.id} was stopped"
        world.turn_away(inst, Cause("closing" if world.closing else "stopped", text, "stopped"))
    match inst.state:
        case State.STOPPED:
            return 200, f"{inst.id} is stopped already"
        case State.WAITING:
            world.answer(inst, 409, f"{inst.id} was stopped while it waited to start")
            inst.cause = None
            world.move(inst, Move.CANCEL, now, "stopped while waiting")
        case State.BACKOFF | State.FAILED:
            inst.cause = None
            inst.failures.clear()
            world.move(inst, Move.CANCEL, now, "stopped")
        case State.STARTING:
            # SIGTERM during a start is swallowed or deadlocks, depending on the phase: only the kill is sure.
            end(world, inst, now, "stopped while starting")
        case State.DOZING | State.ASLEEP | State.WAKING:
            end(world, inst, now, f"stopped while {inst.state}")  # nothing is under way at it
        case State.READY | State.DRAINING if at_once:
            return cut(world, inst, now)
        case State.READY:
            drain(world, inst, now, "stop")
        case State.DRAINING | State.STOPPING:
            return 202, f"{inst.id} is stopping already"
    return 202, f"{inst.id}: {inst.state}"


def cut(world: World, inst: Instance, now: float) -> tuple[int, str]:
    """End it without a drain. A neighbour that measures is waited for, unless the wish is repeated: what comes free in
    its window would become its KV cache."""
    beside = [] if world.closing or inst.hurried else measuring_beside(world, inst)
    if inst.state is State.READY and beside:
        drain(world, inst, now, "stop at once")
    if not inst.drain_held or not beside:
        end(world, inst, now, "stopped at once" if inst.state is State.READY else "drain cut short")
        return 202, f"{inst.id}: {inst.state}"
    inst.hurried = True
    whom = ", ".join(beside)
    return 202, f"{inst.id} is stopped when {whom} has measured its memory; ask again to stop it without waiting"


def measuring_beside(world: World, inst: Instance) -> list[str]:
    """The others that measure on its devices now."""
    return [
        other.id
        for other in world.instances.values()
        if other.measuring and other is not inst and set(other.devices) & set(inst.devices)
    ]


def drain(world: World, inst: Instance, now: float, why: str) -> None:
    """Let the engine finish what it has; held back while a neighbour measures."""
    world.move(inst, Move.DRAIN, now, why)
    inst.drain_held = bool(measuring_beside(world, inst))
    if inst.drain_held and not world.closing:
        inst.deadline = now + HOLD_LIMIT
        world.note("window", "its stop waits until a neighbour has measured its memory", inst)
    else:
        terminate(world, inst, now)


def terminate(world: World, inst: Instance, now: float) -> None:
    """SIGTERM to the leader, and a limit: once vLLM's own drain limit cut it off, its API server may hang for ever. One
    that was to be stopped at once, and only waited for a neighbour, is ended."""
    inst.drain_held = False
    if inst.hurried:
        end(world, inst, now, "stopped at once")
        return
    inst.deadline = now + inst.spec.drain + inst.spec.stop_timeout
    world.dirty.add(inst.id)
    world.emit(Terminate(inst.id, inst.attempt))


def doze(world: World, inst: Instance, now: float, why: str) -> None:
    """Let it sleep; held back while a neighbour measures. Nothing is under way at it."""
    inst.full, inst.slept_at, inst.kept = dict(world.ledger.held.get(inst.id, {})), 0.0, {}
    world.move(inst, Move.SLEEP, now, why)
    inst.drain_held = bool(measuring_beside(world, inst))
    if inst.drain_held:
        inst.deadline = now + HOLD_LIMIT
        world.note("window", "its sleep waits until a neighbour has measured its memory", inst)
    else:
        lie_down(world, inst, now)


def lie_down(world: World, inst: Instance, now: float) -> None:
    """Tell its engine."""
    inst.drain_held = False
    inst.deadline = now + DOZE_LIMIT
    world.dirty.add(inst.id)
    world.emit(Sleep(inst.id, inst.attempt, level_of(inst.spec)))


def release_drains(world: World, now: float) -> None:
    """The held drains, and sleeps, whose neighbours have measured."""
    for inst in world.instances.values():
        if inst.drain_held and not measuring_beside(world, inst):
            match inst.state:
                case State.DRAINING:
                    terminate(world, inst, now)
                case State.DOZING:
                    lie_down(world, inst, now)


def broken(world: World, inst: Instance, event: Broken, now: float) -> None:
    """A process ended that nobody asked to end: a crash, whatever its code (vLLM exits 0 when its engine dies)."""
    match inst.state:
        case State.STARTING | State.READY:
            inst.crashed, inst.broke_at = True, now
            end(world, inst, now, event.what, crashed=True)
        case State.DOZING | State.ASLEEP | State.WAKING:
            inst.crashed, inst.broke_at = True, now
            # One that sleeps is as one that is stopped: it is started for who waits, and for nobody else.
            inst.wanted |= called_for(inst)
            end(world, inst, now, event.what, crashed=True)
        case State.DRAINING if event.status is not None or inst.drain_held:
            end(world, inst, now, "drained")


def end(
    world: World, inst: Instance, now: float, text: str, *, crashed: bool = False, verdict: Cause | None = None
) -> None:
    """Kill the tree, for whatever reason. `verdict` is the cause when vllmd itself decided (hang, stall, overrun)."""
    inst.crashed = crashed
    if crashed and verdict is not None:
        inst.broke_at = now
    if crashed or verdict is not None:
        inst.verdict = verdict
    inst.measuring = False
    inst.gone = False
    world.ledger.leave(inst.id, inst.devices)
    for other in world.instances.values():
        other.disturbed |= other.measuring and bool(set(other.devices) & set(inst.devices))
    world.move(inst, Move.END, now, text)
    inst.shut_for, inst.roused_at, inst.drain_held = "", 0.0, False
    inst.deadline = now + KILL_AGAIN
    world.emit(KillTree(inst.id, inst.attempt, crashed))
    release_drains(world, now)


def gone(world: World, inst: Instance, event: Gone, now: float) -> None:
    """Nothing of the tree is left (or what is left cannot be killed): wait for the memory."""
    if inst.state is not State.STOPPING or inst.gone:
        return
    inst.gone = True
    inst.pids = event.pids_left
    if event.pids_left:
        inst.leak = f"processes {', '.join(map(str, event.pids_left))} cannot be killed"
        world.note("leak", inst.leak, inst, "error")
    if inst.crashed and inst.verdict is None:
        inst.verdict = event.cause
    elif inst.verdict is not None and inst.verdict.kind == "stalled" and event.cause and event.cause.kind not in VAGUE:
        # Its log knows why it stood still.
        inst.verdict = replace(event.cause, text=f"{event.cause.text} ({inst.verdict.text})")
    inst.deadline = now + SETTLE_LIMIT
    if settled(world, inst):
        finish(world, inst, now)
    else:
        world.emit(ReadDevices())


def settled(world: World, inst: Instance) -> bool:
    """Whether the memory is back. On "cpu" it is once the processes are gone: the kernel frees first, then reports the
    exit. A GPU's driver may take longer: what nobody is seen to use must have returned to what it was before. Nobody
    waits for it when all is ended: nothing is started after that, and a driver that is dead would never answer."""
    if world.closing:
        return True
    for device in inst.devices:
        reading = world.ledger.readings.get(device)
        if reading is None or reading.kind == "cpu":
            continue
        if world.seen.get(device, 0.0) < inst.since or reading.instances.get(inst.id, 0):
            return False
        if world.ledger.account(device).returning.get(inst.id, 0) > SETTLED:
            return False
    return True


def still_settling(world: World) -> bool:
    """Whether somebody waits for memory: devices are then read often."""
    return any(i.state is State.STOPPING and i.gone for i in world.instances.values())


def give_up_settling(world: World, inst: Instance, now: float) -> None:
    """The memory did not come back: say who holds it. From now on it counts as external: nothing is overcommitted."""
    silent = [d for d in inst.devices if d in world.ledger.readings and world.seen.get(d, 0.0) < inst.since]
    if silent:
        labels = ", ".join(device_label(world.ledger.readings[device]) for device in silent)
        world.note("devices", f"{labels} does not answer: whether its memory came back is not known", inst, "warning")
        finish(world, inst, now)
        return
    readings = [world.ledger.readings[device] for device in inst.devices if device in world.ledger.readings]
    holders = [f"{h.name}[{h.pid}] {gib(h.used)}" for reading in readings for h in reading.processes]
    inst.leak = f"memory did not come back within {span(SETTLE_LIMIT)}"
    world.note(
        "leak", f"{inst.leak}: leak suspected, held by {', '.join(holders) or 'no visible process'}", inst, "error"
    )
    world.count("leaks", inst.spec.name)
    finish(world, inst, now)


def finish(world: World, inst: Instance, now: float) -> None:
    """Ended and settled: rest, again, retry or give up."""
    inst.pid, inst.pids, inst.ready_at, inst.launch = None, inst.pids if inst.leak else (), None, None
    world.ledger.leaving.pop(inst.id, None)
    if inst.evicted:
        world.ledger.release(inst.id)  # whatever follows, its place is another's now
    spec = world.settings.models.get(inst.spec.name)
    asked_for = inst.line > 0 and spec is not None and spec.on_demand
    wanted = (inst.wanted or asked_for) and not world.closing and spec is not None
    own_end = inst.verdict is not None and not inst.crashed  # vllmd ended it, for a reason that counts as a failure
    if inst.crashed or own_end:
        cause = inst.verdict or Cause("crashed", f"{inst.id} ended and left no reason in its log", "crashed")
        set_cause(world, inst, cause, now)
        inst.last, inst.last_at = cause, inst.broke_at
        after_failure(world, inst, cause, wanted, now)
    elif wanted:
        again(world, inst, now, by_demand=not inst.wanted)
    elif inst.evicted and spec is not None and (spec.home or inst.returns) and not world.closing:
        again(world, inst, now)  # it stands in line, behind all who are waited for, until there is room
    else:
        inst.cause = None
        world.move(inst, Move.REST, now)
    if any(inst.id in reading.instances for reading in world.ledger.readings.values()):
        world.emit(ReadDevices())  # the last look still shows it
    pump(world, now)


def again(world: World, inst: Instance, now: float, *, by_demand: bool = False) -> None:
    """Straight into the next start, with the newest configuration."""
    spec = world.settings.models[inst.spec.name]
    want(world, inst, now, patient=True, spec=spec, move=Move.AGAIN, by_demand=by_demand)


def after_failure(world: World, inst: Instance, cause: Cause, wanted: bool, now: float) -> None:
    """Restart policy: never what cannot heal, never more than `max_failures` in the window, else after a backoff. An
    operator who asked for it meanwhile is obeyed as with a failed one."""
    if not wanted:
        world.move(inst, Move.REST, now, cause.text)
    elif inst.insisted:
        inst.failures.clear()
        again(world, inst, now)
    elif not cause.heals:
        world.move(inst, Move.GIVE_UP, now, f"{cause.text} (not retried: trying again cannot help)")
    else:
        retry_or_give_up(world, inst, cause, inst.broke_at, now)
