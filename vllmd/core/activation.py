"""What a forward pass takes beside weights and KV cache. Only vLLM's profiling knows; the rules serve a first start.

Text: the widest layer's intermediate values for one batch of tokens, and the logits of all running requests. Images:
the vision tower at the largest image it may be shown, which dwarfs the text for models of native resolution (dots.ocr
takes 11.3 million pixels, 57,600 patches).
"""

from collections.abc import Mapping
from typing import Any

from vllmd.facts import DeviceReading
from vllmd.modelconfig import Config, given, number, text_config
from vllmd.spec import ModelSpec
from vllmd.units import GIB, MIB

#: Pixels of the largest image of a model of native resolution whose limit is not set (Qwen2-VL's default).
NATIVE_PIXELS = 12_845_056
#: What torch's allocator leaves unused between its blocks.
FRAGMENTS = 64 * MIB


def batch_limits(reading: DeviceReading) -> tuple[int, int]:
    """vLLM's default max_num_batched_tokens and max_num_seqs on a device (engine/arg_utils.py: get_batch_defaults)."""
    if reading.kind == "cpu":
        return 2048, 128
    if reading.total >= 160 * GIB:
        return 16384, 1024
    if reading.total >= 70 * GIB and "a100" not in reading.name.lower():
        return 8192, 1024
    return 2048, 256


def batch_size(spec: ModelSpec, reading: DeviceReading, context: int) -> int:
    """max_num_batched_tokens of this start: as set, else the default, at most what all requests can fill."""
    asked = given(spec.args, "max-num-batched-tokens")
    if isinstance(asked, int) and asked > 0:
        return asked
    tokens, _ = batch_limits(reading)
    return min(tokens, request_limit(spec, reading) * context) if context else tokens


def request_limit(spec: ModelSpec, reading: DeviceReading) -> int:
    """max_num_seqs of this start."""
    asked = given(spec.args, "max-num-seqs")
    return asked if isinstance(asked, int) and asked > 0 else batch_limits(reading)[1]


def compiles(spec: ModelSpec) -> bool:
    """Whether the start compiles the model and captures graphs."""
    return given(spec.args, "enforce-eager") is not True


def activations(spec: ModelSpec, config: Config, reading: DeviceReading, context: int) -> int:
    """Bytes at the peak of a forward pass on one device, text or image, whichever is more, and the logits."""
    text = text_config(config)
    hidden = number(text, "hidden_size", "n_embd", "d_model") or 4096
    wide = number(text, "intermediate_size", "n_inner", "decoder_ffn_dim") or 4 * hidden
    layer = batch_size(spec, reading, context) * (2 * wide + hidden) * 2
    logits = request_limit(spec, reading) * (number(text, "vocab_size") or 0) * 4 * 2
    return max(layer, vision(spec, config, hidden)) + logits + FRAGMENTS


def vision(spec: ModelSpec, config: Config, hidden: int) -> int:
    """Bytes of the vision tower for the largest image, and of its result; 0 for a model without eyes."""
    tower = config.get("vision_config")
    if not isinstance(tower, Mapping) or images(spec) == 0:
        return 0
    inner = number(tower, "embed_dim", "hidden_size", "width") or 1024
    wide = number(tower, "intermediate_size") or 4 * inner
    patch = number(tower, "patch_size") or 14
    merge = number(tower, "spatial_merge_size") or 2
    patches = pixels(spec, tower) // (patch * patch)
    return patches * (2 * wide + 4 * inner) * 2 + patches // (merge * merge) * hidden * 2


def images(spec: ModelSpec) -> Any:
    """Images that one request may hold, as set; None = the default."""
    limits = given(spec.args, "limit-mm-per-prompt")
    return limits.get("image") if isinstance(limits, Mapping) else None


def pixels(spec: ModelSpec, tower: Config) -> int:
    """Pixels of the largest image that reaches the tower."""
    kwargs = given(spec.args, "mm-processor-kwargs")
    asked = kwargs.get("max_pixels") if isinstance(kwargs, Mapping) else None
    if isinstance(asked, int) and asked > 0:
        return asked
    side = number(tower, "image_size")
    return side * side if side else NATIVE_PIXELS
