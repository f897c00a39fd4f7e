"""Which devices a model may go to: single ones, or sets for tensor parallelism. Nothing here asks whether it fits.

A set is made of equal cards: it runs at the pace of its smallest, and vLLM takes the same share of every card's own total.
Only where there are not enough equal ones, or where the operator names them, is a set mixed. Of a group of equal cards no
combinations are tried: the ones with most room are the best set there is.
"""

from collections.abc import Iterable, Mapping, Sequence

from vllmd.core.ledger import Account, device_label
from vllmd.core.world import World
from vllmd.facts import DeviceReading
from vllmd.spec import Cause, ModelSpec, Remedy
from vllmd.units import GIB, count

#: Seconds without a reading after which nothing new is started on a device: what it holds is not known any more.
SILENT = 30.0

DeviceSet = tuple[DeviceReading, ...]


def answering(world: World) -> list[DeviceReading]:
    """The devices whose last reading is fresh."""
    return [r for r in world.ledger.readings.values() if world.now - world.seen.get(r.id, -SILENT) < SILENT]


def candidates(
    world: World, spec: ModelSpec, accounts: Mapping[str, Account], busy: Iterable[str] = ()
) -> Sequence[DeviceSet] | Cause:
    """The device sets a model may use, or why there is none. `accounts` are those of the devices that answer, `busy` the
    devices on which a start would have to wait for a neighbour."""
    fresh = [account.reading for account in accounts.values()]
    if not fresh:
        return no_device(world, spec)
    if isinstance(spec.gpus, tuple):
        return named(world, spec, spec.gpus, fresh)
    number = spec.gpus or 1
    if number == 1:
        return [(reading,) for reading in fresh]
    return sets_of(world, spec, number, accounts, frozenset(busy))


def named(
    world: World, spec: ModelSpec, names: Sequence[str], fresh: Sequence[DeviceReading]
) -> list[DeviceSet] | Cause:
    """Exactly the devices that the operator names."""
    chosen: list[DeviceReading] = []
    for name in names:
        hit = next((r for r in fresh if is_called(r, name)), None)
        if hit is None:
            return missing_device(
                world, spec, name, fresh, any(is_called(r, name) for r in world.ledger.readings.values())
            )
        if hit in chosen:
            return twice(spec, hit, names)
        chosen.append(hit)
    return [tuple(chosen)]


def is_called(reading: DeviceReading, name: str) -> bool:
    return name in (reading.id, str(reading.index)) or (reading.kind == "cpu" and name == "cpu")


def sets_of(
    world: World, spec: ModelSpec, number: int, accounts: Mapping[str, Account], busy: frozenset[str]
) -> list[DeviceSet] | Cause:
    """Of each group of equal cards the `number` with most room, and, where that is another set, those of them on which
    nobody moves."""
    cards = [account.reading for account in accounts.values() if account.reading.kind == "gpu"]
    if len(cards) < number:
        known = sum(r.kind == "gpu" for r in world.ledger.readings.values())
        fresh = [account.reading for account in accounts.values()]
        return missing_device(world, spec, count(number, "GPU"), fresh, known >= number)
    groups: dict[tuple[str, int], list[DeviceReading]] = {}
    for reading in cards:
        groups.setdefault((reading.name, size_class(reading)), []).append(reading)
    enough = [group for group in groups.values() if len(group) >= number]
    if not enough:
        enough = [sorted(cards, key=lambda r: -size_class(r))[: max(number, sum_of_largest(cards, number))]]
    found: list[DeviceSet] = []
    for group in enough:
        roomy = sorted(group, key=lambda r: (-accounts[r.id].left, r.index or 0))
        calm = [r for r in roomy if r.id not in busy]
        for order in (roomy, calm):
            chosen = tuple(sorted(order[:number], key=lambda r: r.index or 0))
            if len(chosen) == number and chosen not in found:
                found.append(chosen)
    return found


def sum_of_largest(cards: Sequence[DeviceReading], number: int) -> int:
    """How many cards are at least as large as the `number`-th largest: a mixed set is of the largest there are."""
    least = sorted((size_class(r) for r in cards), reverse=True)[number - 1]
    return sum(size_class(r) >= least for r in cards)


def size_class(reading: DeviceReading) -> int:
    """Cards of one make differ by some MiB; whole GiB are what they are sold by."""
    return round(reading.total / GIB)


# -- why there is none ------------------------------------------------------------------------------------------------


def no_device(world: World, spec: ModelSpec) -> Cause:
    """Nothing answers. That may pass."""
    return Cause(
        "no-device",
        f"cannot start {spec.name}: no device answers" + (f" ({world.trouble})" if world.trouble else ""),
        "no device",
        (Remedy("vllmctl devices shows what is seen; check the driver with nvidia-smi"),),
    )


def missing_device(world: World, spec: ModelSpec, name: str, fresh: Sequence[DeviceReading], known: bool) -> Cause:
    """What the model wants does not answer. It heals where it was seen earlier, or where the driver is in trouble."""
    have = ", ".join(f"{device_label(r)} {r.id}" if r.kind != "cpu" else "cpu" for r in fresh)
    if known or world.trouble:
        why = f" ({world.trouble})" if world.trouble else ""
        return Cause(
            "device-silent",
            f"cannot start {spec.name}: {name} does not answer{why}; seen: {have}",
            "device does not answer",
            (Remedy("vllmctl devices shows what is seen; check the driver with nvidia-smi"),),
        )
    return Cause(
        "device-missing",
        f"cannot start {spec.name}: {name} is not present (seen: {have})",
        "device missing",
        (Remedy(f'set models.{spec.name}.gpus to what is there, or "auto"'),),
        heals=False,
    )


def twice(spec: ModelSpec, reading: DeviceReading, names: Sequence[str]) -> Cause:
    """One card cannot take two shards."""
    called = " and ".join(f'"{name}"' for name in names if is_called(reading, name))
    return Cause(
        "device-twice",
        f"cannot start {spec.name}: its gpus name {device_label(reading)} twice ({called})",
        "device named twice",
        (Remedy(f"name each device once in models.{spec.name}.gpus"),),
        heals=False,
    )
