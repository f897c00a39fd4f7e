"""Where an instance can go: the devices a model may use, the need there, and whether it fits. Changes nothing.

Three answers: a place, no room now (with the whole sum and what would help), or a cause that waiting for memory does not
heal. Of several places the best is one where nobody must be waited for; then one on the smallest cards that hold the model,
so that the large ones stay free for what needs them; then the emptiest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from vllmd.core.candidates import DeviceSet, answering, candidates, missing_device, size_class
from vllmd.core.ledger import Account
from vllmd.core.need import estimate, learned_key, on_each
from vllmd.core.proofs import frees
from vllmd.core.refusals import Asked, never_fits
from vllmd.core.states import State
from vllmd.core.victims import leaving, turn
from vllmd.core.world import Instance, World
from vllmd.facts import Need
from vllmd.spec import Cause, ModelSpec

#: States in which an instance takes memory or gives it back.
MOVING = frozenset({State.STARTING, State.DOZING, State.WAKING, State.DRAINING, State.STOPPING})


@dataclass(frozen=True, slots=True)
class Placed:
    """A place that fits: what to reserve where. `busy` are the neighbours that must finish first."""

    devices: DeviceSet
    need: Need
    parts: Mapping[str, int]  # device -> bytes
    left: int  # on the fullest of them, afterwards
    busy: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Blocked:
    """No room now. `parts` is what it asks of each device; refusals.no_room makes a sentence of `asked`."""

    parts: Mapping[str, int]
    asked: Asked


@dataclass(slots=True)
class Moves:
    """Who moves where: by device, the instances that measure, and those that start, drain, end, fall asleep or wake."""

    measuring: dict[str, set[str]] = field(default_factory=dict)
    moving: dict[str, set[str]] = field(default_factory=dict)


def find_place(world: World, inst: Instance) -> Placed | Blocked | Cause:
    """Where the instance would go now. Pure: changes nothing.

    Its own promise (kept since before a crash) does not stand in its way.
    """
    return max(find_places(world, inst), key=rank)  # the first of equals


def find_places(world: World, inst: Instance) -> list[Placed | Blocked | Cause]:
    """What each of the device sets that the model allows says; at least one."""
    if inst.state is State.ASLEEP:
        return [find_bed(world, inst)]
    return find_starts(world, inst)


def find_starts(world: World, inst: Instance) -> list[Placed | Blocked | Cause]:
    """The same for a start, of one that sleeps too."""
    assert inst.found is not None
    own = world.ledger.held.pop(inst.id, None)
    try:
        accounts = {reading.id: account_for(world, inst, reading.id) for reading in answering(world)}
        moves = moves_of_others(world, inst)
        choices = candidates(world, inst.spec, accounts, moves.moving.keys())
        if isinstance(choices, Cause):
            return [choices]
        return [try_devices(world, inst, inst.spec, devices, accounts, moves) for devices in choices]
    finally:
        if own is not None:
            world.ledger.held[inst.id] = own


def find_bed(world: World, inst: Instance) -> Placed | Blocked | Cause:
    """One that sleeps can wake where it is and nowhere else, if what it gave up is to be had again. `parts` of Blocked is that
    alone: what it keeps is its own."""
    assert inst.found is not None
    assert inst.need is not None
    accounts = {reading.id: account_for(world, inst, reading.id) for reading in answering(world)}
    if silent := [device for device in inst.full if device not in accounts]:
        return missing_device(world, inst.spec, silent[0], [a.reading for a in accounts.values()], True)
    kept = world.ledger.held.get(inst.id, {})
    parts = {device: max(0, size - kept.get(device, 0)) for device, size in inst.full.items()}
    mine = [accounts[device] for device in inst.full]
    tight = min(mine, key=lambda a: a.left - parts[a.reading.id])
    size = parts[tight.reading.id]
    if size > max(0, tight.left):
        budget = min(account.budget for account in mine)
        return Blocked(parts, Asked(inst.spec, inst.found, None, inst.need, size, len(mine), budget, tight))
    devices = tuple(account.reading for account in mine)
    return Placed(
        devices, inst.need, inst.full, tight.left - size, busy_on(moves_of_others(world, inst), devices, False)
    )


def account_for(world: World, inst: Instance, device: str) -> Account:
    """A device's sums as one who waits sees them: what is freed there for others is not its own. Once nobody is on his way
    out any more it is a matter of whose turn it is: of two that claim the same, neither would ever have it."""
    account = world.ledger.account(device)
    claimants = [i for i in world.instances.values() if i is not inst and device in i.claim]
    coming = coming_on(world, device) if claimants else 0
    if not coming:
        order = list(world.instances)  # of equals, as they are tried
        mine = turn(inst, world.now), order.index(inst.id)
        claimants = [i for i in claimants if (turn(i, world.now), order.index(i.id)) < mine]
    claims = {i.id: i.claim[device] for i in claimants}
    if not claims:
        return account
    kept = max(0, sum(claims.values()) - coming)
    return replace(account, claimed=min(kept, max(0, account.left)), claimants=tuple(claims))


def coming_on(world: World, device: str) -> int:
    """Bytes that those who leave will give back."""
    return sum(frees(world, i, device) for i in world.instances.values() if leaving(i))


def coming_for(world: World, inst: Instance, device: str) -> int:
    """Bytes that come free on a device and are claimed by nobody else."""
    others = sum(i.claim.get(device, 0) for i in world.instances.values() if i is not inst)
    return max(0, coming_on(world, device) - others)


def rank(outcome: Placed | Blocked | Cause) -> tuple[int, int, int]:
    match outcome:
        case Placed():
            return 3 if not outcome.busy else 2, -max(map(size_class, outcome.devices)), outcome.left
        case Blocked():
            return 1, 0, outcome.asked.account.left - outcome.asked.size
    return 0, 0, 0


def try_devices(
    world: World, inst: Instance, spec: ModelSpec, devices: DeviceSet, accounts: Mapping[str, Account], moves: Moves
) -> Placed | Blocked | Cause:
    """Whether `spec` fits on exactly these devices. The smallest decides on the share; each is asked for its own part."""
    assert inst.found is not None
    known = world.learned.get(learned_key(spec, inst.found, devices))
    smallest = min(devices, key=lambda d: d.engine_total)
    budget = min(accounts[d.id].budget for d in devices)
    need = estimate(spec, inst.found, smallest, known, len(devices), budget)
    if isinstance(need, Cause):
        return need
    need, parts = on_each(need, devices)

    def asked(account: Account) -> Asked:
        assert inst.found is not None
        return Asked(spec, inst.found, known, need, parts[account.reading.id], len(devices), budget, account)

    mine = [accounts[d.id] for d in devices]
    over = max(mine, key=lambda a: parts[a.reading.id] - a.budget)
    if parts[over.reading.id] > over.budget:
        return never_fits(asked(over))
    tight = min(mine, key=lambda a: a.left - parts[a.reading.id])
    left = tight.left - parts[tight.reading.id]
    if left < 0:
        return Blocked(parts, asked(tight))
    return Placed(devices, need, parts, left, busy_on(moves, devices, will_measure(need, devices)))


def will_measure(need: Need, devices: DeviceSet) -> bool:
    """vLLM reads device-wide free memory on a GPU unless its KV cache is pinned; its CPU worker reads its own RSS."""
    return not need.pinned and any(d.kind != "cpu" for d in devices)


def moves_of_others(world: World, inst: Instance) -> Moves:
    """What all others do on their devices at this moment."""
    found = Moves()
    for other in world.instances.values():
        if other is inst or other.state not in MOVING:
            continue
        for device in other.devices:
            if other.measuring:
                found.measuring.setdefault(device, set()).add(other.id)
            if not other.drain_held:
                found.moving.setdefault(device, set()).add(other.id)
    return found


def busy_on(moves: Moves, devices: DeviceSet, measures: bool) -> frozenset[str]:
    """Who must finish first on these devices: a measuring start excludes every other move, and itself waits for all."""
    kinds = (moves.measuring, moves.moving) if measures else (moves.measuring,)
    return frozenset().union(*(kind.get(device.id, ()) for kind in kinds for device in devices))


def freeing(world: World, blocked: Blocked) -> tuple[str, ...]:
    """The instances on their way down whose memory will make room, or ()."""
    moving = [i for i in world.instances.values() if leaving(i)]
    for device, size in blocked.parts.items():
        account = world.ledger.account(device)
        if account.left + sum(frees(world, i, device) for i in moving) < size:
            return ()
    return tuple(i.id for i in moving if set(i.devices) & set(blocked.parts))
