"""Making room for a model that requests wait for: who goes, when they may be asked, or why nobody's going would help.

An instance that is to go is shut: new requests wait, those under way end, and only then is it ended (or put to sleep). What
it gives back is claimed for the one it goes for. When that one needs it no more, the door is opened again.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from vllmd.core.ledger import device_label
from vllmd.core.placing import Blocked, account_for, coming_for, find_places
from vllmd.core.proofs import given_asleep, proof_of
from vllmd.core.refusals import no_room
from vllmd.core.states import Move, State
from vllmd.core.victims import Offer, choose, first_chance, heat, leaving, offers, reload_seconds, up_since, worth
from vllmd.core.world import Instance, World
from vllmd.spec import Cause
from vllmd.units import gib, span

SWAPS_MANY, HOUR = 20, 3600.0  # so many in an hour are worth a warning


@dataclass(frozen=True, slots=True)
class Later:
    """Nobody may be asked yet, but at `at` somebody may; infinite = when somebody has moved on by himself."""

    at: float


@dataclass(frozen=True, slots=True)
class Option:
    """One set of devices: what is missing there, and who would make it good."""

    blocked: Blocked
    missing: dict[str, int]
    offered: Sequence[Offer]
    chosen: tuple[Offer, ...] | None


def make_room(world: World, inst: Instance, now: float) -> tuple[str, ...] | Later | Cause:
    """Ask those to go whose going makes room: their names (also of those who go already). Later: nobody may be asked yet. A
    cause: it would not help if all went."""
    options = [option(world, inst, each, now) for each in find_places(world, inst) if isinstance(each, Blocked)]
    ready = [each for each in options if each.chosen is not None]
    if ready:
        best = min(ready, key=lambda each: worth(each.chosen or ()))
        return go(world, inst, best, now)
    chances = [at for each in options if (at := first_chance(each.missing, each.offered)) is not None]
    if chances:
        return Later(min(chances))
    if any(lingers(each) for each in options):
        return Later(math.inf)
    return never(world, max(options, key=lambda each: each.blocked.asked.account.left - each.blocked.asked.size))


def option(world: World, inst: Instance, blocked: Blocked, now: float) -> Option:
    """What one set of devices lacks, and who would give it now."""
    missing = {
        device: size - account_for(world, inst, device).left - coming_for(world, inst, device)
        for device, size in blocked.parts.items()
    }
    offered = [each for each in offers(world, inst, now) if set(each.gives) & set(missing)]
    return Option(blocked, missing, offered, choose(missing, [each for each in offered if each.at <= now]))


def lingers(option: Option) -> bool:
    """Whether the last look at its device still shows what has ended: the next one may say otherwise."""
    account = option.blocked.asked.account
    gone = [who for who, size in account.reading.instances.items() if size and who not in account.promised]
    return bool(gone) or any(account.returning.values())


def go(world: World, inst: Instance, option: Option, now: float) -> tuple[str, ...]:
    """Send the victims away and lay claim to what they leave."""
    for offer in option.chosen or ():
        evict(world, world.instances[offer.instance], inst.id, now, dozes=offer.dozes)
    inst.claim = dict(option.blocked.parts)
    gone = [offer.instance for offer in option.chosen or ()]
    if gone:
        inst.made_since = inst.made_since if inst.made_by else now
        inst.made_by = tuple(dict.fromkeys((*inst.made_by, *gone)))
    return tuple(dict.fromkeys([*gone, *going_on(world, option.blocked.parts)]))


def going_on(world: World, devices: Collection[str]) -> list[str]:
    """Those on their way out on these devices."""
    return [i.id for i in world.instances.values() if leaving(i) and set(i.devices) & set(devices)]


def evict(world: World, victim: Instance, whom: str, now: float, *, dozes: bool = False) -> None:
    """Take its place from an instance: at once where nothing of it runs, else when its requests have ended. `dozes`: it goes to
    sleep."""
    size = gib(sum(world.ledger.held.get(victim.id, {}).values()))
    if victim.state is State.ASLEEP:
        world.note("evict", f"asleep, ends: the {size} that it keeps go to {whom}", victim)
        victim.shut_for, victim.shut_at, victim.evicted = whom, now, True  # ended as soon as this event is handled
        return
    if victim.state is not State.READY:
        world.ledger.release(victim.id)
        world.note("evict", f"its place ({size}) goes to {whom}, which waits; nothing of it runs", victim)
        if victim.state is State.BACKOFF and victim.by_demand and not victim.line:
            victim.wanted = False
            world.move(victim, Move.CANCEL, now, f"makes room for {whom}")
        return
    idle = f"idle {span(now - (victim.used_at or up_since(victim) or now))}"
    if victim.under_way or victim.direct:
        idle = f"{victim.under_way + victim.direct} under way, {whom} has waited long enough"
    back = f"reload {span(reload_seconds(world, victim))}"
    if dozes and (proof := proof_of(world, victim)) is not None:
        size = f"sleeps, {gib(sum(given_asleep(world, victim).values()))} of {size}"
        back = f"awake in {span(proof.wake_s)}"
    words = f"{idle}, {size}, {back}, use {heat(victim, now):.1f}"
    world.note("evict", f"makes room for {whom} ({words})", victim)
    count_swap(world, victim, whom, now)
    victim.evicted, victim.dozes = True, dozes
    send_away(world, victim, whom, now)


def send_away(world: World, victim: Instance, whom: str, now: float) -> None:
    """No new requests; it ends when the gateway says that it is empty."""
    world.shut(victim, whom)
    victim.wanted, victim.told_empty = False, False
    victim.deadline = min(victim.deadline or math.inf, now + victim.spec.max_drain)
    world.dirty.add(victim.id)


def timeline(world: World, inst: Instance, now: float) -> str:
    """How long it took until there was room, and what of that each of those that went took for which part."""
    parts = []
    for victim in (world.instances[name] for name in inst.made_by if name in world.instances):
        told, drained, ended = victim.shut_at, victim.passed.get(State.DRAINING), victim.passed.get(State.STOPPING)
        dozed, asleep = victim.passed.get(State.DOZING), victim.passed.get(State.ASLEEP)
        if dozed is not None and asleep is not None and told <= dozed <= asleep:
            parts.append(
                f"{victim.id} emptied in {span(dozed - told)}, asleep with its memory back in {span(asleep - dozed)}"
            )
            continue
        if drained is None or ended is None or not told <= drained <= ended:
            continue
        words = f"{victim.id} emptied in {span(drained - told)}, drained in {span(ended - drained)}"
        rest = max((at for at in victim.passed.values() if at >= ended), default=now)
        parts.append(f"{words}, ended with its memory back in {span(rest - ended)}")
    return f"room after {span(now - inst.made_since)}" + (f": {'; '.join(parts)}" if parts else "")


def count_swap(world: World, victim: Instance, whom: str, now: float) -> None:
    """Each one counted; many in an hour are said, with the pair that does it most."""
    world.count("swaps", victim.spec.name, whom)
    world.swaps.append((now, victim.id, whom))
    while world.swaps and now - world.swaps[0][0] > HOUR:
        world.swaps.popleft()
    if len(world.swaps) > SWAPS_MANY and now - world.swaps_warned > HOUR:
        world.swaps_warned = now
        pairs = [frozenset(swap[1:]) for swap in world.swaps]
        most = max(pairs, key=pairs.count)
        world.note(
            "swaps",
            f"{len(world.swaps)} swaps in the last hour, most between {' and '.join(sorted(most))}: they do not fit"
            " together (vllmctl plan); smaller kv_cache or a longer min_resident would help",
            level="warning",
        )


def never(world: World, option: Option) -> Cause:
    """Nobody's going would help: the sum, and who is pinned there."""
    asked = option.blocked.asked
    cause = no_room(world, asked)
    pinned = [
        f"{i.id} {gib(world.ledger.held[i.id].get(asked.account.reading.id, 0))}"
        for i in world.instances.values()
        if i.spec.pinned and asked.account.reading.id in world.ledger.held.get(i.id, {})
    ]
    if not pinned:
        return cause
    text = f"{cause.text}; pinned on {device_label(asked.account.reading)}: {', '.join(pinned)}"
    return replace(cause, kind="no-room", text=text)


def reopen(world: World, now: float) -> list[Instance]:
    """Open those again whose going helps nobody any more. Returns them."""
    opened = []
    for inst in world.instances.values():
        if inst.state is not State.READY or not inst.shut_for or inst.shut_for not in world.instances:
            continue
        if not needs_room(world.instances[inst.shut_for]):
            inst.wanted, inst.evicted = True, False
            world.note("evict", f"stays: {inst.shut_for} needs its place no more", inst)
            world.open(inst)
            opened.append(inst)
    return opened


def needs_room(inst: Instance) -> bool:
    return inst.state in (State.WAITING, State.ASLEEP) and bool(inst.claim)
