"""The world as plain JSON values: what status, the API and the metrics show. Sizes in bytes, times in seconds.

All sums are made here, once. docs/status.md describes the fields; they are stable.
"""

from collections.abc import Mapping
from typing import Any

from vllmd.core.health import ttl_due
from vllmd.core.ledger import Account, device_label
from vllmd.core.proofs import FREED_LEAST, under_trial
from vllmd.core.states import HOLDING, State
from vllmd.core.trial import CYCLES
from vllmd.core.victims import busy, up_since
from vllmd.core.words import Why, explain, outlook
from vllmd.core.world import Instance, World
from vllmd.units import span

Json = dict[str, Any]


def status(world: World, daemon: Mapping[str, Any], now: float) -> Json:
    """The whole picture. `daemon` is what the wiring knows of itself."""
    return {
        "daemon": {**daemon, "closing": world.closing, "trouble": world.trouble},
        "devices": devices(world, now),
        "models": [model(world, inst, now) for inst in world.instances.values()],
    }


def devices(world: World, now: float) -> list[Json]:
    """All devices in index order."""
    readings = sorted(world.ledger.readings.values(), key=lambda r: (r.kind, r.index or 0, r.id))
    return [device(world, world.ledger.account(r.id), now) for r in readings]


def device(world: World, account: Account, now: float) -> Json:
    """One device. total = reserved by models + external + free + kept back, up to what reservations do not use."""
    reading = account.reading
    loans = [loan for loan in world.ledger.loans if loan.device == reading.id]
    return {
        "id": reading.id,
        "kind": reading.kind,
        "index": reading.index,
        "label": device_label(reading),
        "name": reading.name,
        "total": reading.total,
        "budget": account.budget,
        "reserve": account.reserve,
        "reserved": account.reserved,
        "used": reading.used,
        "external": account.external,
        "external_processes": [{"pid": p.pid, "name": p.name, "used": p.used} for p in reading.processes],
        "free": max(0, account.left),
        "lent": sum(loan.size for loan in loans),
        "lent_missing": max(0, -account.untaken) if loans else 0,
        "lent_for_s": round(max(loan.until for loan in loans) - now, 1) if loans else None,
        "silent_s": round(now - world.seen[reading.id], 1),
    }


def model(world: World, inst: Instance, now: float) -> Json:
    """One model (its instance)."""
    said = explain(world, inst, now)
    view = outlook(world, inst, now)
    starting, up = inst.state is State.STARTING, inst.state in (State.READY, State.DRAINING)
    shut = inst.state is State.READY and bool(inst.shut_for) and not under_trial(inst)
    promise = world.ledger.held.get(inst.id, {})
    held = inst.state in HOLDING
    # Of one that has ended the last reading may still tell; what it left behind for good is told.
    shown = inst.devices if held or inst.leak else ()
    used = {d: world.ledger.readings[d].instances.get(inst.id, 0) for d in shown if d in world.ledger.readings}
    return {
        "name": inst.spec.name,
        "model": inst.spec.model,
        "category": list(inst.spec.category),
        "state": str(State.DRAINING if shut else inst.state),
        "wanted": inst.wanted,
        "autostart": inst.spec.autostart,
        "pinned": inst.spec.pinned,
        "on_demand": inst.spec.on_demand,
        "phase": str(inst.phase) if starting and inst.phase else None,
        "progress": inst.phase_fraction if starting else None,
        "overall": rounded(view.overall, 3) if starting else None,
        "elapsed_s": round(now - inst.started, 1) if starting else None,
        "eta_s": rounded(view.left) if starting else None,
        "usual_s": rounded(view.usual),
        "silent_s": round(now - inst.heard, 1) if starting else None,
        "deadline_s": rounded(inst.deadline - now) if inst.deadline is not None else None,
        "since_s": round(now - inst.since, 1),
        "pid": inst.pid,
        "pids": list(inst.pids),
        "endpoint": inst.launch.endpoint if inst.launch and up else None,
        "devices": list(inst.devices) if held else [],
        "per_device": [{"id": d, "reserved": promise.get(d, 0), "used": used.get(d, 0)} for d in (promise or used)],
        "need": inst.need.total if inst.need else declared(inst),
        "need_measured": bool(inst.need and inst.need.measured),
        "reserved": sum(promise.values()),
        "used": sum(used.values()),
        "attempt": inst.attempt,
        "restarts": inst.restarts,
        "failures": len(inst.failures),
        "uptime_s": round(now - inst.ready_at, 1) if inst.ready_at is not None else None,
        "requests_running": inst.running if up else 0,
        "requests_waiting": inst.waiting if up else 0,
        "tokens_per_s": round(inst.tokens_per_s, 1) if up else 0.0,
        "requests_in_line": inst.line,
        "line_since_s": round(now - inst.line_since, 1) if inst.line else None,
        "idle_s": round(now - max(inst.used_at, up_since(inst) or 0.0), 1) if idle(inst) else None,
        "unloads_in_s": rounded(due - now) if idle(inst) and (due := ttl_due(inst)) is not None else None,
        "makes_room_for": inst.shut_for if inst.shut_for in world.instances else None,
        "waits_for": list(inst.waits_for),
        "swap_test": trial(inst, now) if inst.trial is not None else None,
        "why": why(said, now - inst.cause_at if inst.cause else None),
    }


def trial(inst: Instance, now: float) -> Json:
    """The latest swap-test."""
    test = inst.trial
    assert test is not None
    return {
        "level": test.level,
        "of": CYCLES,
        "cycles": [
            {"sleep_s": round(c.sleep_s, 3), "wake_s": round(c.wake_s, 3), "same": c.same, "residual": dict(c.residual)}
            for c in test.cycles
        ],
        "before": dict(test.before),
        "proved": test.proof is not None,
        "frees": test.proof.freed if test.proof is not None and test.proof.freed >= FREED_LEAST else 0,
        "result": test.result,
        "age_s": round(now - test.since, 1),
    }


def idle(inst: Instance) -> bool:
    """Whether it serves and has nothing to do."""
    return inst.state is State.READY and not busy(inst)


def declared(inst: Instance) -> int | None:
    """The need of a model that was never placed, when its configuration says it in bytes."""
    return inst.spec.vram if isinstance(inst.spec.vram, int) else None


def why(said: Why, age: float | None) -> Json | None:
    """The sentence with its remedies; None when there is nothing to say."""
    if not said.text and not said.short:
        return None
    return {
        "class": said.kind,
        "text": said.text,
        "short": said.short,
        "age_s": rounded(age),
        "remedies": [{"text": r.text, "action": dict(r.action) if r.action else None} for r in said.remedies],
    }


def rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None else round(value, digits)


def story(world: World, inst: Instance, now: float) -> Json:
    """Everything about one model that `vllmctl why` shows beside its sentence."""
    cause = inst.cause
    return {
        "name": inst.id,
        "state": str(inst.state),
        "attempt": inst.attempt,
        "failures": len(inst.failures),
        "restarts": inst.restarts,
        "why": why(explain(world, inst, now), now - inst.cause_at if cause else None),
        "last_failure": f"{span(now - inst.last_at)} ago: {inst.last.text}"
        if inst.last and inst.last is not cause
        else "",
        "detail": cause.detail if cause else "",
        "phase": cause.phase if cause else "",
        "heals": cause.heals if cause else None,
        "memory": inst.cause_memory if cause else "",
        "changed": list(inst.changed),
    }
