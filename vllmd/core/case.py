"""All that bears on the need of one start, computed once: sizes of what is certain, of what is estimated, and of
the KV cache.

Measured constants are of vLLM 0.32 and say on what.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vllmd.core.activation import activations, batch_size, compiles
from vllmd.core.kv import kv_bytes_per_token, kv_for, kv_shape
from vllmd.facts import DeviceReading, Inspection, Learned, Parts
from vllmd.modelconfig import Config, default_context, given, quantized, text_config
from vllmd.spec import ModelSpec, Share
from vllmd.units import GIB, MIB

#: The part that a GPU's share does not cover.
OUTSIDE = "CUDA context and slack"

#: A CUDA context with its libraries; outside of what vLLM counts. Typical, until a start has measured it.
CONTEXT = 500 * MIB
#: What the driver and NCCL may take beside it while the engine runs.
SLACK = 256 * MIB
#: Communication buffers of each device of a tensor-parallel set. They exist before vLLM first looks at what is free.
NCCL = 300 * MIB
#: Captured CUDA graphs of the default sizes.
GRAPHS = 512 * MIB
#: vLLM's CPU build without weights and KV cache: API server 422, engine 396, worker 417, tracker 5 MiB of anonymous
#: memory, 15 more after the first requests, and 53 of the worker's for compiled code; measured.
PROCESSES, COMPILED = 1256 * MIB, 54 * MIB
#: A C++ compiler below a worker that compiles its model, before the KV cache exists; measured 507 MiB.
COMPILER = 600 * MIB
#: CUDA's total is below NVML's by what the driver keeps: a share of it is worth that much less.
CUDA_PART = 0.96
#: What a measured need may grow by.
GROWTH = 0.03
#: KV cache of a model whose configuration does not tell what a token costs.
GUESS = GIB


@dataclass(frozen=True, slots=True)
class Case:
    """All that bears on one estimate, computed once. `kv_least` = what one request of `context` tokens needs."""

    spec: ModelSpec
    facts: Inspection
    reading: DeviceReading
    learned: Learned | None
    gpus: int
    vram: int | None
    context: int | None
    kv_least: int | None
    kv_token: int | None
    kv_certain: int  # below this vLLM surely refuses; 0 = not known

    @property
    def cpu(self) -> bool:
        return self.reading.kind == "cpu"

    @property
    def weights(self) -> int:
        """Bytes of weights on one device once loaded; 0 when not known."""
        size, args = self.facts.model.weights or 0, self.spec.args
        if (method := given(args, "quantization")) and not quantized(self.facts.model.config, {}):
            size = int(size * (0.55 if method == "fp8" else 0.35))  # while loading; embeddings keep their size
        if isinstance(offload := given(args, "cpu-offload-gb"), int | float) and not self.cpu:
            size = max(0, size - int(offload * GIB))
        return -(-size // self.gpus)

    @property
    def fixed(self) -> Parts:
        """What no setting makes smaller: the parts that are certain."""
        if self.learned:
            return (("measured without KV cache", self.learned.base),)
        if self.cpu:
            processes = PROCESSES + (COMPILED if compiles(self.spec) else 0)
            return ("weights", self.weights), ("vLLM's processes", processes)
        talk = (("communication", NCCL),) if self.gpus > 1 else ()
        return (("weights", self.weights), (OUTSIDE, CONTEXT + SLACK), *talk)


def outside(gpus: int) -> int:
    """What each GPU gives beside the share that vLLM is told: it is there before vLLM first looks."""
    return CONTEXT + SLACK + (NCCL if gpus > 1 else 0)


def describe(
    spec: ModelSpec, facts: Inspection, reading: DeviceReading, learned: Learned | None, gpus: int, budget: int
) -> Case:
    """The case with everything that config.json and the flags say of it."""
    config, args = facts.model.config, spec.args
    context = spec.max_model_len or default_context(config)
    kv_dtype = str(given(args, "kv-cache-dtype", "auto"))
    if kv_dtype == "auto" and given(args, "dtype") in ("float32", "float"):
        kv_dtype = "float32"
    hybrid = given(args, "disable-hybrid-kv-cache-manager") is not True
    block = given(args, "block-size")
    # The CPU build's block is 128 tokens; on a GPU the attention backend chooses 16 to 64.
    block = block if isinstance(block, int) and block > 0 else 128 if reading.kind == "cpu" else 64
    least = None
    if context:
        batched = batch_size(spec, reading, context)
        least = kv_for(config, context, tp=gpus, kv_dtype=kv_dtype, batched=batched, block=block, hybrid=hybrid)
    shape = kv_shape(config, tp=gpus, kv_dtype=kv_dtype, hybrid=hybrid)
    token = kv_bytes_per_token(config, tp=gpus, kv_dtype=kv_dtype)
    plain = not {"hf-overrides", "kv-transfer-config", "decode-context-parallel-size", "pipeline-parallel-size"} & {
        key.replace("_", "-") for key in args
    }
    # The checkpoint may ask for a KV cache of fewer bits itself; how many is not reckoned with, only not denied.
    smaller_cache = kv_dtype == "auto" and asks_for_small_cache(config)
    return Case(
        spec,
        facts,
        reading,
        learned,
        gpus,
        int(budget * spec.vram.part) if isinstance(spec.vram, Share) else spec.vram,
        context,
        least,
        token,
        (context or 0) * (token or 0) if shape is not None and shape.exact and plain and not smaller_cache else 0,
    )


def asks_for_small_cache(config: Config) -> bool:
    """Whether the checkpoint's quantization says, or may say elsewhere, that its KV cache is quantized too
    (utils/torch_utils.py: get_kv_cache_quant_algo_string). ModelOpt may keep that in a file of its own."""
    for part in (config, text_config(config)):
        for key in ("quantization_config", "compression_config"):
            method = part.get(key)
            if not isinstance(method, Mapping):
                continue
            inner = method.get("quantization")
            tables = [method, inner] if isinstance(inner, Mapping) else [method]
            if any(table.get("kv_cache_scheme") or table.get("kv_cache_quant_algo") for table in tables):
                return True
            if str(method.get("quant_method", "")).startswith("modelopt"):
                return True
    return False


def loose_parts(case: Case, kv: int) -> Parts:
    """What is estimated on top of the fixed parts; nothing where a start has measured it all."""
    if case.learned:
        return (("slack", int((case.learned.base + kv) * GROWTH)),)
    parts = [("activations", activations(case.spec, case.facts.model.config, case.reading, case.context or 0))]
    if case.cpu:
        # Compiling is over before the KV cache is allocated: the larger of the two counts.
        parts += [("compiler", max(0, COMPILER - kv))] if compiles(case.spec) else []
    else:
        parts += [("CUDA graphs", GRAPHS)] if compiles(case.spec) else []
    return tuple(part for part in parts if part[1])


def roomy_parts(case: Case) -> tuple[int, Parts]:
    """Everything that is needed when nobody says how much: the KV cache's size, and all parts."""
    kv = case.spec.kv_cache or case.kv_least or (case.learned.kv if case.learned else GUESS)
    parts = [*case.fixed, *loose_parts(case, kv), ("KV cache", kv)]
    if not (case.cpu or pinned(case)):
        # The share is cut to four decimals and taken of CUDA's total: plan for what that loses.
        inside = sum(size for label, size in parts) - outside(case.gpus)
        parts.append(("rounding", int(inside / CUDA_PART) - inside + case.reading.engine_total // 10_000))
    return kv, tuple(parts)


def pinned(case: Case) -> bool:
    """Whether vLLM is told its KV cache in bytes. Not at the first start on a GPU: there it measures, and we learn."""
    return case.cpu or case.learned is not None or case.spec.kv_cache is not None
