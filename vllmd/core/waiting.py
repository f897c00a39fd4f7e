"""What those who wait are told: for whose memory, for whose move, and how far that is."""

from collections.abc import Iterable

from vllmd.core.failing import set_cause
from vllmd.core.placing import Blocked
from vllmd.core.states import State
from vllmd.core.world import Instance, World
from vllmd.spec import Cause
from vllmd.units import count, gib


def busy_word(world: World, busy: Iterable[str]) -> str:
    return "is measuring its memory" if any(world.instances[b].measuring for b in busy) else "is moving memory"


def hold_in_line(world: World, inst: Instance, blocked: Blocked, cause: Cause, coming: tuple[str, ...]) -> None:
    """Wait for memory: it is being freed, or an automatic start can afford to."""
    inst.waits_for = coming
    inst.accepted = True  # accepted is accepted: what was promised to come may come late
    account = blocked.asked.account
    left = gib(max(0, account.left))
    inst.waiting_text = f"waiting for memory: needs {gib(blocked.asked.size)} on {account.label}, {left} left"
    if coming:
        inst.waiting_text += f"; {'; '.join(departure(world.instances[name]) for name in coming)}"
    note_cause(world, inst, cause)
    world.answer(inst, 202, f"{inst.id}: {inst.waiting_text}")


def departure(inst: Instance) -> str:
    """How far one who makes room is: "chat finishes 2 requests first"."""
    if inst.state is State.DOZING:
        return f"{inst.id} falls asleep"
    if inst.state is not State.READY:
        return f"{inst.id} is stopping"
    return f"{inst.id} finishes {count(max(1, inst.under_way + inst.direct), 'request')} first"


def note_cause(world: World, inst: Instance, cause: Cause) -> None:
    """Why it waits; since when does not change with every look."""
    set_cause(world, inst, cause, inst.since)
