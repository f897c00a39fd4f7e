"""Watching what runs: ready, proofs of life, hangs, memory that outgrows its promise, devices that fall silent.

vLLM's /health says 200 with a frozen engine, so a proof is something that the engine itself did: a token counter moved,
or a 1-token request came back.
"""

from vllmd.core.failing import profile
from vllmd.core.policy import canary_due, hung_at
from vllmd.core.starts import close_phase, pump, ready_text
from vllmd.core.states import Move, State
from vllmd.core.stops import drain, end, finish, release_drains, settled, still_settling
from vllmd.core.world import Instance, World
from vllmd.events import Canary, CanaryBack, DevicesRead, Keep, Pulse, ReadDevices, Ready, Remember
from vllmd.facts import DeviceReading, Learned
from vllmd.spec import Cause, Overrun, Remedy
from vllmd.units import MIB, gib, span

OVERRUN_SLACK = 64 * MIB  # readings wobble; less than this over the promise is not worth a word
OVERRUN_AFTER = 10.0  # seconds over the promise before anything is done


def ready(world: World, inst: Instance, event: Ready, now: float) -> None:
    """It serves, and it is ours."""
    if inst.state is not State.STARTING:
        return
    close_phase(inst, now)
    took = now - inst.started
    inst.measuring = False
    inst.pids = event.pids
    inst.cause, inst.leak, inst.changed, inst.peak = None, "", (), {}
    world.good[inst.spec.name] = profile(world, inst)
    world.emit(Keep(inst.spec.name, world.good[inst.spec.name]))
    world.move(inst, Move.READY, now, ready_text(world, inst, took))
    inst.ready_at, inst.proved, inst.phase = now, now, None
    inst.tokens_at = now
    arm(inst)
    release_drains(world, now)
    world.emit(ReadDevices())  # teaches its real need
    pump(world, now)


def arm(inst: Instance) -> None:
    """The one deadline of a ready instance: the next canary, or the time at which it counts as hung."""
    watch_hang = inst.canary_out or not inst.canary_works
    inst.deadline = (
        hung_at(inst.proved, inst.spec.hang_after) if watch_hang else canary_due(inst.proved, inst.spec.hang_after)
    )


def pulse(inst: Instance, event: Pulse, now: float) -> None:
    """Counters of a ready engine."""
    if inst.state not in (State.READY, State.DRAINING):
        return
    looked, elapsed = inst.tokens_at, now - inst.tokens_at
    if elapsed > 0:
        inst.tokens_per_s = max(0.0, event.tokens - inst.tokens) / elapsed
    inst.tokens, inst.tokens_at = event.tokens, now
    inst.running, inst.waiting = event.running, event.waiting
    if inst.state is not State.READY:
        return
    idle = event.running == 0 and event.waiting == 0
    # An engine that answers no canary and has nothing to do cannot prove itself; that is no reason to kill it.
    if idle and not inst.canary_works:
        proved(inst, now)
    elif event.moved:
        # Some time since the last look: as if right after it, so that a hang is found within hang_after, not later.
        proved(inst, max(inst.proved, looked))
    if inst.ready_at is not None and now - inst.ready_at >= inst.spec.restart.reset_after:
        inst.failures.clear()


def proved(inst: Instance, now: float) -> None:
    """The engine did something."""
    inst.proved = now
    arm(inst)


def canary_back(inst: Instance, event: CanaryBack, now: float) -> None:
    """A 1-token request ended."""
    if inst.state is not State.READY:
        return
    inst.canary_out = False
    if event.ok is None:
        inst.canary_works = False
    if event.ok is not False:
        proved(inst, now)
    else:
        # Refused or timed out: ask again, but never later than the time at which it counts as hung.
        again = now + inst.spec.hang_after / 8
        inst.deadline = min(again, hung_at(inst.proved, inst.spec.hang_after))


def silent(world: World, inst: Instance, now: float) -> None:
    """A ready instance's deadline: ask it for a token, or call it hung."""
    if now < hung_at(inst.proved, inst.spec.hang_after):
        inst.canary_out = True
        inst.deadline = hung_at(inst.proved, inst.spec.hang_after)
        world.emit(Canary(inst.id, inst.attempt))
        return
    seen = f"{inst.running} requests running, " if inst.running else ""
    text = f"{inst.id}: {seen}no token and no answer for {span(now - inst.proved)}: engine hung, restarting"
    world.count("hangs", inst.spec.name)
    world.note("hung", text, inst, "error")
    cause = Cause(
        "hung",
        f"engine hung: {seen}no token and no answer to a test request for {span(now - inst.proved)}",
        "engine hung",
        (
            Remedy(f"vllmctl logs --previous {inst.id}"),
            Remedy(f"raise models.{inst.spec.name}.hang_after if its steps are that long"),
        ),
    )
    end(world, inst, now, cause.text, crashed=True, verdict=cause)


