"""What a model's config.json says, read as vLLM reads it. Pure: a mapping in, numbers out.

The numbers that matter stand at the top for a text model and one level down for one that sees or hears, under several
names, and keys that equal the class's default may be left out. Where a file does not say, the answer is None: a caller
refuses a start only on what is certain.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]

#: Where the text part of a composed model stands, outermost first.
_TEXT_PARTS = ("thinker_config", "text_config", "llm_config", "language_config", "decoder", "generator")

#: The names of the context length that vLLM knows (model_arch_config_convertor.py: derive_max_model_len_and_key).
_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip

#: Scalings after which max_position_embeddings already is the scaled length (config/model.py: _get_and_verify_max_len).
_SCALED_ALREADY = {"default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}

#: Class defaults that published files leave out and without which nothing can be computed.
_DEFAULTS: Mapping[str, Config] = {
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "vocab_size": 262208,
    }
}

DTYPE_SIZES: Mapping[str, int] = {
    "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2,
    "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1, "fp8_ds_mla": 1, "int8": 1,
}  # fmt: skip


def text_config(config: Config) -> Config:
    """The part that describes the language model, with its class's defaults where they are known."""
    for part in _TEXT_PARTS:
        inner = config.get(part)
        if isinstance(inner, Mapping):
            return text_config(inner)
    return {**_DEFAULTS.get(str(config.get("model_type")), {}), **config}


def number(config: Config, *names: str) -> int | None:
    """The first of these keys that holds a whole number above zero."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def given(args: Mapping[str, Any], flag: str, default: Any = None) -> Any:
    """The value of a flag in a model's `args`, whichever way its name is spelled ("_" and "-" are the same to vLLM)."""
    for key, value in args.items():
        if key.replace("_", "-") == flag:
            return value
    return default


def ropes(text: Config) -> Iterator[Config]:
    """The rotary-embedding settings: one mapping, or one for each kind of layer."""
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if isinstance(rope, Mapping):
        inner = [part for part in rope.values() if isinstance(part, Mapping)]
        yield from inner or [rope]


def max_context(config: Config) -> int | None:
    """The longest context vLLM accepts without being forced, in tokens; None when the file does not say.

    Rope scaling multiplies it, but for those kinds whose files already hold the product.
    """
    text = text_config(config)
    lengths = [value for name in _LENGTHS if (value := number(text, name))]
    if not lengths:
        return None
    length = number(text, "model_max_length") or min(lengths)
    factor = 1.0
    if "gemma3" not in str(text.get("model_type", "")):
        for rope in ropes(text):
            kind = rope.get("rope_type", rope.get("type", "default"))
            value = rope.get("factor")
            if kind not in _SCALED_ALREADY and isinstance(value, int | float):
                factor = float(value)
    return int(length * factor)


def default_context(config: Config) -> int | None:
    """The context vLLM takes when none is asked for: the longest, but with LongRoPE the one it was trained with."""
    text = text_config(config)
    if any(rope.get("rope_type", rope.get("type")) == "longrope" for rope in ropes(text)):
        return number(text, "original_max_position_embeddings") or max_context(config)
    return max_context(config)


def stored_dtype(config: Config) -> str:
    """The type the configuration names ("bfloat16"); "" when it names none."""
    for part in (config, text_config(config)):
        value = part.get("dtype", part.get("torch_dtype"))
        if isinstance(value, str):
            return value.removeprefix("torch.")
    return ""


def run_dtype(config: Config, args: Mapping[str, Any]) -> str:
    """The type vLLM computes in: `dtype`, or that of the file. "auto" never means float32: such a file is halved."""
    asked = given(args, "dtype", "auto")
    if asked != "auto":
        return str(asked)
    stored = stored_dtype(config)
    return "bfloat16" if stored in ("", "float32", "float") else stored


def quantized(config: Config, args: Mapping[str, Any]) -> bool:
    """Whether weights are stored or loaded in another type than the one computed in."""
    if given(args, "quantization") is not None:
        return True
    keys = ("quantization_config", "compression_config")
    return any(part.get(key) for part in (config, text_config(config)) for key in keys)
