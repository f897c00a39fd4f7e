"""Preflight: what would make a start fail for certain, found in well under a second instead of by vLLM in 15 to 75.

Nothing is imported, started or asked over the network. Only what is sure is refused: where files do not tell, vLLM decides.
The order is from what is cheapest and most fundamental to what needs the facts found before.
"""

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from vllmd.edge import port as ports
from vllmd.edge.engine import Installation, check_flags, find_executable, knows_config, read_installation
from vllmd.edge.hub import cache_folder, find_model
from vllmd.facts import Inspection, ModelFacts
from vllmd.modelconfig import given, max_context
from vllmd.spec import Cause, ModelSpec, Remedy
from vllmd.units import GIB, MIB, gib

#: What logs, state and compiled code need at least, in bytes.
DISK_LEAST = 64 * MIB
#: Flags after which the model's own context length is not the limit any more.
_STRETCH = (
    "hf-overrides",
    "hf-config-path",
    "config-format",
    "rope-scaling",
    "rope-theta",
    "rope-parameters",
    "config",
)


def inspect(
    spec: ModelSpec,
    *,
    cache_dir: Path,
    log_dir: Path,
    state_dir: Path,
    taken_ports: Mapping[int, str],
    env: Mapping[str, str],
) -> Inspection | Cause:
    """All that is found of a model, or why it cannot start. Blocks on the disk: call it in a thread.

    `taken_ports` are those of other instances, with their names. `env` is what the engine inherits; the model's own comes
    on top. Never raises for what an operator may have done.
    """
    try:
        return look(spec, (log_dir, cache_dir, state_dir), taken_ports, {**env, **spec.env})
    except OSError as error:
        what = f"cannot read {error.filename}: {error.strerror}" if error.filename else str(error)
        remedy = Remedy("give vllmd's user the right to read it")
        return Cause("unreadable", f"cannot start {spec.name}: {what}", "not readable", (remedy,), heals=False)


def look(
    spec: ModelSpec, folders: tuple[Path, ...], taken: Mapping[int, str], env: Mapping[str, str]
) -> Inspection | Cause:
    """All checks in their order. Raises OSError for what our user may not read."""
    executable = find_executable(spec.name, spec.executable, env)
    if isinstance(executable, Cause):
        return executable
    installed = read_installation(executable)
    known = installed.facts.flags
    if known is not None and (cause := check_flags(spec.name, spec.args, known, installed.facts.version)):
        return cause
    model = find_model(spec, env)
    if isinstance(model, Cause):
        return model
    cause = (
        check_context(spec, model, env)
        or check_code(spec, model, installed)
        or check_compiler(spec, installed, env)
        or check_disks(spec, folders)
        or check_download(spec, model, env)
    )
    if cause:
        return cause
    port = check_port(spec, taken)
    return port if isinstance(port, Cause) else Inspection(model, installed.facts, port)


def check_context(spec: ModelSpec, model: ModelFacts, env: Mapping[str, str]) -> Cause | None:
    """max_model_len beyond what the model was made for."""
    asked, longest = spec.max_model_len, max_context(model.config)
    forced = env.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "").lower() in ("1", "true")
    if asked is None or longest is None or asked <= longest or forced:
        return None
    if any(given(spec.args, flag) is not None for flag in _STRETCH):
        return None
    return Cause(
        "context-too-long",
        f"cannot start {spec.name}: max_model_len is {asked}, the model's context ends at {longest}",
        "context too long",
        (Remedy(f"models.{spec.name}.max_model_len = {longest}"),),
        heals=False,
    )


def check_code(spec: ModelSpec, model: ModelFacts, installed: Installation) -> Cause | None:
    """A model whose configuration only its own code can read, without leave to run that code, or where it cannot run."""
    auto_map = model.config.get("auto_map")
    if not isinstance(auto_map, Mapping) or "AutoConfig" not in auto_map or installed.package is None:
        return None
    if given(spec.args, "trust-remote-code") is not True:
        if knows_config(installed.package, str(model.config.get("model_type"))) is not False:
            return None
        return Cause(
            "needs-remote-code",
            f"cannot start {spec.name}: {spec.model} brings its own code and trust-remote-code is not set",
            "needs trust-remote-code",
            (Remedy(f"read its *.py files, then set models.{spec.name}.args.trust-remote-code = true"),),
            heals=False,
        )
    folder = Path(model.path or "").name
    if "." in folder and not spells_dots(installed.package):
        return Cause(
            "dot-in-name",
            f'cannot start {spec.name}: "{folder}" brings its own code, and Python cannot import from a name with a dot',
            "dot in folder name",
            (Remedy(f"rename the folder to {folder.replace('.', '_')}"),),
            heals=False,
        )
    return None


