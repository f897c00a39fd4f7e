"""Where a model's files are: a local folder, or the hub's cache on this machine (never the hub itself).

The cache keeps, for each repository, `refs/BRANCH` with a commit and `snapshots/COMMIT/` with its files. A snapshot that
lacks files is a download that was cut short: vLLM goes on with it when it may use the network.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from vllmd.edge.weights import indexed_size, read_config, read_model, weight_files
from vllmd.facts import ModelFacts
from vllmd.modelconfig import given
from vllmd.spec import Cause, ModelSpec, Remedy

_HUB_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]{0,95}")
_TRUE = {"1", "on", "yes", "true"}


def find_model(spec: ModelSpec, env: Mapping[str, str]) -> ModelFacts | Cause:
    """The model's facts, or why it cannot be served. `env` is what the engine will see."""
    if ":" in spec.model:
        return ModelFacts(None)  # an object store, or one quantisation of a GGUF repository: vLLM fetches it
    local = Path(os.path.expanduser(spec.model))  # noqa: PTH111 - a "~name" that is nobody stays as it is
    if spec.model.startswith(("/", ".", "~")) or local.is_dir():
        return read_local(spec, local)
    if not _HUB_ID.fullmatch(spec.model) or "--" in spec.model or ".." in spec.model:
        return no_model(
            spec, f'"{spec.model}" is neither a folder nor a hub id (OWNER/NAME)', "correct its name or path"
        )
    return read_cached(spec, env)


def read_local(spec: ModelSpec, path: Path) -> ModelFacts | Cause:
    """A model given by path."""
    path = path.absolute()
    if path.is_file() and path.suffix == ".gguf":
        return ModelFacts(str(path), weights=path.stat().st_size)
    if path.is_dir():
        return read_model(spec.name, path, spec.args)
    if path.exists():
        return no_model(spec, f"{path} is a file, not a model folder", "name the folder that holds config.json")
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)  # noqa: PTH208
    except OSError:
        near = []
    hint = (
        f'models.{spec.name}.model = "{path.parent / near[0]}"' if near else "correct it, or download the model there"
    )
    return no_model(spec, f"{path} does not exist", hint)


def no_model(spec: ModelSpec, why: str, remedy: str) -> Cause:
    return Cause("no-model", f"cannot start {spec.name}: model {why}", "model missing", (Remedy(remedy),), heals=False)


def read_cached(spec: ModelSpec, env: Mapping[str, str]) -> ModelFacts | Cause:
    """A hub model: complete in the cache, or left to vLLM to download, or impossible because that is forbidden."""
    repository = cache_folder(spec, env) / f"models--{spec.model.replace('/', '--')}"
    snapshot = find_snapshot(repository, str(given(spec.args, "revision", "main")))
    offline = any(env.get(key, "").lower() in _TRUE for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    if snapshot is not None and complete(snapshot, repository, offline):
        return read_model(spec.name, snapshot, spec.args)
    if offline:
        state = "only partly downloaded" if snapshot else "not downloaded"
        return Cause(
            "not-downloaded",
            f"cannot start {spec.name}: {spec.model} is {state} ({repository.parent}) and HF_HUB_OFFLINE is set",
            "not downloaded",
            (
                Remedy(f"HF_HUB_OFFLINE=0 hf download {spec.model}"),
                Remedy(f"remove HF_HUB_OFFLINE from models.{spec.name}.env"),
            ),
            heals=False,
        )
    if snapshot is None:
        return ModelFacts(None)
    config = read_config(spec.name, snapshot)
    return ModelFacts(None, {} if isinstance(config, Cause) else config, indexed_size(snapshot))


def complete(snapshot: Path, repository: Path, offline: bool) -> bool:
    """Whether a snapshot has all its weights. Online an unfinished file counts against it: vLLM will finish it."""
    files = weight_files(snapshot)
    unfinished = not offline and any((repository / "blobs").glob("*.incomplete"))
    return bool(files) and not isinstance(files, str) and not unfinished


def cache_folder(spec: ModelSpec, env: Mapping[str, str]) -> Path:
    """The hub's cache as huggingface_hub finds it, or vLLM's own `download-dir`."""
    chosen = given(spec.args, "download-dir") or env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE")
    if chosen:
        return Path(str(chosen)).expanduser()
    home = env.get("HF_HOME")
    if not home:
        base = env.get("XDG_CACHE_HOME") or f"{env.get('HOME') or '~'}/.cache"
        home = f"{base}/huggingface"
    return Path(home).expanduser() / "hub"


def find_snapshot(repository: Path, revision: str) -> Path | None:
    """The folder of a branch, tag or commit in the cache; None when it is not there."""
    try:
        commit = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = revision
    folder = repository / "snapshots" / commit
    return folder if commit and folder.is_dir() else None
