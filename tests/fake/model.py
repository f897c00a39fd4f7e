"""What the fake reads of a model folder: enough to size the KV cache and to refuse what vLLM would refuse."""

import json
import os
from pathlib import Path
from typing import Final, NamedTuple

from tests.fake.flags import Options
from tests.fake.texts import FAILURES, StartError

UNSERVED: Final = {"GOTQwenForCausalLM", "NoSuchForCausalLM"}


class Model(NamedTuple):
    """Sizes in bytes, lengths in tokens."""

    arch: str = "LlamaForCausalLM"
    max_len: int = 2048
    kv_per_token: int = 512
    weights: int = 0
    shards: int = 1


def load_model(options: Options) -> Model:
    """The model of the command line; StartError with vLLM's words where it would refuse.

    A hub id counts as downloaded, unless HF_HUB_OFFLINE is set: then its cache is taken to be empty.
    """
    folder = Path(options.model)
    if not folder.is_dir():
        if options.model.startswith(("/", ".")) or options.model.count("/") > 1:
            raise StartError(FAILURES["path"].cause.format(model=options.model))
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise StartError(
                "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for "
                "the specified revision on the local disk and outgoing traffic has been disabled."
            )
        return Model()
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise StartError(f"ValueError: Invalid repository ID or local directory specified: '{folder}'.") from None
    except ValueError:
        raise StartError(
            f"OSError: It looks like the config file at '{folder}/config.json' is not a valid JSON file."
        ) from None
    return check(options, folder, config)


def check(options: Options, folder: Path, config: dict[str, object]) -> Model:
    """The folder as a Model, or StartError."""
    if config.get("auto_map") and not options.trust:
        raise StartError(
            f"ValueError: The repository {folder} contains custom code which must be executed to correctly load the "
            "model. Please pass the argument `trust_remote_code=True` to allow custom code to be run."
        )
    names = config.get("architectures")
    arch = str(names[0]) if isinstance(names, list) and names else "LlamaForCausalLM"
    if arch in UNSERVED:
        raise StartError(FAILURES["arch"].cause.format(model=options.model, arch=arch))
    limit = number(config, "max_position_embeddings", 2048)
    wanted = options.max_model_len
    if wanted is not None and wanted > limit:
        raise StartError(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, "
            f"User-specified max_model_len ({wanted}) is greater than the derived max_model_len "
            f"(max_position_embeddings={float(limit)} or model_max_length=None in model's config.json)."
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StartError(f"RuntimeError: Cannot find any model weights with `{folder}`")
    return Model(arch, limit, kv_per_token(config), sum(f.stat().st_size for f in files), len(files))


def kv_per_token(config: dict[str, object]) -> int:
    """Bytes of KV for one token: K and V of every layer, two bytes a number (full attention)."""
    heads = number(config, "num_attention_heads", 4)
    width = number(config, "head_dim", number(config, "hidden_size", 128) // heads)
    return number(config, "num_hidden_layers", 2) * number(config, "num_key_value_heads", heads) * width * 2 * 2


def number(config: dict[str, object], key: str, default: int) -> int:
    """A whole number of the configuration, of its text part where it has one."""
    inner = config.get("text_config")
    value = config.get(key, inner.get(key) if isinstance(inner, dict) else None)
    return value if isinstance(value, int) else default
