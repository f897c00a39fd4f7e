"""Tiny models with random weights, for trying a real vLLM without a download: run with an engine's own Python.

    .engine/bin/python packaging/demo/tiny.py llama DIR [qwen2vl DIR2 ...] [--seed 1] [--hidden 128] [--layers 2]

`llama` chats, `qwen2vl` also looks at pictures; what they say is noise, how they start, answer and fail is real.
A folder complete with the same settings is left alone; a new one appears whole, by a rename. Nothing is fetched.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif 'image' in part['type'] %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The names Qwen2-VL's processor looks for; the same list serves both, so that one tokenizer does.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Written last inside the new folder: the settings it was made with, so that a changed wish is seen.
MARK = "tiny.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is made: kind, seed of the weights, text width and depth, and context length in tokens."""

    kind: str
    seed: int
    hidden: int
    layers: int
    max_len: int


def make(wish: Settings, folder: Path) -> bool:
    """Make the model at `folder`; False when it is there already. A folder that tiny.py did not make is never replaced.

    Raises FileExistsError for such a folder, OSError when it cannot be written.
    """
    if found(folder) == asdict(wish):
        return False
    if folder.exists() and any(folder.iterdir()) and found(folder) is None:
        raise FileExistsError(f"cannot make a model in {folder}: something else is there (name another folder)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        MAKERS[wish.kind](wish, made)
        (made / MARK).write_text(json.dumps(asdict(wish)) + "\n")
        # mkdtemp and safetensors keep others out; the daemon's user is another than the one who makes models.
        made.chmod(0o755)
        for file in made.iterdir():
            file.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return True


def found(folder: Path) -> dict[str, object] | None:
    """The settings of the complete tiny model at `folder`, None when there is no such model."""
    try:
        settings = json.loads((folder / MARK).read_text())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def write_tokenizer(folder: Path, max_len: int) -> dict[str, int]:
    """Write a byte-level tokenizer (256 bytes and the special tokens) and give its vocabulary."""
    from tokenizers import (  # type: ignore[import-not-found]  # the engine has it, this project does not
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )
    from transformers import PreTrainedTokenizerFast  # type: ignore[import-not-found]

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=max_len,
        chat_template=CHAT,
    )
    fast.save_pretrained(folder)
    return dict(tokenizer.get_vocab())


def write_llama(wish: Settings, folder: Path) -> None:
    """A text model: heads of 32 dimensions, two of them sharing keys."""
    import torch  # type: ignore[import-not-found]
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab = write_tokenizer(folder, wish.max_len)
    heads = max(1, wish.hidden // 32)
    torch.manual_seed(wish.seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=wish.hidden,
        intermediate_size=2 * wish.hidden,
        num_hidden_layers=wish.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=wish.max_len,
        bos_token_id=None,
        eos_token_id=vocab["<|im_end|>"],
        pad_token_id=vocab["<|endoftext|>"],
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_qwen2vl(wish: Settings, folder: Path) -> None:
    """A text model with a two-layer vision tower; pictures of 56 x 56 up to about 316 x 316 pixels."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vocab = write_tokenizer(folder, wish.max_len)
    heads = max(1, wish.hidden // 32)
    torch.manual_seed(wish.seed)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": wish.hidden,
            "intermediate_size": 2 * wish.hidden,
            "num_hidden_layers": wish.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "max_position_embeddings": wish.max_len,
            "bos_token_id": None,
            "eos_token_id": vocab["<|im_end|>"],
            "pad_token_id": vocab["<|endoftext|>"],
            # Time, height and width share a head's 32 / 2 rotations.
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": wish.hidden,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_start_token_id=vocab["<|vision_start|>"],
        vision_end_token_id=vocab["<|vision_end|>"],
        dtype="bfloat16",
    )
    Qwen2VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    pixels = {"min_pixels": 3136, "max_pixels": 100352}
    patches = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    colours = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    kinds = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(kinds | pixels | patches | colours, indent=2) + "\n")


MAKERS: dict[str, Callable[[Settings, Path], None]] = {"llama": write_llama, "qwen2vl": write_qwen2vl}


def read_arguments(arguments: list[str]) -> list[tuple[Settings, Path]]:
    """The models asked for, each with its folder. Exits with a usage line when they do not come in pairs."""
    parser = argparse.ArgumentParser(description="Make tiny models with random weights.")
    parser.add_argument("models", nargs="+", metavar="KIND DIR", help=f"pairs; KIND is one of {', '.join(MAKERS)}")
    parser.add_argument("--seed", type=int, default=1, help="of the weights of the first; each further one adds 1")
    parser.add_argument("--hidden", type=int, default=128, help="width, a multiple of 32 (default 128)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--max-len", type=int, default=2048, help="context in tokens (default 2048)")
    given = parser.parse_args(arguments)
    kinds, folders = given.models[::2], given.models[1::2]
    if len(kinds) != len(folders) or any(kind not in MAKERS for kind in kinds):
        parser.error(f"cannot read {' '.join(given.models)!r}: give pairs of KIND ({', '.join(MAKERS)}) and DIR")
    if given.hidden < 32 or given.hidden % 32:
        parser.error(f"cannot make a width of {given.hidden}: heads have 32 dimensions (--hidden 128)")
    return [
        (Settings(kind, given.seed + nth, given.hidden, given.layers, given.max_len), Path(folder).absolute())
        for nth, (kind, folder) in enumerate(zip(kinds, folders, strict=True))
    ]


def main(arguments: list[str]) -> int:
    """Make what is asked for, one line each; exit code 1 when a folder cannot be used."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for wish, folder in read_arguments(arguments):
        try:
            news = "made" if make(wish, folder) else "is there already"
        except OSError as error:
            print(f"tiny: {error}", file=sys.stderr)
            return 1
        print(f"tiny: {wish.kind} {news}: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
