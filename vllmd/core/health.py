"""Watching what runs: ready, proofs of life, hangs, stalls. What it uses is watched in usage.py.

vLLM's /health says 200 with a frozen engine, so a proof is something that the engine itself did: a token counter moved,
or a 1-token request came back.
"""

from vllmd.core.failing import profile
from vllmd.core.policy import canary_due, hung_at
from vllmd.core.starts import close_phase, pump, ready_text
from vllmd.core.states import Move, State
from vllmd.core.stops import end, release_drains
from vllmd.core.victims import busy, up_since
from vllmd.core.world import Instance, World
from vllmd.events import Canary, CanaryBack, Keep, Pulse, ReadDevices, Ready
from vllmd.spec import Cause, Remedy
from vllmd.units import span

OVERSLEPT = 5.0  # seconds over a deadline after which vllmd itself is taken to have been stopped


def ready(world: World, inst: Instance, event: Ready, now: float) -> None:
    """It serves, and it is ours."""
    if inst.state is not State.STARTING:
        return
    close_phase(inst, now)
    took = now - inst.started
    inst.measuring = False
    inst.remeasured = inst.remeasured and inst.disturbed
    inst.pids = event.pids
    inst.cause, inst.leak, inst.changed, inst.peak = None, "", (), {}
    world.good[inst.spec.name] = profile(world, inst)
    world.emit(Keep(inst.spec.name, world.good[inst.spec.name]))
    world.move(inst, Move.READY, now, ready_text(world, inst, took))
    inst.ready_at, inst.proved, inst.phase = now, now, None
    inst.tokens_at = now
    arm(inst)
    release_drains(world, now)
    world.emit(ReadDevices())  # teaches its real need
    pump(world, now)


def hangs_at(inst: Instance) -> float | None:
    """When it counts as hung if it shows nothing until then; None: it must be asked first."""
    asked = inst.asked if inst.canary_works else inst.proved
    return None if asked is None else hung_at(inst.proved, asked, inst.spec.hang_after)


def arm(inst: Instance) -> None:
    """When a ready instance is looked at next: for the next canary, or because it counts as hung then."""
    hung = hangs_at(inst)
    watch_hang = hung is not None and (inst.canary_out or not inst.canary_works)
    watch(inst, hung if hung is not None and watch_hang else canary_due(inst.proved, inst.spec.hang_after))


def watch(inst: Instance, at: float) -> None:
    """The one deadline of a ready instance: at `at` for its health, and before that for its ttl, or because it is shut."""
    inst.alive_at = at
    inst.deadline = min(
        filter(None, (at, ttl_due(inst), inst.shut_at + inst.spec.max_drain if inst.shut_for else None))
    )


def ttl_due(inst: Instance) -> float | None:
    """When it will have been idle for its ttl; None while it is busy, and without a ttl."""
    since = up_since(inst)
    if inst.spec.ttl is None or since is None or inst.shut_for or busy(inst):
        return None
    return max(inst.used_at, since) + inst.spec.ttl


def pulse(inst: Instance, event: Pulse, now: float) -> None:
    """Counters of a ready engine."""
    if inst.state not in (State.READY, State.DRAINING):
        return
    looked, elapsed = inst.tokens_at, now - inst.tokens_at
    if elapsed > 0:
        inst.tokens_per_s = max(0.0, event.tokens - inst.tokens) / elapsed
    inst.tokens, inst.tokens_at = event.tokens, now
    inst.running, inst.waiting = event.running, event.waiting
    if inst.state is not State.READY:
        return
    came_past(inst, event.running + event.waiting, now)
    idle = event.running == 0 and event.waiting == 0
    # An engine that answers no canary and has nothing to do cannot prove itself; that is no reason to kill it.
    if idle and not inst.canary_works:
        proved(inst, now)
    elif event.moved:
        # Some time since the last look: as if right after it, so that a hang is found within hang_after, not later.
        proved(inst, max(inst.proved, looked))
    if inst.ready_at is not None and now - inst.ready_at >= inst.spec.restart.reset_after:
        inst.failures.clear()


def came_past(inst: Instance, running: int, now: float) -> None:
    """Requests that are at the engine and not the gateway's. One look may have met a test request, or one that the gateway has
    not told of yet: what two of them saw is there."""
    beside = 0 if inst.canary_out else max(0, running - inst.under_way)
    inst.direct, inst.direct_seen = min(beside, inst.direct_seen), beside
    if inst.direct:
        inst.used_at = now
    watch(inst, inst.alive_at)


def proved(inst: Instance, now: float) -> None:
    """The engine did something."""
    inst.proved = now
    if not inst.canary_out:
        inst.asked = None
    arm(inst)


def canary_back(inst: Instance, event: CanaryBack, now: float) -> None:
    """A 1-token request ended."""
    if inst.state is not State.READY:
        return
    inst.canary_out = False
    if event.ok is None:
        inst.canary_works = False
    if event.ok is not False:
        proved(inst, now)
        return
    # Refused or timed out: ask again, but never later than the time at which it counts as hung.
    again, hung = now + inst.spec.hang_after / 8, hangs_at(inst)
    watch(inst, again if hung is None else min(again, hung))


def silent(world: World, inst: Instance, now: float) -> None:
    """A ready instance's deadline: ask it for a token, or call it hung."""
    hung = hangs_at(inst)
    if hung is None or now < hung:
        inst.asked = now if inst.asked is None else inst.asked
        inst.canary_out = True
        watch(inst, hangs_at(inst) or now + inst.spec.hang_after)
        world.emit(Canary(inst.id, inst.attempt))
        return
    seen = f"{inst.running} requests running, " if inst.running else ""
    text = f"{inst.id}: {seen}no token and no answer for {span(now - inst.proved)}: engine hung, restarting"
    world.count("hangs", inst.spec.name)
    world.note("hung", text, inst, "error")
    cause = Cause(
        "hung",
        f"engine hung: {seen}no token and no answer to a test request for {span(now - inst.proved)}",
        "engine hung",
        (
            Remedy(f"vllmctl logs --previous {inst.id}"),
            Remedy(f"raise models.{inst.spec.name}.hang_after if its steps are that long"),
        ),
    )
    end(world, inst, now, cause.text, crashed=True, verdict=cause)


def stalled(world: World, inst: Instance, now: float) -> None:
    """A start without a sign of life."""
    phase = f" while {inst.phase}" if inst.phase else ""
    cause = Cause(
        "stalled",
        f"no sign of life for {span(now - inst.heard)}{phase}: start given up",
        "start stalled",
        (Remedy(f"vllmctl logs --failed {inst.id}"), Remedy(f"raise models.{inst.spec.name}.start_stall")),
        phase=str(inst.phase or ""),
    )
    end(world, inst, now, cause.text, crashed=True, verdict=cause)


def overslept(world: World, gap: float) -> None:
    """A deadline is long over and nobody has told: vllmd itself was stopped or starved for up to `gap` seconds, the time
    since its last event. It heard nobody meanwhile; whoever was silent in that time is given it back."""
    world.note("late", f"vllmd did not run for {span(gap)}: nobody's silence in that time counts", level="warning")
    for inst in world.instances.values():
        inst.heard, inst.proved = inst.heard + gap, inst.proved + gap
        if inst.asked is not None:
            inst.asked += gap
        # A backoff is over when it is over, and a drain's limit is a limit.
        if inst.deadline is not None and inst.state not in (State.BACKOFF, State.DRAINING):
            inst.deadline += gap
