"""What is known of an engine's sleep: whether it may be relied on, what it would leave in use, and who is to be woken.

vLLM's sleep mode keeps the processes and gives memory back: at level 1 the weights go to host memory, at level 2 they are
dropped and loaded again. What stays (contexts, graphs, what leaks) is known from a swap-test only, and so nothing sleeps
without one.
"""

from vllmd.core.states import State
from vllmd.core.world import Instance, World
from vllmd.events import Prove
from vllmd.facts import Proof
from vllmd.spec import level_of
from vllmd.units import MIB

FREED_LEAST = 256 * MIB  # a sleep that gives back less than this is none: readings wobble


def proof_of(world: World, inst: Instance) -> Proof | None:
    """The proof for the level that is configured, for this very model, engine and kind of device."""
    proof = world.proofs.get(inst.key)
    return proof if proof is not None and proof.level == level_of(inst.spec) else None


def under_trial(inst: Instance) -> bool:
    return inst.trial is not None and inst.trial.on


def given_asleep(world: World, inst: Instance) -> dict[str, int]:
    """What of its promise would come free if it slept, by device; {} = its sleep is not proved, or frees nothing."""
    proof = proof_of(world, inst)
    if proof is None or proof.freed < FREED_LEAST or inst.state not in (State.READY, State.DOZING):
        return {}
    held = world.ledger.held.get(inst.id, {})
    return {device: size - proof.residual for device, size in held.items() if size > proof.residual}


def frees(world: World, inst: Instance, device: str) -> int:
    """What one that leaves gives back of a device."""
    if inst.state is State.DOZING or (inst.state is State.READY and inst.dozes):
        return given_asleep(world, inst).get(device, 0)
    return world.ledger.held.get(inst.id, {}).get(device, 0)


def wanted_awake(inst: Instance) -> bool:
    """Whether somebody waits for one that sleeps."""
    return inst.state is State.ASLEEP and not inst.shut_for and (called_for(inst) or under_trial(inst))


def called_for(inst: Instance) -> bool:
    """Whether requests wait for it, an operator does, or its home."""
    return bool(inst.line or inst.roused_at) or (inst.evicted and (inst.spec.home or inst.returns))


def unproved(inst: Instance) -> str:
    """What is missing before it may sleep."""
    if not level_of(inst.spec):
        return f'{inst.id} cannot sleep: set models.{inst.spec.name}.swap = "sleep1", then vllmctl swap-test {inst.id}'
    return f"{inst.id} cannot sleep yet: vllmctl swap-test {inst.id} must show first that it wakes as it was"


def withdraw(world: World, inst: Instance, why: str) -> None:
    """Its sleep may not be relied on any more."""
    if world.proofs.pop(inst.key, None) is not None:
        world.emit(Prove(inst.key, None))
        text = f"{why}: from now on it makes room by ending, until vllmctl swap-test {inst.id} succeeds"
        world.note("sleep", text, inst, "warning")
