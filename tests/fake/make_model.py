"""A model folder that looks like one: a config, safetensors with a true header and a hole for data, tokenizer stubs."""

import json
import struct
from pathlib import Path
from typing import Any, Final

STUBS: Final = {
    "tokenizer.json": {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}},
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"},
    "generation_config.json": {"max_new_tokens": 16},
}


def make_model(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 512,
    max_len: int = 2048,
    weights_bytes: int | None = None,
    **config: Any,
) -> Path:
    """The folder, made; `config` overrides or adds keys of config.json.

    The tensors are a Llama's of these sizes in bfloat16, `weights_bytes` of them when given: one more makes up the
    rest, and ValueError when they are more already. Data is a hole in the file, so a model of 100 GiB costs nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": hidden * 4,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_len,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    } | config
    for name, value in {"config.json": values, **STUBS}.items():
        (folder / name).write_text(json.dumps(value, indent=2))
    tensors = llama_tensors(layers, hidden, hidden // heads * kv_heads, vocab)
    if weights_bytes is not None:
        missing = weights_bytes - sum(2 * rows * columns for rows, columns in tensors.values())
        if missing < 0 or missing % 2:
            raise ValueError(f"cannot make a model of {weights_bytes} bytes: {-missing} over (choose smaller layers)")
        tensors["model.padding.weight"] = (missing // 2, 1)
    write_weights(folder / "model.safetensors", tensors)
    return folder


def llama_tensors(layers: int, hidden: int, kv: int, vocab: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of every matrix by its name."""
    tensors = {"model.norm.weight": (hidden, 1)}
    tensors |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocab, hidden))
    shapes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (hidden * 4, hidden), "up_proj": (hidden * 4, hidden), "down_proj": (hidden, hidden * 4)}
    for n in range(layers):
        at = f"model.layers.{n}."
        tensors |= {f"{at}self_attn.{name}.weight": shape for name, shape in shapes.items()}
        tensors |= {f"{at}mlp.{name}.weight": shape for name, shape in mlp.items()}
        tensors |= {f"{at}{name}.weight": (hidden, 1) for name in ("input_layernorm", "post_attention_layernorm")}
    return tensors


def write_weights(path: Path, tensors: dict[str, tuple[int, int]]) -> None:
    """A safetensors file: eight bytes of header length, little-endian, the header in JSON, then the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (rows, columns) in tensors.items():
        start, end = end, end + 2 * rows * columns
        shape = [rows, columns] if columns > 1 else [rows]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
