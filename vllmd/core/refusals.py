"""Why a model does not fit: the whole sum in one sentence, and what would help, with numbers that do.

A sentence says in its parentheses what kind of thing helps; remedies are the commands and settings for it, tried before
they are proposed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vllmd.core.candidates import DeviceSet, answering, candidates
from vllmd.core.case import CONTEXT, PROCESSES, SLACK
from vllmd.core.ledger import Account, Ledger, smallest_release, takers
from vllmd.core.need import estimate, learned_key
from vllmd.core.states import State
from vllmd.core.world import World
from vllmd.facts import Inspection, Learned, Need
from vllmd.spec import Cause, ModelSpec, Remedy, Settings
from vllmd.units import GIB, MIB, gib, gib_of, spell_size

TOO_BIG = "too-big"  # the kind of cause that only another configuration heals


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for and did not fit: all that is needed to ask for less. `size` is for the device of `account`."""

    spec: ModelSpec
    found: Inspection
    learned: Learned | None
    need: Need
    size: int
    gpus: int
    budget: int  # a share of vram is a share of it
    account: Account


def no_room(world: World, asked: Asked) -> Cause:
    """It would fit on an emptier device."""
    account, spec = asked.account, asked.spec
    ends = (State.READY, State.ASLEEP, State.STARTING, State.BACKOFF)
    others = [i for i in account.promised if i in world.instances and world.instances[i].state in ends]
    stops = smallest_release(account, asked.size, others)
    less = f"lower {'kv_cache' if spec.vram is None else 'vram'}"
    help_ = f"stop {', '.join(stops)}, or {less}" if stops else f"{less}, or free memory"
    remedies = [Remedy(f"vllmctl stop {' '.join(stops)}")] if stops else []
    remedies += smaller(asked, max(0, account.left))
    return Cause(
        "no-room",
        f"cannot start {spec.name}: needs {gib(asked.size)} on {account.label}, "
        f"{gib_of(max(0, account.left), account.budget)} left: {takers(account)} ({help_})",
        f"no room for {gib(asked.size)}",
        tuple(remedies),
    )


def never_fits(asked: Asked) -> Cause:
    """It needs more than the whole budget."""
    account, spec, need = asked.account, asked.spec, asked.need
    parts = " + ".join(f"{label} {gib(size)}" for label, size in need.parts)
    if asked.size != need.total:
        parts = f"the share that gives its smaller card {gib(need.total)}"
    remedies = list(smaller(asked, account.budget))
    if asked.size <= account.reading.total - account.reserve:
        remedies.append(Remedy(f'raise limit in [devices] to "{round_up(asked.size)}"'))
    if not remedies:
        remedies.append(Remedy(f"a smaller or quantized model, or more GPUs: models.{spec.name}.gpus"))
    return Cause(
        TOO_BIG,
        f"cannot start {spec.name}: needs {gib(asked.size)} ({parts}),"
        f" the whole budget of {account.label} is {gib(account.budget)}",
        f"needs {gib(asked.size)}",
        tuple(remedies[:2]),
        heals=False,
    )


def smaller(asked: Asked, room: int) -> Iterator[Remedy]:
    """The one setting that makes it fit into `room`, if any does."""
    spec, need = asked.spec, asked.need
    key = f"models.{spec.name}"
    if spec.vram is not None:
        less = room // (256 * MIB) * (256 * MIB)
        if less and fits(asked, replace(spec, vram=less), room):
            yield Remedy(f'{key}.vram = "{spell_size(less)}"')
        return
    over = asked.size - room
    # What a share of the device loses by rounding grows with it: a little less than the difference is not enough.
    kv = ((need.kv or 0) - over - over // 20) // (64 * MIB) * (64 * MIB)
    if kv > 0 and fits(asked, replace(spec, kv_cache=kv), room):
        yield Remedy(f'{key}.kv_cache = "{spell_size(kv)}"')
    elif kv > 0 and need.kv and need.context:
        length = need.context * kv // need.kv // 256 * 256
        if length and fits(asked, replace(spec, kv_cache=None, max_model_len=length), room):
            yield Remedy(f"{key}.max_model_len = {length}")


def fits(asked: Asked, spec: ModelSpec, room: int) -> bool:
    """Whether the model could run so in `room` bytes."""
    learned = asked.learned if spec.max_model_len == asked.spec.max_model_len else None
    outcome = estimate(spec, asked.found, asked.account.reading, learned, asked.gpus, asked.budget)
    return isinstance(outcome, Need) and outcome.total <= room


def round_up(size: int) -> str:
    """A size for a configuration, to the next half GiB."""
    return spell_size(-(-size // (GIB // 2)) * (GIB // 2))


# -- before anything is started ---------------------------------------------------------------------------------------


def never_fit(world: World, settings: Settings) -> dict[str, Cause]:
    """The models that no device of theirs can ever hold under these settings, as far as it is known: by what is given, and
    by the files of those that were looked at already. Devices that are missing now are not judged."""
    ledger = Ledger(settings.devices, world.ledger.readings)
    seen = World(settings, world.places, ledger, learned=world.learned, seen=world.seen, now=world.now)
    accounts = {reading.id: ledger.account(reading.id) for reading in answering(seen)}
    refused = {}
    for spec in settings.models.values():
        sets = candidates(seen, spec, accounts)
        if isinstance(sets, Cause):
            continue
        inst = world.instances.get(spec.name)
        same = inst is not None and (inst.spec.model, inst.spec.executable) == (spec.model, spec.executable)
        cause = cannot_ever(seen, spec, inst.found if inst is not None and same else None, sets)
        if cause is not None:
            refused[spec.name] = cause
    return refused


def cannot_ever(world: World, spec: ModelSpec, found: Inspection | None, sets: Sequence[DeviceSet]) -> Cause | None:
    """Why none of these device sets can ever hold the model; None where one may."""
    best: tuple[int, Account] | None = None
    for devices in sets:
        account = min((world.ledger.account(d.id) for d in devices), key=lambda a: a.budget)
        size = least(world, spec, found, devices, account)
        if size <= account.budget:
            return None
        if best is None or account.budget > best[1].budget:
            best = size, account
    if best is None:
        return None
    size, account = best
    key = "vram" if isinstance(spec.vram, int) else "kv_cache" if spec.kv_cache else "model"
    remedies = []
    if key == "vram" and (most := account.budget // MIB * MIB):
        remedies.append(Remedy(f'models.{spec.name}.vram = "{spell_size(most)}"'))
    if size <= account.reading.total - account.reserve:
        remedies.append(Remedy(f'raise limit in [devices] to "{round_up(size)}"'))
    return Cause(
        TOO_BIG,
        f"models.{spec.name}.{key}: {gib(size)} can never fit, the largest budget is {gib(account.budget)} of {account.label}",
        f"needs {gib(size)}",
        tuple(remedies) or (Remedy(f"a smaller or quantized model, or more GPUs: models.{spec.name}.gpus"),),
        heals=False,
    )


def least(world: World, spec: ModelSpec, found: Inspection | None, devices: DeviceSet, account: Account) -> int:
    """Bytes of each device below which the model cannot run, as far as that is known."""
    if isinstance(spec.vram, int):
        return spec.vram
    if found is not None and found.model.weights:
        known = world.learned.get(learned_key(spec, found, devices))
        outcome = estimate(spec, found, account.reading, known, len(devices), account.budget)
        return outcome.total if isinstance(outcome, Need) else 0
    return (spec.kv_cache or 0) + (PROCESSES if account.reading.kind == "cpu" else CONTEXT + SLACK)
