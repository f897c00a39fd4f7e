"""Where an instance can go: the devices a model may use, the need there, and whether it fits. Changes nothing.

Three answers: a place, no room now (with the whole sum and what would help), or a cause that no waiting heals.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from vllmd.core.ledger import Account, Ledger, device_label, smallest_release, takers
from vllmd.core.need import estimate, learned_key
from vllmd.core.states import State
from vllmd.core.world import Instance, World
from vllmd.facts import DeviceReading, Need
from vllmd.spec import Cause, ModelSpec, Remedy, Settings
from vllmd.units import gib, gib_of

#: Seconds without a reading after which nothing new is started on a device: what it holds is not known any more.
SILENT = 30.0


@dataclass(frozen=True, slots=True)
class Placed:
    """A place that fits: what to reserve where."""

    devices: tuple[DeviceReading, ...]
    need: Need


@dataclass(frozen=True, slots=True)
class Blocked:
    """No room now. `devices` is where it would have gone; `need` what it asks of each."""

    cause: Cause
    devices: tuple[str, ...]
    need: int


def find_place(world: World, inst: Instance) -> Placed | Blocked | Cause:
    """Where the instance would go now. Pure: changes nothing.

    Its own promise (kept since before a crash) does not stand in its way.
    """
    assert inst.found is not None
    own = world.ledger.held.pop(inst.id, None)
    try:
        return choose(world, inst, inst.spec)
    finally:
        if own is not None:
            world.ledger.held[inst.id] = own


def choose(world: World, inst: Instance, spec: ModelSpec) -> Placed | Blocked | Cause:
    """The place with most room, among those the model allows."""
    choices = candidates(world, spec)
    if isinstance(choices, Cause):
        return choices
    best: Placed | Blocked | Cause | None = None
    for devices in choices:
        outcome = try_devices(world, inst, spec, devices)
        if best is None or rank(world, outcome) > rank(world, best):
            best = outcome
    assert best is not None
    return best


def rank(world: World, outcome: Placed | Blocked | Cause) -> tuple[int, int]:
    match outcome:
        case Placed():
            return 2, min(world.ledger.account(d.id).left for d in outcome.devices)
        case Blocked():
            return 1, min((world.ledger.account(d).left for d in outcome.devices), default=0)
    return 0, 0


def candidates(world: World, spec: ModelSpec) -> Sequence[tuple[DeviceReading, ...]] | Cause:
    """The device sets a model may use, or why there is none."""
    readings = world.ledger.readings
    fresh = [r for r in readings.values() if world.now - world.seen.get(r.id, -SILENT) < SILENT]
    if not fresh:
        return Cause(
            "no-device",
            f"cannot start {spec.name}: no device answers" + (f" ({world.trouble})" if world.trouble else ""),
            "no device",
            (Remedy("vllmctl devices shows what is seen; check the driver with nvidia-smi"),),
        )
    match spec.gpus:
        case tuple() as names:
            chosen = []
            for name in names:
                hit = next(
                    (r for r in fresh if name in (r.id, str(r.index)) or (r.kind == "cpu" and name == "cpu")), None
                )
                if hit is None:
                    return missing_device(spec, name, fresh)
                chosen.append(hit)
            return [tuple(chosen)]
        case count:
            number = count or 1
            whole = [r for r in fresh if r.kind != "mig"] if number > 1 else fresh
            if len(whole) < number:
                return missing_device(spec, f"{number} GPUs", fresh)
            if number > 1 and any(r.kind == "cpu" for r in whole):
                return missing_device(spec, f"{number} GPUs", fresh)
            # Equal cards first: a tensor-parallel set runs at the pace of its smallest.
            return list(itertools.combinations(sorted(whole, key=lambda r: (-r.total, r.index or 0)), number))[:64]


def missing_device(spec: ModelSpec, name: str, seen: Sequence[DeviceReading]) -> Cause:
    have = ", ".join(f"{device_label(r)} {r.id}" if r.kind != "cpu" else "cpu" for r in seen)
    return Cause(
        "device-missing",
        f"cannot start {spec.name}: {name} is not present (seen: {have})",
        "device missing",
        (Remedy(f'set models.{spec.name}.gpus to what is there, or "auto"'),),
        heals=False,
    )


def try_devices(
    world: World, inst: Instance, spec: ModelSpec, devices: tuple[DeviceReading, ...]
) -> Placed | Blocked | Cause:
    """Whether `spec` fits on exactly these devices."""
    assert inst.found is not None
    key = learned_key(spec, inst.found, devices[0].kind, len(devices))
    accounts = [world.ledger.account(d.id) for d in devices]
    tight = min(accounts, key=lambda a: a.left)
    need = estimate(spec, inst.found, tight.reading, world.learned.get(key), len(devices), tight.budget)
    if isinstance(need, Cause):
        return need
    for account in accounts:
        if need.total > account.budget:
            return never_fits(spec, need, account)
    if need.total > tight.left:
        return Blocked(no_room(world, spec, need, tight), tuple(d.id for d in devices), need.total)
    return Placed(devices, need)


def never_fits(spec: ModelSpec, need: Need, account: Account) -> Cause:
    """It needs more than the whole budget."""
    parts = " + ".join(f"{label} {gib(size)}" for label, size in need.parts)
    return Cause(
        "too-big",
        f"cannot start {spec.name}: needs {gib(need.total)} ({parts}),"
        f" the whole budget of {account.label} is {gib(account.budget)}",
        f"needs {gib(need.total)}",
        (Remedy("lower vram, kv_cache or max_model_len, raise devices.*.limit, or use more GPUs"),),
        heals=False,
    )


def never_fit(world: World, settings: Settings) -> list[str]:
    """The models whose given vram no device of theirs can ever offer under these settings: sentences for the operator.

    Devices that are missing now are not judged: they fail their model when it starts.
    """
    ledger = Ledger(settings.devices, world.ledger.readings)
    seen = World(settings, world.places, ledger, seen=world.seen, now=world.now)
    refused = []
    for spec in settings.models.values():
        choices = candidates(seen, spec)
        if isinstance(choices, Cause) or not isinstance(spec.vram, int):
            continue
        best = max((min(ledger.account(d.id).budget for d in devices) for devices in choices), default=0)
        if spec.vram > best:
            refused.append(
                f"models.{spec.name}.vram: {gib(spec.vram)} can never fit, the largest budget is {gib(best)}"
            )
    return refused


def no_room(world: World, spec: ModelSpec, need: Need, account: Account) -> Cause:
    """The whole sum, and what would help."""
    others = [i for i in account.promised if world.instances[i].state in (State.READY, State.STARTING, State.BACKOFF)]
    stops = smallest_release(account, need.total, others)
    help_ = f"stop {', '.join(stops)}, or lower kv_cache" if stops else "lower vram or kv_cache, or free memory"
    remedies = [Remedy(f"vllmctl stop {' '.join(stops)}")] if stops else []
    remedies.append(Remedy(f"lower models.{spec.name}.kv_cache or max_model_len"))
    return Cause(
        "no-room",
        f"cannot start {spec.name}: needs {gib(need.total)} on {account.label}, "
        f"{gib_of(max(0, account.left), account.budget)} left: {takers(account)} ({help_})",
        f"no room for {gib(need.total)}",
        tuple(remedies),
    )


def neighbours_moving(world: World, inst: Instance, place: Placed) -> set[str]:
    """Who must finish first on these devices: a measuring start excludes every other move, and itself waits for all."""
    ids = {d.id for d in place.devices}
    measures = will_measure(place)
    busy = set()
    for other in world.instances.values():
        if other is inst or not ids & set(other.devices):
            continue
        moving = other.state in (State.STARTING, State.DRAINING, State.STOPPING) and not other.drain_held
        if other.measuring or (measures and moving):
            busy.add(other.id)
    return busy


def will_measure(place: Placed) -> bool:
    """vLLM reads device-wide free memory on a GPU unless its KV cache is pinned; its CPU worker reads its own RSS."""
    return not place.need.pinned and any(d.kind != "cpu" for d in place.devices)


def freeing(world: World, blocked: Blocked) -> tuple[str, ...]:
    """The instances on their way down whose memory will make room, or ()."""
    moving = [i for i in world.instances.values() if i.state in (State.DRAINING, State.STOPPING) and not comes_back(i)]
    for device in blocked.devices:
        account = world.ledger.account(device)
        back = sum(account.promised.get(i.id, 0) + unreturned(account, i) for i in moving)
        if account.left + back < blocked.need:
            return ()
    return tuple(i.id for i in moving if set(i.devices) & set(blocked.devices))


def unreturned(account: Account, inst: Instance) -> int:
    """Bytes of an ended instance that the device still shows as used by nobody: they look external for a moment."""
    if not inst.gone:
        return 0
    grown = account.reading.external - inst.outside.get(account.reading.id, account.reading.external)
    return min(max(0, grown), account.promised.get(inst.id, 0))


def comes_back(inst: Instance) -> bool:
    """Whether an ending instance will want its memory again."""
    return inst.wanted
