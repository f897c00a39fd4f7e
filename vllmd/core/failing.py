"""When something is not as wanted: the cause with what surrounds it, and whether it is tried again."""

import json
from collections.abc import Mapping
from dataclasses import replace

from vllmd.core.ledger import memory_sum
from vllmd.core.policy import backoff, recent
from vllmd.core.states import Move, State
from vllmd.core.world import Instance, World
from vllmd.spec import Cause, Remedy
from vllmd.units import span


def set_cause(world: World, inst: Instance, cause: Cause, now: float) -> None:
    """Remember why an instance is not as wanted, with the memory at this moment and what changed since it last was."""
    inst.cause, inst.cause_at = cause, now
    devices = inst.devices or tuple(world.seen)
    inst.cause_memory = "; ".join(memory_sum(world.ledger.account(d)) for d in devices if d in world.seen)
    inst.changed = changes(world.good.get(inst.spec.name), profile(world, inst))


def profile(world: World, inst: Instance) -> dict[str, str]:
    """What a start ran with, as words that can be compared later."""
    spec, found = inst.spec, inst.found
    neighbours = sorted(
        other.id
        for other in world.instances.values()
        if other is not inst and other.state in (State.STARTING, State.READY, State.ASLEEP)
    )
    words = {
        "model": spec.model,
        "max_model_len": str(spec.max_model_len),
        "vram": str(spec.vram),
        "kv_cache": str(spec.kv_cache),
        "args": json.dumps(dict(spec.args), sort_keys=True),
        "env": ", ".join(sorted(spec.env)),  # names only: values may be secret
        "neighbours": ", ".join(neighbours) or "none",
    }
    if found is not None:
        words |= {"vLLM": found.engine.version, "files": found.model.fingerprint}
    return words


def changes(good: Mapping[str, str] | None, current: Mapping[str, str]) -> tuple[str, ...]:
    """ "vLLM: 0.31.0 → 0.32.0" for all that differs; empty without a good start to compare with."""
    if good is None:
        return ()
    return tuple(
        f"{key}: {good[key]} → {value}" for key, value in current.items() if key in good and good[key] != value
    )


def retry_or_give_up(world: World, inst: Instance, cause: Cause, at: float, now: float) -> None:
    """A failure at `at` that may heal: try again after a backoff, unless there were too many in the window. The cause has
    been set."""
    rule = inst.spec.restart
    inst.failures = [*recent(inst.failures, rule, now), at]
    if len(inst.failures) >= rule.max_failures:
        loop = f"failed {len(inst.failures)} times in {span(rule.window)}, the last time: {cause.text}"
        remedies = (*cause.remedies, Remedy(f"vllmctl logs --failed {inst.id}"))
        set_cause(world, inst, replace(cause, text=loop, remedies=remedies[:2]), now)
        world.move(inst, Move.GIVE_UP, now, loop)
        return
    pause = backoff(rule, len(inst.failures), f"{inst.id}:{inst.attempt}")
    wait = max(0.0, at + pause - now)
    world.move(
        inst, Move.RETRY, now, f"{cause.text}; start {len(inst.failures) + 1} of {rule.max_failures} in {span(wait)}"
    )
    inst.deadline = at + pause
    world.count("restarts", inst.spec.name, cause.kind)
