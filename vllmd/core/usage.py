"""What is in use: peaks, needs that are learned, memory that outgrows its promise, memory that others take."""

from vllmd.core.sleep import settle
from vllmd.core.starts import pump
from vllmd.core.states import State
from vllmd.core.stops import drain, finish, settled, still_settling
from vllmd.core.world import Instance, World
from vllmd.events import DevicesRead, ReadDevices, Remember
from vllmd.facts import DeviceReading, Learned
from vllmd.spec import Cause, Overrun, Remedy
from vllmd.units import MIB, gib

OVERRUN_SLACK = 64 * MIB  # readings wobble; less than this over the promise is not worth a word
OVERRUN_AFTER = 10.0  # seconds over the promise before anything is done


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
                learn(world, inst)
                check_overrun(world, inst, now)
            case State.DOZING:
                settle(world, inst, now)
            case State.STOPPING if inst.gone and settled(world, inst):
                finish(world, inst, now)
    check_shortage(world)
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


def learn(world: World, inst: Instance) -> None:
    """What the instance really takes becomes its need at the next start: the peak without the KV cache, and the KV.

    An idle run takes less than a busy one: what is known only grows. What goes beyond a given `vram` is not learned: the
    next start would be refused for it, while it is this one's KV cache that has to be smaller.
    """
    if inst.need is None or not inst.peak or inst.ready_at is None or inst.disturbed:
        return
    # What vLLM prints is rounded to 0.01 GiB; what was pinned is exact.
    printed = None if inst.need.pinned else inst.figures.kv_bytes
    kv = printed if printed is not None else inst.need.kv
    if kv is None:
        return
    promise = world.ledger.held.get(inst.id, {}) if inst.spec.vram is not None else {}
    base = max(min(size, promise.get(device, size)) for device, size in inst.peak.items()) - kv
    known = world.learned.get(inst.key)
    if base <= 0:
        return
    base = max(base, known.base) if known else base
    if inst.learned and known is not None and base <= known.base:
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
    promise, readings = world.ledger.held.get(inst.id, {}), world.ledger.readings
    over = max(
        (readings[d].instances.get(inst.id, 0) - size for d, size in promise.items() if d in readings), default=0
    )
    if over <= OVERRUN_SLACK:
        inst.over_since = None
        return
    if inst.over_since is None:
        inst.over_since = now
        world.count("overruns", inst.spec.name)
        world.note("overrun", f"uses {gib(over)} more than its {gib(max(promise.values()))}", inst, "warning")
    if inst.disturbed and not inst.remeasured:
        # Memory that came free while it measured became its KV cache.
        inst.remeasured = True
        drain(world, inst, now, "a neighbour ended while it measured, so that it took too much: it measures again")
        return
    if now - inst.over_since < OVERRUN_AFTER or inst.spec.on_overrun is Overrun.WARN:
        return
    inst.wanted = inst.spec.on_overrun is Overrun.RESTART
    inst.broke_at = now
    inst.verdict = Cause(
        "overrun",
        f"used {gib(over)} more than reserved (on_overrun = {inst.spec.on_overrun})",
        "used too much memory",
        (Remedy(f"raise models.{inst.spec.name}.vram"),) if inst.spec.vram is not None else (),
    )
    drain(world, inst, now, inst.verdict.text)


def check_shortage(world: World) -> None:
    """More is promised than there is, because other programs took it or because the limit was lowered: said once each, until
    it is over. Running models are left alone."""
    for device in world.seen:
        account = world.ledger.account(device)
        free = account.reading.total - account.reserve
        lacking = {
            "external": min(account.external, account.reserved + account.external - free),
            "limit": account.reserved - account.budget,
        }
        for kind, size in lacking.items():
            short = size > 0 and account.reserved > 0
            if short and not world.short_of.get((device, kind)):
                what = (
                    f"other programs took {gib(size)} that is promised to models"
                    if kind == "external"
                    else f"models hold {gib(size)} more than the {gib(account.budget)} they may take together now"
                )
                text = f"{account.label}: {what}; nothing new is started here until it is back"
                world.note(kind, text, level="warning", device=device)
            world.short_of[device, kind] = short
