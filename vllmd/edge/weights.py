"""The files of a model: configuration, weights and whether they are whole.

A safetensors file begins with eight bytes that give the length of a JSON header, which says where each tensor ends; so
the header alone tells what the file must weigh, and a download that was cut short is seen in a millisecond.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.facts import ModelFacts
from vllmd.modelconfig import DTYPE_SIZES, quantized, run_dtype
from vllmd.spec import Cause, Remedy
from vllmd.units import gib

#: Files of weights by the order in which vLLM prefers them.
KINDS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
#: safetensors' own limit of a header, in bytes.
HEADER_MAX = 100_000_000
#: Files named *.bin beside weights that hold none.
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")
#: How headers call the types whose size depends on what the model is run in.
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class Tensors:
    """What one header says: bytes of all tensors, by type."""

    sizes: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


class Damaged(ValueError):
    """A weight file is not what its header promises."""


def read_model(name: str, folder: Path, args: Mapping[str, Any]) -> ModelFacts | Cause:
    """The facts of a model in a local folder, or what is wrong with it."""
    config = read_config(name, folder)
    if isinstance(config, Cause):
        return config
    files = weight_files(folder)
    if isinstance(files, str):
        return broken(name, "weights-missing", f"{folder}: {files}", "weights missing")
    if not files:
        return broken(name, "weights-missing", f"{folder} holds no weights ({', '.join(KINDS)})", "weights missing")
    total = 0
    for file in files:
        try:
            total += loaded_size(file, config, args)
        except Damaged as error:
            return broken(name, "weights-damaged", f"{file} is damaged: {error}", "weights damaged")
        except OSError as error:
            return broken(name, "weights-missing", f"cannot read {file}: {error.strerror}", "weights unreadable")
    return ModelFacts(str(folder), config, total, fingerprint([folder / "config.json", *files]))


def broken(name: str, kind: str, what: str, short: str) -> Cause:
    return Cause(
        kind,
        f"cannot start {name}: {what}",
        short,
        (Remedy("download the model again (hf download), or correct its path"),),
        heals=False,
    )


def read_config(name: str, folder: Path) -> dict[str, Any] | Cause:
    """config.json as it is; {} for a folder of another format (GGUF, Mistral's), which vLLM may still serve."""
    path = folder / "config.json"
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        if (folder / "params.json").exists() or any(folder.glob("*.gguf")):
            return {}
        return broken(name, "no-config", f"{folder} has no config.json: it is not a model", "no config.json")
    except OSError as error:
        return broken(name, "no-config", f"cannot read {path}: {error.strerror}", "config.json unreadable")
    except ValueError as error:
        return broken(name, "config-damaged", f"{path} is not valid JSON: {error}", "config.json damaged")
    if not isinstance(value, dict):
        return broken(name, "config-damaged", f"{path} does not hold a JSON object", "config.json damaged")
    return value


def weight_files(folder: Path) -> list[Path] | str:
    """The files that vLLM will load, or a sentence about those that are missing."""
    for kind in KINDS:
        if names := indexed(folder, kind):
            lost = [n for n in names if not (folder / n).is_file()]
            if not lost:
                return [folder / n for n in names]
            if len(lost) < len(names) or kind == "*.safetensors":
                more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
                return f"{lost[0]}{more} of {len(names)} weight files are missing"
        found = sorted(path for path in folder.glob(kind) if path.name not in NOT_WEIGHTS)
        # Mistral's own copy of the weights beside the usual one is not loaded.
        usual = [path for path in found if not path.name.startswith("consolidated")]
        if found:
            return usual or found
    return []


def indexed(folder: Path, kind: str) -> list[str]:
    """File names of the index that belongs to a kind of weights; empty when there is none."""
    for path in sorted(folder.glob(f"{kind}.index.json")):
        try:
            table = json.loads(path.read_bytes())["weight_map"]
            return sorted(set(table.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return []


def indexed_size(folder: Path) -> int | None:
    """Bytes of all tensors as the index of a partly downloaded model says; None when it does not."""
    for path in folder.glob("*.index.json"):
        try:
            return int(json.loads(path.read_bytes())["metadata"]["total_size"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def loaded_size(file: Path, config: Mapping[str, Any], args: Mapping[str, Any]) -> int:
    """Bytes that a weight file takes once loaded: unquantised floats are turned into the type the model is run in.

    Raises Damaged, OSError.
    """
    found = file.stat()
    if file.suffix != ".safetensors":
        return found.st_size
    tensors = read_header(file, found.st_mtime_ns, found.st_size)
    if quantized(config, args):
        return tensors.total
    size = DTYPE_SIZES.get(run_dtype(config, args), 2)
    return sum(length * size // FLOATS[kind] if kind in FLOATS else length for kind, length in tensors.sizes.items())


@functools.lru_cache(maxsize=4096)
def read_header(file: Path, changed: int, size: int) -> Tensors:
    """The tensors of a safetensors file of `size` bytes, last changed at `changed` (ns). Raises Damaged, OSError."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(HEADER_MAX, size - 8):
            raise Damaged(f"its header should be {length} bytes, the whole file has {size}")
        text = stream.read(length)
    try:
        header = json.loads(text)
        entries = [entry for key, entry in header.items() if key != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        sizes: dict[str, int] = {}
        for entry in entries:
            first, last = entry["data_offsets"]
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + last - first
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise Damaged(f"its header cannot be read ({error})") from None
    if 8 + length + end != size:
        raise Damaged(f"it has {size} of {8 + length + end} bytes ({gib(size)} of {gib(8 + length + end)})")
    return Tensors(sizes)


def fingerprint(files: Iterable[Path]) -> str:
    """A word that changes when one of the files does: by name, size and time of change."""
    told = []
    for file in files:
        try:
            found = file.stat()
        except OSError:
            continue
        told.append((file.name, found.st_size, found.st_mtime_ns))
    return hashlib.sha256(repr(sorted(told)).encode()).hexdigest()[:16]
