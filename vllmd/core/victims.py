"""Who makes room for whom: what each instance would give, from when on it may be asked, and the cheapest set that suffices.

An idle instance may be asked at once, one that was used only after `min_resident`, a busy one never, but for one thing: the
waiter's patience. After `max_wait` it need not be considerate any more; pinned ones stay even then. The price of a victim is
the time of its reload by how much it is used: what nobody uses costs nothing. Equal prices go to the least recently used.
One whose sleep is proved goes to sleep, if that suffices: it is awake sooner than it is loaded. One that sleeps already may be
ended for what it keeps.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from vllmd.core.proofs import given_asleep, proof_of, under_trial, wanted_awake
from vllmd.core.states import State
from vllmd.core.world import Instance, World

EXHAUSTIVE = 8  # candidates up to which every set is looked at
HALF_LIFE = 600.0  # seconds after which a use counts half
RELOAD = 60.0  # seconds that a start is taken to need when none was seen


@dataclass(frozen=True, slots=True)
class Offer:
    """What one instance would give. `at`: from when on it may be asked; infinite = only when it has moved on by itself."""

    instance: str
    gives: Mapping[str, int]  # device -> bytes
    price: float
    used_at: float
    at: float
    busy: bool = False
    asleep: Mapping[str, int] = field(default_factory=dict)  # what it would give by sleeping; empty = it cannot
    nap: float = 0.0  # the price of that
    dozes: bool = False  # it is to sleep


def turn(inst: Instance, now: float) -> tuple[bool, bool, int, float]:
    """The order of those who wait: first whose patience is over, then by priority, then by age. Who waits for nobody in
    particular (autostart, coming home) comes last."""
    since = waiting_since(inst)
    overdue = bool(inst.line) and now - since >= inst.spec.max_wait
    idle = not inst.line and not inst.roused_at and (inst.patient or inst.state is State.ASLEEP)
    return not overdue, idle, -priority(inst) if not overdue else 0, since


def waiting_since(inst: Instance) -> float:
    return inst.line_since if inst.line else inst.roused_at or inst.since


def up_since(inst: Instance) -> float | None:
    """Since when it serves, or served last: since it was loaded or woke."""
    return max(inst.ready_at, inst.passed.get(State.READY, 0.0)) if inst.ready_at is not None else None


def priority(inst: Instance) -> int:
    return inst.spec.priority + (inst.line_priority if inst.line else 0)


def heat(inst: Instance, now: float) -> float:
    """How much it is used: requests, each counting half after HALF_LIFE."""
    return float(inst.heat * 0.5 ** (max(0.0, now - inst.heat_at) / HALF_LIFE))


def busy(inst: Instance) -> bool:
    """Whether requests are under way at it, or about to come from its line."""
    return inst.under_way > 0 or inst.direct > 0 or inst.line > 0


def leaving(inst: Instance) -> bool:
    """Whether its memory comes free for others: it makes room, or ends and is not wanted again."""
    if under_trial(inst):
        return False
    if inst.state in (State.READY, State.ASLEEP):
        return bool(inst.shut_for)
    if inst.state is State.DOZING:
        return True
    return inst.state in (State.DRAINING, State.STOPPING) and not inst.wanted


def offers(world: World, waiter: Instance, now: float) -> Iterator[Offer]:
    """What the others would give, beside what comes free anyway."""
    patience = waiting_since(waiter) + waiter.spec.max_wait
    for inst in world.instances.values():
        if inst.claim and inst is not waiter:  # it will have that, and can be asked for it then
            yield Offer(inst.id, inst.claim, 0.0, now, math.inf)
        held = world.ledger.held.get(inst.id)
        if held is None or inst is waiter or inst.spec.pinned or leaving(inst):
            continue
        yield Offer(
            inst.id, held, price(world, inst, now), inst.used_at or inst.ready_at or 0.0,
            asked_from(inst, waiter, patience, now), inst.state is State.READY and busy(inst),
            given_asleep(world, inst), nap(world, inst) * heat(inst, now),
        )  # fmt: skip


def asked_from(inst: Instance, waiter: Instance, patience: float, now: float) -> float:
    """From when on it may be asked to go."""
    if under_trial(inst) and inst.state is not State.WAITING:
        return math.inf
    match inst.state:
        case State.READY if busy(inst):
            return patience
        case State.READY:
            since = up_since(inst)
            used = inst.begun > 0 or inst.used_at > (since or 0.0)
            return min(patience, (since or now) + (inst.spec.min_resident if used else 0.0))
        case State.ASLEEP if not wanted_awake(inst):
            return now
        case State.BACKOFF | State.WAITING | State.ASLEEP:
            # Nothing of it serves: it is a matter of whose turn it is.
            return now if turn(waiter, now) < turn(inst, now) else patience
    return math.inf


def price(world: World, inst: Instance, now: float) -> float:
    """Seconds of reload by recent requests; nothing for one that does not run. One that sleeps is not up either: only what
    waking it would have saved is lost."""
    if inst.state is State.ASLEEP:
        return max(0.0, reload_seconds(world, inst) - nap(world, inst)) * heat(inst, now)
    if inst.state is not State.READY:
        return 0.0
    return reload_seconds(world, inst) * heat(inst, now)


def nap(world: World, inst: Instance) -> float:
    """Seconds to fall asleep and to wake."""
    proof = proof_of(world, inst)
    return proof.sleep_s + proof.wake_s if proof is not None else 0.0


def reload_seconds(world: World, inst: Instance) -> float:
    """What its next start is likely to take."""
    known = world.learned.get(inst.key)
    if known is not None and known.total:
        return known.total
    return inst.ready_at - inst.started if inst.ready_at is not None else RELOAD


def choose(missing: Mapping[str, int], offered: Sequence[Offer]) -> tuple[Offer, ...] | None:
    """The cheapest set, with all asleep that need not be ended; None when not even the end of all suffices."""
    asleep, ended = cheapest(missing, [dozing(offer) for offer in offered]), cheapest(missing, offered)
    if ended is None:
        return None
    for offer in ended:
        others = tuple(dozing(each) if each is offer else each for each in ended)
        if covers(missing, others):
            ended = others
    return ended if asleep is None else min(asleep, ended, key=worth)


def dozing(offer: Offer) -> Offer:
    """The same instance's offer to sleep, if it can."""
    return replace(offer, gives=offer.asleep, price=offer.nap, dozes=True) if offer.asleep else offer