def spells_dots(package: Path) -> bool:
    """Whether this environment's transformers rewrites dots in module names (newer ones do); True when it is not found."""
    try:
        source = (package.parent / "transformers" / "dynamic_module_utils.py").read_bytes()
    except OSError:
        return True
    return b"_dot_" in source


def check_compiler(spec: ModelSpec, installed: Installation, env: Mapping[str, str]) -> Cause | None:
    """The CPU build compiles its models with a C++ compiler: CXX, or g++."""
    compiler = env.get("CXX") or "g++"
    skipped = given(spec.args, "enforce-eager") is True or any(
        given(spec.args, flag) is not None for flag in ("compilation-config", "optimization-level")
    )
    if not installed.on_cpu or skipped or shutil.which(compiler, path=env.get("PATH", os.defpath)):
        return None
    return Cause(
        "no-compiler",
        f"cannot start {spec.name}: vLLM's CPU build compiles models with {compiler}, which is not in PATH",
        "no C++ compiler",
        (Remedy("apt install g++"), Remedy(f"models.{spec.name}.args.enforce-eager = true")),
        heals=False,
    )


def check_disks(spec: ModelSpec, folders: tuple[Path, ...]) -> Cause | None:
    """A directory of ours that cannot be written to."""
    for folder in folders:
        # Some are made later by whoever needs them first.
        at = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
        if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
            return no_disk(spec, f"{at} is not writable", f"chown or mount it so that vllmd may write to {folder}")
        try:
            disk = os.statvfs(at)
        except OSError as error:
            return no_disk(spec, f"cannot look at {at}: {error.strerror}", "check its mount")
        free = disk.f_bavail * disk.f_frsize
        if free < DISK_LEAST:
            said = f"{at} has {free} bytes left, at least {DISK_LEAST} ({gib(DISK_LEAST)}) are needed"
            return no_disk(spec, said, f"free space on the file system of {at}")
        if disk.f_files and not disk.f_favail:
            return no_disk(spec, f"the file system of {at} has no inodes left", f"delete files there: df -i {at}")
    return None


def no_disk(spec: ModelSpec, why: str, remedy: str) -> Cause:
    return Cause("no-disk", f"cannot start {spec.name}: {why}", "disk full or read-only", (Remedy(remedy),))


def check_download(spec: ModelSpec, model: ModelFacts, env: Mapping[str, str]) -> Cause | None:
    """Room for what is still to be downloaded, as far as its size is known."""
    if model.path is not None or model.weights is None:
        return None
    cache = cache_folder(spec, env)
    at = next((p for p in (cache, *cache.parents) if p.exists()), Path("/"))
    have = downloaded(cache / f"models--{spec.model.replace('/', '--')}" / "blobs")
    missing, free = model.weights - have, shutil.disk_usage(at).free
    if missing + GIB <= free:
        return None
    return no_disk(
        spec,
        f"{spec.model} still needs {gib(missing)} to download, {at} has {gib(free)} left",
        "free space, or set HF_HOME to a larger disk",
    )


def downloaded(blobs: Path) -> int:
    """Bytes that the cache has of a repository already, of unfinished files too."""
    try:
        with os.scandir(blobs) as entries:
            return sum(entry.stat().st_blocks * 512 for entry in entries)
    except OSError:
        return 0


def check_port(spec: ModelSpec, taken: Mapping[int, str]) -> int | Cause | None:
    """The port to use (None = unix socket), or who has it."""
    if spec.port is None:
        return None
    if spec.port == 0:
        try:
            return ports.choose(taken)
        except OSError as error:
            return Cause("port-taken", f"cannot start {spec.name}: {error.strerror or error}", "no free port")
    if spec.port < 1024:
        reason = os.strerror(errno.EACCES).lower()
        said = f"cannot start {spec.name}: port {spec.port}: {reason} (vLLM takes 1024 to 65535)"
        return Cause(
            "port-taken", said, "port not allowed", (Remedy(f'models.{spec.name}.port = "auto"'),), heals=False
        )
    who = taken.get(spec.port) or ports.busy(spec.port)
    if not who:
        return spec.port
    return Cause(
        "port-taken",
        f"cannot start {spec.name}: port {spec.port} is taken by {who}",
        f"port {spec.port} is taken",
        (Remedy(f'models.{spec.name}.port = "auto"'), Remedy(f"stop {who}")),
    )