def stalled(world: World, inst: Instance, now: float) -> None:
    """A start without a sign of life."""
    phase = f" while {inst.phase}" if inst.phase else ""
    cause = Cause(
        "stalled",
        f"no sign of life for {span(now - inst.heard)}{phase}: start given up",
        "start stalled",
        (Remedy(f"vllmctl logs --failed {inst.id}"), Remedy(f"raise models.{inst.spec.name}.start_stall")),
        phase=str(inst.phase or ""),
    )
    end(world, inst, now, cause.text, crashed=True, verdict=cause)


def devices_read(world: World, event: DevicesRead, now: float) -> None:
    """A look at the devices: settle ends, learn needs, see overruns and outside growth, try who waits."""
    if event.trouble != world.trouble:
        world.trouble = event.trouble
        if event.trouble:
            world.note("devices", event.trouble, level="error")
    for reading in event.devices:
        world.ledger.readings[reading.id] = reading
        world.seen[reading.id] = now
    for inst in list(world.instances.values()):
        match inst.state:
            case State.STARTING:
                grew(inst, now, world.ledger.readings)
            case State.READY:
                grew(inst, now, world.ledger.readings)
                learn(world, inst, now)
                check_overrun(world, inst, now)
            case State.STOPPING if inst.gone and settled(world, inst):
                finish(world, inst, now)
    check_outside(world)
    if still_settling(world):
        world.emit(ReadDevices())
    pump(world, now)


def grew(inst: Instance, now: float, readings: dict[str, DeviceReading]) -> None:
    """Keep the peak use. During a start growth is a sign of life; what is learned is the peak since it was ready: a
    cold compile's children come and go, and a warm start has none."""
    for device in inst.devices:
        used = readings[device].instances.get(inst.id, 0) if device in readings else 0
        if used > inst.peak.get(device, 0):
            if used > inst.peak.get(device, 0) + MIB and inst.state is State.STARTING:
                inst.heard, inst.deadline = now, now + inst.spec.start_stall
            inst.peak[device] = used


def learn(world: World, inst: Instance, now: float) -> None:
    """What the instance really takes becomes its need at the next start: the peak without the KV cache, and the KV."""
    if inst.need is None or not inst.peak or inst.ready_at is None or inst.disturbed:
        return
    # What vLLM prints is rounded to 0.01 GiB; what was pinned is exact.
    printed = None if inst.need.pinned else inst.figures.kv_bytes
    kv = printed if printed is not None else inst.need.kv
    if kv is None:
        return
    base = max(inst.peak.values()) - kv
    known = world.learned.get(inst.key)
    if base <= 0 or (inst.learned and known is not None and base <= known.base):
        return
    old = known if known and not inst.learned else None
    phases = {str(p): s if old is None else (s + old.phases.get(str(p), s)) / 2 for p, s in inst.phases.items()}
    if inst.resumed:
        phases = dict(old.phases) if old else {}
    took = inst.ready_at - inst.started
    total = took if old is None or not old.total else (took + old.total) / 2
    if inst.learned and known is not None:
        phases, total = dict(known.phases), known.total
    inst.learned = True
    world.learned[inst.key] = Learned(base, kv, phases, total)
    world.emit(Remember(inst.key, world.learned[inst.key]))


def check_overrun(world: World, inst: Instance, now: float) -> None:
    """An instance that uses more than it was promised."""
    promise = world.ledger.held.get(inst.id, {})
    over = max((world.ledger.readings[d].instances.get(inst.id, 0) - size for d, size in promise.items()), default=0)
    if over <= OVERRUN_SLACK:
        inst.over_since = None
        return
    if inst.over_since is None:
        inst.over_since = now
        world.count("overruns", inst.spec.name)
        world.note("overrun", f"uses {gib(over)} more than its {gib(max(promise.values()))}", inst, "warning")
    if now - inst.over_since < OVERRUN_AFTER or inst.spec.on_overrun is Overrun.WARN:
        return
    cause = Cause(
        "overrun", f"used {gib(over)} more than reserved (on_overrun = {inst.spec.on_overrun})", "used too much memory"
    )
    inst.wanted = inst.spec.on_overrun is Overrun.RESTART
    inst.verdict = cause
    drain(world, inst, now, cause.text)


def check_outside(world: World) -> None:
    """Other programs took memory that was promised: say so once, until it is over. Running models are left alone."""
    for device in world.seen:
        account = world.ledger.account(device)
        short = account.left < 0 and account.reserved > 0
        if short and not world.short_of.get(device):
            text = (
                f"{account.label}: other programs took {gib(-account.left)} that is promised to models;"
                " nothing new is started here until it is back"
            )
            world.note("external", text, level="warning", device=device)
        world.short_of[device] = short
