"""How many bytes of KV cache a model needs, as vLLM counts them (v1/kv_cache_interface.py, v1/core/kv_cache_utils.py).

A layer that attends to everything keeps every token; one with a sliding window or chunks keeps a bounded number; a
state-space layer keeps a constant. A model with several kinds has its layers split into groups of equal size that draw
blocks of one size from one pool, so that a short group is padded. A request needs the blocks of all groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllmd.modelconfig import DTYPE_SIZES, Config, number, text_config

#: Steps that may be under way at once (async scheduling): tokens of both may still hold blocks outside a window.
STEPS_IN_FLIGHT = 2
#: State blocks of one request: one, and one more that prefix caching keeps aligned (mamba_cache_mode "align").
STATE_BLOCKS = 2


class Keep(StrEnum):
    """What a layer keeps of a request."""

    ALL = "all"
    WINDOW = "window"
    CHUNK = "chunk"
    STATE = "state"
    NOTHING = "nothing"


#: Names of the number of KV heads (model_arch_config_convertor.py: get_total_num_kv_heads).
_KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")

#: Words of layer_types, layers_block_type and hybrid_override_pattern.
_WORDS = {
    "full_attention": Keep.ALL, "attention": Keep.ALL, "hybrid": Keep.ALL, "*": Keep.ALL,
    "sliding_attention": Keep.WINDOW, "chunked_attention": Keep.CHUNK,
    "linear_attention": Keep.STATE, "mamba": Keep.STATE, "mamba2": Keep.STATE, "conv": Keep.STATE, "M": Keep.STATE,
    "mlp": Keep.NOTHING, "moe": Keep.NOTHING, "-": Keep.NOTHING, "E": Keep.NOTHING,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """The cache of one model on one device. `token` = bytes of one token in one layer; `state` = bytes of one request
    in one state layer; `exact` = all layers keep everything, so that the sum is vLLM's own to the byte."""

    token: int
    layers: tuple[Keep, ...]
    state: int = 0
    window: int = 0
    chunk: int = 0
    cross: int = 0  # tokens of the encoder that every decoder layer keeps beside
    exact: bool = True


def kv_bytes_per_token(config: Config, *, tp: int = 1, kv_dtype: str = "auto") -> int | None:
    """Bytes that one more token costs on each device while no window is full; None when the file does not tell."""
    shape = kv_shape(config, tp=tp, kv_dtype=kv_dtype)
    return None if shape is None else shape.token * sum(k in (Keep.ALL, Keep.WINDOW, Keep.CHUNK) for k in shape.layers)


def kv_for(
    config: Config,
    tokens: int,
    *,
    tp: int = 1,
    kv_dtype: str = "auto",
    batched: int = 2048,
    block: int = 16,
    hybrid: bool = True,
) -> int | None:
    """Bytes of KV cache that one request of `tokens` needs on each device, and a spare block (vLLM keeps one empty).

    `batched` = max_num_batched_tokens, `block` = tokens of a block, `hybrid` False = windows stored as full
    attention. None when the file does not tell.
    """
    shape = kv_shape(config, tp=tp, kv_dtype=kv_dtype, hybrid=hybrid)
    if shape is None:
        return None
    flight = STEPS_IN_FLIGHT * batched
    blocks = {
        Keep.ALL: _blocks(tokens, block),
        Keep.WINDOW: _blocks(min(shape.window - 1 + flight, tokens), block) + 1,
        Keep.CHUNK: _blocks(min(shape.chunk + flight, tokens), block),
        Keep.STATE: STATE_BLOCKS,
    }
    counts = {keep: shape.layers.count(keep) for keep in blocks if keep in shape.layers}
    if not counts:
        return 0
    least, most = min(counts.values()), max(counts.values())
    size = most if most < 1.5 * least else least  # layers of a group
    groups = sum(math.ceil(n / size) * blocks[keep] for keep, n in counts.items())
    # All groups share one block size: where a state is larger than a block of attention, the block grows to it.
    page = max(shape.token * block, shape.state if Keep.STATE in counts else 0)
    return size * page * (groups + _blocks(shape.cross, block) + 1)


