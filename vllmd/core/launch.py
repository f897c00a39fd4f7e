"""From a model, a place and a need to argv and environment of `vllm serve`.

The command line is what vLLM's own documentation shows; nothing secret is in it. The caches are shared between
instances (a compile is worth 20 s), the scratch directory is not (vLLM leaves sockets and files there).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vllmd.facts import DeviceReading, Inspection, Launch, Need
from vllmd.spec import ModelSpec, level_of

QUIET_PATHS = "/health,/metrics,/ping"
SOCKET_LONGEST = 107  # bytes of a socket's path: the kernel's limit
#: vLLM takes a VLLM_RPC_BASE_PATH of at most 70 bytes, as it makes sockets with 36 more below it. So the root of all scratch
#: directories may have 48 (vllmd/places.py), and what stands below it this much.
SCRATCH_LEAF = 21
#: Names that `scratch_name` gives, and what becomes of them while they are removed.
SCRATCH_NAME = re.compile(r"[a-z0-9][a-z0-9._~-]{0,19}-\d+(\.gone-\d+-\d+)?")


@dataclass(frozen=True, slots=True)
class Places:
    """Directories a launch may use. `hf_home` None = the engine's default; `mark` tells our processes from others'."""

    runtime: Path
    cache: Path
    scratch: Path
    mark: str
    hf_home: Path | None = None


def launch(
    spec: ModelSpec,
    instance: str,
    attempt: int,
    need: Need,
    found: Inspection,
    devices: Sequence[DeviceReading],
    at: Places,
) -> Launch:
    """Everything the process edge needs to start this attempt."""
    scratch = at.scratch / scratch_name(instance, attempt)
    if found.port:
        endpoint = f"http://127.0.0.1:{found.port}"
        listen = ["--host", "127.0.0.1", "--port", str(found.port)]
    else:
        path = socket_path(at.runtime, instance)
        endpoint, listen = f"unix:{path}", ["--uds", str(path)]
    # A hub id stays one: remote code is loaded under the repository's name, not under a snapshot's folder.
    model = found.model.path if found.model.path and spec.model[0] in "/.~" else spec.model
    argv = [found.engine.executable, "serve", model, "--served-model-name", spec.name, *listen]
    argv += memory_flags(spec, need)
    if len(devices) > 1:
        argv += ["--tensor-parallel-size", str(len(devices))]
    for flag, value in (
        ("shutdown-timeout", str(math.ceil(spec.drain))),
        ("disable-access-log-for-endpoints", QUIET_PATHS),
    ):
        # An older vLLM without the flag still runs; it only stops less gently or logs more.
        if (found.engine.flags is None or flag in found.engine.flags) and flag not in spec.args:
            argv += [f"--{flag}", value]
    if level_of(spec) and any(
        d.kind != "cpu" for d in devices
    ):  # the CPU build refuses the flag, and answers as if it slept
        argv.append("--enable-sleep-mode")
    argv += spell_args(spec.args)
    return Launch(
        argv=tuple(argv),
        env=environment(spec, found, devices, at, str(scratch)),
        endpoint=endpoint,
        served_name=spec.name,
        scratch=str(scratch),
        cookie=f"{at.mark}:{instance}:{attempt}",
    )


def scratch_name(instance: str, attempt: int) -> str:
    """The name of an attempt's directory below Places.scratch."""
    return f"{shorten(instance, SCRATCH_LEAF - 1 - len(str(attempt)))}-{attempt}"


def socket_path(runtime: Path, instance: str) -> Path:
    """Where an engine without a port listens."""
    room = SOCKET_LONGEST - len(str(runtime).encode()) - len("/.sock")
    return runtime / f"{shorten(instance, room)}.sock"


def shorten(instance: str, room: int) -> str:
    """The instance's name, where it is longer than `room` its beginning and a digest of it behind a "~", which no name has."""
    if len(instance) <= room and "/" not in instance:
        return instance
    digest = blake2b(instance.encode(), digest_size=4).hexdigest()
    return f"{instance[: max(1, room - 1 - len(digest))].replace('/', '~')}~{digest}"


def memory_flags(spec: ModelSpec, need: Need) -> list[str]:
    """The reservation as vLLM's flags. With pinned KV both are passed: its free-memory check still reads the share."""
    flags = []
    if need.share is not None:
        flags += ["--gpu-memory-utilization", f"{need.share:.4f}"]
    if need.pinned and need.kv is not None:
        flags += ["--kv-cache-memory-bytes", str(need.kv)]
    if spec.max_model_len is not None:
        flags += ["--max-model-len", str(spec.max_model_len)]
    return flags


def spell_args(args: Mapping[str, Any]) -> list[str]:
    """The operator's own flags: true = bare flag, false = --no-flag, a table = JSON, a list = several values."""
    words: list[str] = []
    for flag, value in args.items():
        match value:
            case True:
                words.append(f"--{flag}")
            case False:
                words.append(f"--no-{flag}")
            case dict():
                words += [f"--{flag}", json.dumps(value, separators=(",", ":"))]
            case list() | tuple():
                words += [f"--{flag}", *map(str, value)]
            case _:
                words += [f"--{flag}", str(value)]
    return words


def environment(
    spec: ModelSpec, found: Inspection, devices: Sequence[DeviceReading], at: Places, scratch: str
) -> dict[str, str]:
    """What is laid over the clean environment; the operator's own `env` last (its check lets none of ours by)."""
    env = {
        "VLLM_CACHE_ROOT": str(at.cache / "vllm"),
        "VLLM_CONFIG_ROOT": str(at.cache / "config"),
        "TRITON_CACHE_DIR": str(at.cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(
            at.cache / "inductor"
        ),  # its default is below TMPDIR, which is each attempt's own
        "FLASHINFER_WORKSPACE_BASE": str(at.cache / "flashinfer"),
        "TMPDIR": scratch,
        "VLLM_RPC_BASE_PATH": scratch,
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
        "NO_COLOR": "1",
        "VLLM_DISABLE_LOG_LOGO": "1",
    }
    if at.hf_home is not None:
        env["HF_HOME"] = str(at.hf_home)
    if found.model.path is not None:
        env["HF_HUB_OFFLINE"] = "1"  # all files are here: do not wait for a hub that may be down
    if any(device.kind != "cpu" for device in devices):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(device.id for device in devices)
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if level_of(spec):
        env["VLLM_SERVER_DEV_MODE"] = (
            "1"  # /sleep and /wake_up: on a unix socket of ours only, and never through the gateway
        )
    return {**env, **spec.env}
