"""How much memory a start will take on each of its devices, and the flags that hold vLLM to it.

Before the first good start a need is a sum of parts: weights from the file headers, KV cache exactly, activations by
rule. After it the measured base replaces all but the KV cache, which is then pinned. What the operator gave (`vram`) is
reserved as given: on a GPU vLLM turns what is left after measuring into KV cache,

    share = floor((vram - context - slack [- communication]) / device total, 4 decimals)

rounded down because vLLM rounds up, and NVML's total because CUDA's is a little smaller. Sums: facts of vLLM 0.32 in
v1/worker/gpu_worker.py, v1/worker/cpu_worker.py.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace

from vllmd.core.case import COMPILER, GROWTH, Case, describe, loose_parts, outside, pinned, roomy_parts
from vllmd.facts import DeviceReading, Inspection, Learned, Need, Parts
from vllmd.spec import Cause, ModelSpec, Remedy, level_of
from vllmd.units import GIB, MIB, gib, spell_size


def estimate(
    spec: ModelSpec,
    facts: Inspection,
    reading: DeviceReading,
    learned: Learned | None,
    gpus: int = 1,
    budget: int | None = None,
) -> Need | Cause:
    """The need on each of `gpus` devices like `reading`, or why it cannot be started so. `budget` is that of the device
    (None = all of it): a `vram` given as a share is a share of it."""
    case = describe(spec, facts, reading, learned, gpus, reading.total if budget is None else budget)
    if case.vram is None and learned is None and facts.model.weights is None:
        return size_unknown(spec)
    if spec.kv_cache and spec.kv_cache < (case.kv_least or 0 if case.cpu and case.kv_certain else case.kv_certain):
        return kv_too_small(case, spec.kv_cache)
    need = roomy(case) if case.vram is None else within(case, case.vram)
    if isinstance(need, Need) and case.cpu and (need.kv or 0) + case.weights > reading.engine_total > 0:
        return node_too_small(case, need)
    return need


def roomy(case: Case) -> Need | Cause:
    """`vram` is "auto": everything that is needed, added up."""
    kv, parts = roomy_parts(case)
    return finish(case, sum(size for _, size in parts), kv, parts)


def within(case: Case, vram: int) -> Need | Cause:
    """`vram` is given: it is reserved, and the KV cache gets what the rest leaves."""
    hard = sum(size for _, size in case.fixed)
    least = case.spec.kv_cache or case.kv_certain or MIB
    if hard + least > vram:
        return too_small(case, vram, least)
    kv = case.spec.kv_cache or max(least, kv_left(case, vram, hard))
    if case.spec.kv_cache is None and case.kv_least and hard + case.kv_least <= vram:
        kv = max(kv, case.kv_least)
    return finish(case, vram, kv, (*case.fixed, ("KV cache", kv), ("activations and slack", vram - hard - kv)))


def kv_left(case: Case, vram: int, hard: int) -> int:
    """The KV cache that `vram` has room for, in bytes; it may come out negative."""
    if case.learned:
        return int(vram / (1 + GROWTH)) - hard
    if not case.facts.model.weights:
        return (vram - hard) // 4  # not downloaded: what the weights will take is not known
    left = vram - hard - sum(size for _, size in loose_parts(case, COMPILER))
    # vLLM's CPU worker is bound to one NUMA node and refuses a cache beyond what is available there.
    return min(left, case.reading.engine_free - case.weights - GIB) if case.cpu else left


def finish(case: Case, total: int, kv: int, parts: Parts) -> Need | Cause:
    """The need with vLLM's flags. The share is passed beside a pinned KV cache too: the free-memory check reads it."""
    share = None
    if not case.cpu:
        ten_thousandths = (total - outside(case.gpus)) * 10_000 // case.reading.engine_total
        if ten_thousandths < 1 and not pinned(case):
            return too_small(case, total, kv)
        share = min(max(ten_thousandths, 1), 10_000) / 10_000
    measured = case.learned is not None
    return Need(total, kv, pinned(case), share, total - kv, case.context or 0, measured, parts)