def _blocks(tokens: int, block: int) -> int:
    return -(-tokens // block)


def kv_shape(config: Config, *, tp: int = 1, kv_dtype: str = "auto", hybrid: bool = True) -> Shape | None:
    """The cache's shape; None when layers or heads are not told."""
    text = text_config(config)
    count = number(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
    size = DTYPE_SIZES.get(kv_dtype, 2)
    token = token_bytes(text, tp, size)
    if not count or token is None:
        return None
    layers, exact = layer_kinds(text, count)
    shared = number(text, "num_kv_shared_layers") or 0  # the last ones read what an earlier layer keeps
    layers = layers[: len(layers) - shared]
    state = state_bytes(text, tp)
    if Keep.STATE in layers and state is None:
        layers = tuple(Keep.ALL if k is Keep.STATE else k for k in layers)
    if not hybrid:
        layers = tuple(Keep.ALL if k in (Keep.WINDOW, Keep.CHUNK) else k for k in layers)
    cross = (number(text, "max_source_positions") or 0) if config.get("is_encoder_decoder") else 0
    return Shape(
        token,
        layers,
        state or 0,
        number(text, "sliding_window") or 0,
        number(text, "attention_chunk_size") or 0,
        cross,
        exact and not cross and not shared and set(layers) == {Keep.ALL},
    )


def token_bytes(text: Config, tp: int, size: int) -> int | None:
    """Bytes of one token in one layer on one device; None when heads are not told."""
    latent = number(text, "kv_lora_rank")
    if latent and "compress_ratios" not in text:
        # MLA keeps one latent vector, whole on every device; a sparse one also its index keys: a byte each and a
        # scale of four for every 128.
        index = number(text, "index_head_dim") or 0
        return (latent + (number(text, "qk_rope_head_dim") or 0)) * size + index + 4 * (index // 128)
    heads = number(text, "num_attention_heads", "n_head", "n_heads", "decoder_attention_heads")
    hidden = number(text, "hidden_size", "n_embd", "d_model")
    head = number(text, "head_dim", "hidden_size_per_head", "attention_head_dim")
    if head is None and hidden and heads:
        head = hidden // heads
    kept = number(text, *_KV_HEADS) or heads
    if not head or not kept:
        return None
    wide = max(head, number(text, "global_head_dim") or 0)
    value = number(text, "v_head_dim") or wide
    # Fewer KV heads than devices are repeated: every device has at least one.
    return max(1, -(-kept // tp)) * (wide + value) * size


def layer_kinds(text: Config, count: int) -> tuple[tuple[Keep, ...], bool]:
    """What each layer keeps, and whether the file leaves no doubt. In doubt a layer keeps all: that is the most."""
    words = text.get("layer_types") or text.get("layers_block_type") or text.get("hybrid_override_pattern")
    if isinstance(words, str | Sequence) and words:
        return tuple(_WORDS.get(str(word), Keep.ALL) for word in words), all(str(word) in _WORDS for word in words)
    if every := number(text, "full_attention_interval"):
        return tuple(Keep.STATE if (n + 1) % every else Keep.ALL for n in range(count)), True
    if every := number(text, "attn_layer_period"):
        first = text.get("attn_layer_offset", 0)
        return tuple(Keep.ALL if n % every == first else Keep.STATE for n in range(count)), True
    chosen = text.get("attn_layer_indices")
    if isinstance(chosen, Sequence):
        return tuple(Keep.ALL if n in chosen else Keep.STATE for n in range(count)), True
    window, kind = number(text, "sliding_window"), str(text.get("model_type", ""))
    used = text.get("use_sliding_window", not kind.startswith("qwen"))
    if window and used:
        if every := number(text, "sliding_window_pattern"):
            return tuple(Keep.WINDOW if (n + 1) % every else Keep.ALL for n in range(count)), True
        if kind in ("mistral", "mixtral"):
            return (Keep.WINDOW,) * count, True
        return (Keep.ALL,) * count, False
    return (Keep.ALL,) * count, True


def state_bytes(text: Config, tp: int) -> int | None:
    """Bytes of one request's state in one state-space layer on one device; None when the file does not tell.

    Convolution states are kept in two bytes, recurrent ones in four (model_executor/layers/mamba/mamba_utils.py).
    """
    hidden = number(text, "hidden_size") or 0
    keys, values = number(text, "linear_num_key_heads"), number(text, "linear_num_value_heads")
    if keys and values:  # gated delta net
        key, value = number(text, "linear_key_head_dim") or 128, number(text, "linear_value_head_dim") or 128
        kernel = number(text, "linear_conv_kernel_dim") or 4
        return ((2 * keys * key + values * value) * (kernel - 1) * 2 + values * value * key * 4) // tp
    state = number(text, "mamba_d_state", "ssm_state_size", "state_size")
    kernel = number(text, "mamba_d_conv", "conv_kernel", "conv_kernel_size") or 4
    heads, width = number(text, "mamba_n_heads", "mamba_num_heads"), number(text, "mamba_d_head", "mamba_head_dim")
    if state and heads and width:  # mamba 2
        groups = number(text, "mamba_n_groups", "n_groups") or 1
        return ((heads * width + 2 * max(groups, tp) * state) * (kernel - 1) * 2 + heads * width * state * 4) // tp
    if state:  # mamba 1
        inner = number(text, "intermediate_size") if "mamba_expand" not in text else None
        inner = inner or (number(text, "mamba_expand", "expand") or 2) * hidden
        return inner * ((kernel - 1) * 2 + state * 4) // tp
    if cached := number(text, "conv_L_cache"):  # short convolution
        return hidden * cached * 2 // tp
    return None
