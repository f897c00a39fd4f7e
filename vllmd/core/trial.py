"""The swap-test: a model is put to sleep and woken CYCLES times, and only then its sleep may be relied on.

Its line waits meanwhile, and its whole promise stays with it. What must hold each time: it wakes, it answers as before, it
keeps no more asleep than the first time.
"""

from vllmd.core import starts, stops
from vllmd.core.health import arm
from vllmd.core.proofs import FREED_LEAST, under_trial, unproved, withdraw
from vllmd.core.states import State
from vllmd.core.waking import rouse
from vllmd.core.world import TRIAL, Instance, Trial, World
from vllmd.events import Prove, ReadDevices, SwapTest
from vllmd.facts import Proof
from vllmd.spec import level_of
from vllmd.units import gib, span

CYCLES = 5
BEGINS = (State.STOPPED, State.FAILED, State.BACKOFF, State.STARTING, State.READY, State.WAKING)


def begin(world: World, inst: Instance, event: SwapTest, now: float) -> None:
    """Test it, once it is up and empty; one that is down is started."""
    spec = world.settings.models.get(inst.spec.name)
    if world.closing or spec is None:
        world.tell(event.ticket, 503, "vllmd is shutting down" if world.closing else f"{inst.id} was removed")
    elif not level_of(spec):
        world.tell(event.ticket, 422, unproved(inst))
    elif under_trial(inst):
        world.tell(event.ticket, 422, f"{inst.id} is being tested already")
    elif inst.state not in BEGINS or inst.shut_for:
        # One that waits for memory would wait for ever: while it is tested it is not asked for what it has, nor are others.
        world.tell(event.ticket, 422, f"{inst.id} is {inst.state}: it is tested when it is up, or down")
    else:
        inst.trial = Trial(level_of(spec), now)
        inst.dozes = False
        if inst.state in (State.STOPPED, State.FAILED, State.BACKOFF):
            inst.failures.clear()
            if event.ticket is not None:
                inst.tickets.append(event.ticket)  # refused, perhaps, as any start
            starts.want(world, inst, now, patient=False, spec=spec)
            return
        if inst.state is State.READY:
            world.shut(inst, TRIAL)
            inst.told_empty = False
        text = "begins when its requests have ended" if inst.state is State.READY else "begins when it is up"
        world.tell(event.ticket, 202, f"{inst.id}: swap-test {text}")


def go_on(world: World, inst: Instance, now: float) -> None:
    """The next step, if its time has come."""
    trial = inst.trial
    assert trial is not None
    match inst.state:
        case State.READY if len(trial.cycles) >= CYCLES:
            judge(world, inst, trial, now)
        case State.READY if inst.told_empty and not inst.direct:
            if not trial.before:
                if any(world.seen.get(device, 0.0) <= inst.shut_at for device in inst.devices):
                    world.emit(ReadDevices())
                    return
                readings = world.ledger.readings
                trial.before = {device: readings[device].instances.get(inst.id, 0) for device in inst.devices}
            stops.doze(world, inst, now, f"swap-test {len(trial.cycles) + 1} of {CYCLES}")
        case State.READY if now >= inst.shut_at + inst.spec.max_drain:
            over(world, inst, f"its requests did not end within {span(inst.spec.max_drain)}", now)
        case State.ASLEEP:
            rouse(world, inst, now)
        case State.STOPPED | State.FAILED | State.BACKOFF | State.DRAINING | State.STOPPING:
            cause = inst.verdict or inst.cause
            over(world, inst, f"it is {inst.state}" + (f": {cause.text}" if cause else ""), now)


def judge(world: World, inst: Instance, trial: Trial, now: float) -> None:
    """All went well: what its sleep is good for."""
    residual = max((size for cycle in trial.cycles for size in cycle.residual.values()), default=0)
    freed = min(
        (size - cycle.residual.get(device, 0) for cycle in trial.cycles for device, size in trial.before.items()),
        default=0,
    )
    proof = Proof(
        trial.level, residual, max(0, freed), max(c.sleep_s for c in trial.cycles), max(c.wake_s for c in trial.cycles)
    )
    trial.proof = world.proofs[inst.key] = proof
    world.emit(Prove(inst.key, proof))
    if freed >= FREED_LEAST:
        text = f"its sleep frees {gib(freed)}, {gib(residual)} stay in use; awake in {span(proof.wake_s)}"
    else:
        on_cpu = any(world.ledger.readings[d].kind == "cpu" for d in inst.devices if d in world.ledger.readings)
        why = (
            "vLLM's CPU build only simulates sleep, so memory cannot be shown here"
            if on_cpu
            else "its sleep frees nothing"
        )
        text = f"it sleeps and wakes as it should, but {why}: it makes room by ending"
    over(world, inst, text, now)


def over(world: World, inst: Instance, text: str, now: float) -> None:
    """The end of the test, in whatever way; who waits is let in."""
    assert inst.trial is not None
    inst.trial.result = text
    if inst.trial.proof is None:
        withdraw(world, inst, f"swap-test failed: {text}")
    world.note("swap-test", text, inst, "info" if inst.trial.proof else "error")
    if inst.state is State.READY:
        world.open(inst)
        arm(inst)
    starts.pump(world, now)