def cheapest(missing: Mapping[str, int], offered: Sequence[Offer]) -> tuple[Offer, ...] | None:
    """The cheapest set that gives what is `missing` on each device, none of it needlessly; None when all together do not."""
    useful = [o for o in offered if any(size > 0 and o.gives.get(device, 0) > 0 for device, size in missing.items())]
    if not covers(missing, useful):
        return None
    if len(useful) <= EXHAUSTIVE:
        sets = (chosen for n in range(len(useful) + 1) for chosen in combinations(useful, n))
        return min((chosen for chosen in sets if covers(missing, chosen)), key=worth)
    chosen: list[Offer] = []
    for offer in sorted(useful, key=lambda o: (o.busy, o.price, o.used_at)):
        chosen.append(offer)
        if covers(missing, chosen):
            break
    for offer in list(reversed(chosen)):
        rest = [other for other in chosen if other is not offer]
        if covers(missing, rest):
            chosen = rest
    return tuple(chosen)


def worth(chosen: Sequence[Offer]) -> tuple[int, float, int, float]:
    """How dear a set is: busy ones, price, number, and how recently they were used."""
    return (
        sum(o.busy for o in chosen), sum(o.price for o in chosen), len(chosen), sum(o.used_at for o in chosen),
    )  # fmt: skip


def covers(missing: Mapping[str, int], chosen: Sequence[Offer]) -> bool:
    return all(size <= sum(o.gives.get(device, 0) for o in chosen) for device, size in missing.items())


def first_chance(missing: Mapping[str, int], offered: Sequence[Offer]) -> float | None:
    """When so many may be asked that it suffices: infinite = when some have moved on by themselves; None = never, whoever
    goes."""
    together: list[Offer] = []
    for offer in sorted(offered, key=lambda o: o.at):
        together.append(offer)
        if covers(missing, together):
            return offer.at
    return None