def on_each(need: Need, devices: Sequence[DeviceReading]) -> tuple[Need, dict[str, int]]:
    """What each of the devices is asked for when `need` was estimated on the smallest of them.

    vLLM takes the share of every device's own total, so that larger ones are asked for more. With a pinned KV cache the
    share is only checked against what is free: there it is made small enough for the largest.
    """
    totals = [device.engine_total for device in devices]
    parts = dict.fromkeys((device.id for device in devices), need.total)
    if need.share is None or min(totals) == max(totals):
        return need, parts
    if need.pinned:
        return replace(need, share=max(1, round(need.share * 10_000) * min(totals) // max(totals)) / 10_000), parts
    beside = outside(len(devices))
    return need, {d.id: max(need.total, math.ceil(need.share * d.engine_total) + beside) for d in devices}


def learned_key(spec: ModelSpec, facts: Inspection, devices: Sequence[DeviceReading]) -> str:
    """Under which a measured need is kept: whatever changes it, not vram or kv_cache. The environment may hold secrets:
    only this digest of everything is kept."""
    args = {key.replace("_", "-"): value for key, value in spec.args.items()}
    # How much RAM a machine has changes with its hot-plugged parts and limits, what a model takes of it does not.
    places = sorted((d.kind, d.name, 0 if d.kind == "cpu" else d.total) for d in devices)
    told = [
        spec.model, facts.model.fingerprint, facts.engine.version, places, spec.max_model_len, args, dict(spec.env),
    ]  # fmt: skip
    if level_of(spec):
        told.append("sleeps")  # with other allocators
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:24]


# -- why not ----------------------------------------------------------------------------------------------------------


def too_small(case: Case, vram: int, kv: int) -> Cause:
    """The operator's vram cannot hold even what is certain."""
    spec = case.spec
    label = f"KV cache for {case.context} tokens" if case.kv_certain and not spec.kv_cache else "KV cache"
    parts = [*case.fixed, (label, kv)]
    total = sum(size for _, size in parts)
    enough = max(total, sum(size for _, size in roomy_parts(case)[1]))
    remedies = [Remedy(f'models.{spec.name}.vram = "{-(-enough * 2 // GIB) / 2:g}GiB"')]
    room = vram - total + kv - sum(size for _, size in loose_parts(case, COMPILER))
    if spec.kv_cache is None and case.kv_certain and case.kv_token and room // case.kv_token >= 512:
        remedies.append(Remedy(f"models.{spec.name}.max_model_len = {room // case.kv_token // 256 * 256}"))
    sum_ = " + ".join(f"{label} {gib(size)}" for label, size in parts)
    return Cause(
        "too-small",
        f"cannot start {spec.name}: needs at least {gib(total)} ({sum_}), its vram is {gib(vram)}",
        f"vram below {gib(total)}",
        tuple(remedies),
        heals=False,
    )


def kv_too_small(case: Case, kv: int) -> Cause:
    """`kv_cache` cannot hold one request of the full length; vLLM would say so after half a minute."""
    spec, least = case.spec, case.kv_least or case.kv_certain
    fits = kv // (case.kv_token or 1) // 128 * 128 - 128  # one block is always kept empty
    remedies = [Remedy(f'models.{spec.name}.kv_cache = "{-(-least // MIB)}MiB"')]
    if fits > 0:
        remedies.insert(0, Remedy(f"models.{spec.name}.max_model_len = {fits}"))
    return Cause(
        "kv-too-small",
        f"cannot start {spec.name}: one request of {case.context} tokens needs {gib(least)} of KV cache,"
        f" kv_cache is {gib(kv)}",
        "KV cache too small",
        tuple(remedies),
        heals=False,
    )


def node_too_small(case: Case, need: Need) -> Cause:
    """vLLM's CPU worker lives in the memory of one NUMA node, which may be less than the machine's."""
    spec, node = case.spec, case.reading.engine_total
    room = (node - case.weights) // (64 * MIB) * (64 * MIB)
    if room <= 0 or room < case.kv_certain:
        remedy = "a smaller or quantized model: no setting makes its weights fit"
        length = room // case.kv_token // 256 * 256 if case.kv_token else 0
        if length > 0:
            remedy = f"models.{spec.name}.max_model_len = {length}"
    elif spec.vram is not None and spec.kv_cache is None:
        remedy = f'models.{spec.name}.vram = "{spell_size(max(0, case.vram or 0) - ((need.kv or 0) - room))}"'
    else:
        remedy = f'models.{spec.name}.kv_cache = "{spell_size(room)}"'
    return Cause(
        "node-too-small",
        f"cannot start {spec.name}: weights {gib(case.weights)} + KV cache {gib(need.kv or 0)} exceed the {gib(node)}"
        " of the NUMA node that vLLM's CPU worker is bound to",
        "NUMA node too small",
        (Remedy(remedy),),
        heals=False,
    )


def size_unknown(spec: ModelSpec) -> Cause:
    """Nothing is on disk to measure and nobody said how much."""
    return Cause(
        "size-unknown",
        f"cannot start {spec.name}: vram is auto and {spec.model} is not downloaded: its need cannot be estimated",
        "size unknown",
        (Remedy(f'models.{spec.name}.vram = "8GiB" (what you would give it)'), Remedy(f"hf download {spec.model}")),
        heals=False,
    )
