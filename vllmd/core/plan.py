"""Who fits with whom: placements tried on a copy of the books, with nothing running. Changes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from vllmd.core.launch import memory_flags
from vllmd.core.ledger import Ledger, device_label
from vllmd.core.placing import Blocked, Placed, find_place
from vllmd.core.refusals import no_room
from vllmd.core.world import Instance, World
from vllmd.facts import Inspection
from vllmd.spec import Cause
from vllmd.units import count

PAIRS_UP_TO = 24  # models; beyond that who fits beside whom is a table nobody reads

Json = dict[str, Any]
Outcome = Placed | Blocked | Cause
Found = Mapping[str, Inspection | Cause]


def plan(world: World, found: Found, *, together: bool) -> Json:
    """The models on empty devices: all of them at once (`together`: somebody named them), or each for itself. Beside each:
    whether it fits alone, with whom two fit, and whether it would fit beside what runs now. Sizes in bytes."""
    empty = bare(world)
    alone = {name: place(empty, name, inspection) for name, inspection in found.items()}
    outcomes = best_order(empty, found, alone) if together else alone
    beside = partners(empty, found, alone) if len(found) <= PAIRS_UP_TO else {}
    rows = []
    for name, outcome in outcomes.items():
        fits_alone = isinstance(alone[name], Placed)
        entry = row(empty, name, outcome)
        entry |= {"alone": fits_alone, "fits_now": fits_now(world, name, found[name])}
        if name in beside:
            entry["beside"] = beside[name]
        if fits_alone and not entry["fits"]:
            entry["text"] += "; " + by_itself(alone[name], beside.get(name, ()))
        rows.append(entry)
    devices = [
        {"label": device_label(r), "budget": empty.ledger.account(r.id).budget} for r in empty.ledger.readings.values()
    ]
    return {"models": rows, "devices": devices, "text": summary(rows, together)}


def by_itself(outcome: Outcome, partners: Sequence[str]) -> str:
    assert isinstance(outcome, Placed)
    where = ", ".join(map(device_label, outcome.devices))
    return f"it fits alone on {where}" + (f", or with one of {', '.join(partners)}" if partners else "")


def summary(rows: Sequence[Json], together: bool) -> str:
    """What the rows say as a whole, in a sentence."""
    if len(rows) < 2:
        return ""
    if together:
        missing = [entry["model"] for entry in rows if not entry["fits"]]
        return (
            f"these {len(rows)} do not fit together: {', '.join(missing)} left out" if missing else "all fit together"
        )
    single = [entry["model"] for entry in rows if entry["fits"] and entry.get("beside") == []]
    text = f"{count(len(rows), 'model')}, each for itself; beside: with which one of the others it fits"
    return text + (f"; with none: {', '.join(single)}" if single else "")


def bare(world: World) -> World:
    """The same devices and knowledge with nothing of ours running."""
    readings = {
        name: replace(r, instances={}, used=max(0, r.used - sum(r.instances.values())))
        for name, r in world.ledger.readings.items()
    }
    copy = World(
        world.settings,
        world.places,
        Ledger(world.ledger.rules, readings),
        learned=world.learned,
        seen=world.seen,
        now=world.now,
        trouble=world.trouble,
    )
    copy.instances = {spec.name: Instance(spec.name, spec) for spec in world.settings.models.values()}
    return copy


def place(world: World, name: str, found: Inspection | Cause) -> Outcome:
    """Where one model would go in this world."""
    if isinstance(found, Cause):
        return found
    inst = world.instances[name]
    inst.found = found
    return find_place(world, inst)


def fill(empty: World, names: Sequence[str], found: Found) -> dict[str, Outcome]:
    """One after the other, each beside those before it that fitted; the devices are empty again afterwards."""
    outcomes: dict[str, Outcome] = {}
    for name in names:
        outcome = outcomes[name] = place(empty, name, found[name])
        if isinstance(outcome, Placed):
            empty.ledger.hold(name, outcome.parts)
    empty.ledger.held.clear()
    return outcomes


def fitting(outcomes: Mapping[str, Outcome]) -> int:
    return sum(isinstance(outcome, Placed) for outcome in outcomes.values())


def best_order(empty: World, found: Found, alone: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """All together, in the order given or the largest first, whichever places more of them."""
    given = fill(empty, list(found), found)
    if fitting(given) == len(found):
        return given
    sized = sorted(found, key=lambda name: -size_of(alone[name]))
    other = fill(empty, sized, found)
    return {name: other[name] for name in found} if fitting(other) > fitting(given) else given


def size_of(outcome: Outcome) -> int:
    return max(outcome.parts.values()) if isinstance(outcome, Placed) else 0


def partners(empty: World, found: Found, alone: Mapping[str, Outcome]) -> dict[str, list[str]]:
    """By model, the others that fit beside it on otherwise empty devices, whichever of the two starts first."""
    pairs = set()
    for one, two in combinations([name for name in found if isinstance(alone[name], Placed)], 2):
        if any(fitting(fill(empty, order, found)) == 2 for order in ((one, two), (two, one))):
            pairs |= {(one, two), (two, one)}
    return {name: [other for other in found if (name, other) in pairs] for name in found}


def fits_now(world: World, name: str, found: Inspection | Cause) -> bool:
    """Whether it could start beside what really runs; an instance that holds memory fits by definition."""
    if name in world.ledger.held:
        return True
    if isinstance(found, Cause):
        return False
    copy = World(world.settings, world.places, world.ledger, learned=world.learned, seen=world.seen, now=world.now)
    copy.instances = {**world.instances, name: Instance(name, world.settings.models[name])}
    return isinstance(place(copy, name, found), Placed)


def row(empty: World, name: str, outcome: Outcome) -> Json:
    """One model's line."""
    entry: Json = {
        "model": name,
        "fits": False,
        "devices": [],
        "need": None,
        "measured": False,
        "flags": [],
        "parts": [],
        "text": "",
    }
    match outcome:
        case Placed(need=need):
            entry |= {
                "fits": True,
                "devices": [device_label(d) for d in outcome.devices],
                "need": need.total,
                "measured": need.measured,
                "flags": memory_flags(empty.settings.models[name], need),
                "parts": [{"label": label, "size": size} for label, size in need.parts],
            }
        case Blocked(asked=asked):
            entry |= {"need": asked.size, "text": no_room(empty, asked).text}
        case Cause():
            entry |= {"text": outcome.text}
    return entry
