"""Who fits with whom: placements tried on a copy of the books, with nothing running. Changes nothing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllmd.core.launch import memory_flags
from vllmd.core.ledger import Ledger, device_label
from vllmd.core.placing import Blocked, Placed, choose
from vllmd.core.world import Instance, World
from vllmd.facts import Inspection
from vllmd.spec import Cause

PAIRS_UP_TO = 24  # models; beyond that who fits beside whom is a table nobody reads

Json = dict[str, Any]


def plan(world: World, found: Mapping[str, Inspection | Cause]) -> Json:
    """The models in the given order on empty devices, each beside those before it that fitted. Sizes in bytes."""
    empty = bare(world)
    rows, budgets = [], [(device_label(r), empty.ledger.account(r.id).budget) for r in empty.ledger.readings.values()]
    for name, inspection in found.items():
        outcome = place(empty, name, inspection)
        if isinstance(outcome, Placed):
            empty.ledger.hold(name, {d.id: outcome.need.total for d in outcome.devices})
        rows.append(row(world, name, outcome) | {"fits_now": fits_now(world, name, inspection)})
    if len(found) <= PAIRS_UP_TO:
        for entry in rows:
            entry["beside"] = [
                other for other in found if other != entry["model"] and pair(world, entry["model"], other, found)
            ]
    return {"models": rows, "devices": [{"label": label, "budget": budget} for label, budget in budgets]}


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
    )
    copy.instances = {spec.name: Instance(spec.name, spec) for spec in world.settings.models.values()}
    return copy


def place(world: World, name: str, found: Inspection | Cause) -> Placed | Blocked | Cause:
    """Where one model would go in this world."""
    if isinstance(found, Cause):
        return found
    inst = world.instances[name]
    inst.found = found
    return choose(world, inst, inst.spec)


def fits_now(world: World, name: str, found: Inspection | Cause) -> bool:
    """Whether it could start beside what really runs; an instance that holds memory fits by definition."""
    if name in world.ledger.held:
        return True
    copy = World(world.settings, world.places, world.ledger, learned=world.learned, seen=world.seen, now=world.now)
    copy.instances = {**world.instances, name: Instance(name, world.settings.models[name])}
    return isinstance(place(copy, name, found), Placed)


def pair(world: World, one: str, two: str, found: Mapping[str, Inspection | Cause]) -> bool:
    """Whether two models fit together on otherwise empty devices."""
    empty = bare(world)
    for name in (one, two):
        outcome = place(empty, name, found[name])
        if not isinstance(outcome, Placed):
            return False
        empty.ledger.hold(name, {d.id: outcome.need.total for d in outcome.devices})
    return True


def row(world: World, name: str, outcome: Placed | Blocked | Cause) -> Json:
    """One model's line."""
    entry: Json = {
        "model": name,
        "fits": False,
        "devices": [],
        "need": None,
        "measured": False,
        "flags": [],
        "parts": [],
    }
    match outcome:
        case Placed():
            entry |= {
                "fits": True,
                "devices": [device_label(d) for d in outcome.devices],
                "need": outcome.need.total,
                "measured": outcome.need.measured,
                "flags": memory_flags(world.settings.models[name], outcome.need),
                "parts": [{"label": label, "size": size} for label, size in outcome.need.parts],
                "text": "",
            }
        case Blocked():
            entry |= {"need": outcome.need, "text": outcome.cause.text}
        case Cause():
            entry |= {"text": outcome.text}
    return entry
