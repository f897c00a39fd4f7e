"""Going on where an earlier daemon was when it ended, killed or restarted.

`keep` makes the record of an instance, `restore` an instance from it. An engine that still lives is adopted with its
attempt, its promise and its place in the line of failures; one that died meanwhile crashed, and the policy for crashes
follows. What was under way goes on: a drain keeps its limit, a kill is done again, a backoff ends when it would have. Nothing
is started twice: only what has no process is.
"""

from vllmd.core import stops
from vllmd.core.health import arm
from vllmd.core.starts import want
from vllmd.core.states import ALIVE, Move, State, next_state
from vllmd.core.world import Instance, World
from vllmd.events import Adopt, KillTree, ReadDevices, Save, Terminate
from vllmd.facts import EngineFacts, Inspection, ModelFacts
from vllmd.record import Record, Survivor
from vllmd.units import span

#: Fields that an instance and its record share.
SHARED = (
    "attempt", "wanted", "since", "deadline", "pid", "pid_start", "launch", "devices", "need", "key", "measuring",
    "drain_held", "hurried", "crashed", "insisted", "started", "ready_at", "broke_at", "figures", "learned",
    "disturbed", "by_demand", "full", "residual", "evicted", "slept_at", "verdict", "cause", "cause_at", "cause_memory",
    "changed", "last", "last_at", "restarts",
)  # fmt: skip

#: How an instance that is stopped comes to be what the record says, by moves of the table.
PATHS = {
    State.STARTING: (Move.ADOPT,),
    State.READY: (Move.ADOPT, Move.READY),
    State.ASLEEP: (Move.ADOPT, Move.READY, Move.SLEEP, Move.ASLEEP),
    State.DRAINING: (Move.ADOPT, Move.READY, Move.DRAIN),
    State.STOPPING: (Move.ADOPT, Move.END),
    State.BACKOFF: (Move.WANT, Move.RETRY),
    State.FAILED: (Move.WANT, Move.GIVE_UP),
}


def keep(world: World, inst: Instance) -> Save:
    """The record of an instance as it is now."""
    found = inst.found
    shared = {name: getattr(inst, name) for name in SHARED}
    return Save(
        Record(
            id=inst.id, model=inst.spec.name, state=str(inst.state), closing=world.closing,
            held=dict(world.ledger.held.get(inst.id, {})), phases=dict(inst.phases), failures=tuple(inst.failures),
            executable=found.engine.executable if found else "", version=found.engine.version if found else "",
            fingerprint=found.model.fingerprint if found else "", **shared,
        )
    )  # fmt: skip


def restore(world: World, inst: Instance, survivor: Survivor, now: float) -> None:
    """Bring an instance that is stopped to where its record was."""
    record = survivor.record
    state = State(record.state)
    inst.attempt, inst.restarts, inst.failures = record.attempt, record.restarts, list(record.failures)
    inst.last, inst.last_at, inst.since = record.last, record.last_at, now
    if state in ALIVE and survivor.spawned:
        # Whether one that was falling asleep or waking did so nobody can tell.
        lost = record.closing or state in (State.DOZING, State.WAKING)
        take_over(world, inst, survivor, State.STOPPING if lost else state, now)
    elif record.closing:
        if configured(world, inst) and inst.spec.autostart:
            want(world, inst, now, patient=True)
    elif not configured(world, inst):
        world.dirty.discard(inst.id)
    elif state in (State.BACKOFF, State.FAILED) and not survivor.changed:
        recall(world, inst, record, state)
        world.note("adopted", f"{state} as before: {record.cause.text if record.cause else 'no cause is known'}", inst)
    elif record.wanted:
        # It waited, was about to be spawned, or failed with another configuration.
        want(world, inst, now, patient=True)


def take_over(world: World, inst: Instance, survivor: Survivor, state: State, now: float) -> None:
    """Processes of it live, or did when the daemon before last looked."""
    record = survivor.record
    recall(world, inst, record, state)
    assert record.launch is not None and record.pid is not None
    ready = state in (State.READY, State.ASLEEP, State.DRAINING)
    world.emit(
        Adopt(inst.id, inst.attempt, inst.spec.name, record.launch, record.pid, record.pid_start, ready)
    )  # fmt: skip
    told = f"{state}, adopted" if survivor.alive else f"{state} when it was left, gone now"
    world.note("adopted", told + (f" (up {span(now - inst.ready_at)})" if ready and inst.ready_at else ""), inst)
    match state:
        case State.STARTING:
            inst.resumed = True
            inst.heard, inst.phase_since, inst.deadline = now, now, now + inst.spec.start_stall
        case State.READY:
            inst.proved, inst.tokens_at, inst.used_at = now, now, now
            inst.wanted, inst.evicted = True, False  # it was about to make room, perhaps: who needs that will ask again
            world.open(inst)
            arm(inst)
            world.emit(ReadDevices())
        case State.ASLEEP:
            inst.deadline = None
        case State.DRAINING:
            inst.deadline = record.deadline if record.deadline is not None else now + inst.spec.drain
            if not inst.drain_held:
                world.emit(Terminate(inst.id, inst.attempt))  # vLLM ignores a second one
        case _:
            inst.deadline = now + stops.KILL_AGAIN
            if record.closing:
                inst.wanted, inst.crashed, inst.verdict = inst.spec.autostart, False, None
            world.emit(KillTree(inst.id, inst.attempt, inst.crashed))
    follow_configuration(world, inst, survivor, now)


def follow_configuration(world: World, inst: Instance, survivor: Survivor, now: float) -> None:
    """What was adopted may not be what is configured now."""
    if not configured(world, inst):
        stops.stop(world, inst, now)
    elif survivor.changed and survivor.alive:
        why = f"its configuration changed ({', '.join(survivor.changed)})"
        if inst.state is State.READY:
            stops.drain(world, inst, now, why)
        elif inst.state in (State.STARTING, State.ASLEEP):
            stops.end(world, inst, now, why)


def configured(world: World, inst: Instance) -> bool:
    return inst.spec.name in world.settings.models


def recall(world: World, inst: Instance, record: Record, state: State) -> None:
    """Take the record's fields over. Quietly: nothing of it is news."""
    for name in SHARED:
        setattr(inst, name, getattr(record, name))
    inst.phases = dict(record.phases)
    inst.pids = (record.pid,) if record.pid is not None else ()
    inst.found = Inspection(
        ModelFacts(None, fingerprint=record.fingerprint), EngineFacts(record.executable, record.version)
    )  # fmt: skip
    for move in PATHS[state]:
        inst.state = next_state(inst.state, move)
    if record.held:
        world.ledger.recall(inst.id, record.held)
    world.dirty.add(inst.id)
