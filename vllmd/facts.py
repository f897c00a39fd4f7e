"""What is known about models, engines, devices and starts: the values that events carry and the core keeps.

Sizes are bytes, times are seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

#: What a sum consists of: (label, bytes).
Parts = tuple[tuple[str, int], ...]


class Phase(StrEnum):
    """The parts of a start, in their order. Each is optional: vLLM's log lines differ between versions and devices."""

    IMPORT = "import"
    DOWNLOAD = "download"
    LOAD = "load"
    MEASURE = "measure"
    COMPILE = "compile"
    GRAPHS = "graphs"
    HTTP = "http"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is on disk of a model. `path` is None for a hub model that is not downloaded yet."""

    path: str | None
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json as it is
    weights: int | None = None  # bytes of all tensors, from the safetensors headers; None = unknown
    fingerprint: str = ""  # changes when the files do


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One vLLM installation, found without importing it."""

    executable: str  # absolute path
    version: str = ""  # "0.32.0+cpu"; "" = could not be told
    flags: frozenset[str] | None = None  # long flags of `vllm serve` without dashes; None = could not be told


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that preflight found. `port` is the port to use (chosen when the model asked for "auto")."""

    model: ModelFacts
    engine: EngineFacts
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that uses memory of a device. `used` in bytes."""

    pid: int
    name: str
    used: int


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One look at one device. All sizes in bytes.

    used = what the device says is in use by everybody; instances = our part of it, by instance id;
    external = the rest, of which `processes` names the largest. `engine_total` and `engine_free` are what vLLM itself
    will see there (its CPU worker looks at one NUMA node's RAM, not the machine's), to turn bytes into a share.
    """

    id: str  # NVML UUID, or "cpu"
    kind: str  # "gpu" | "mig" | "cpu"
    index: int | None
    name: str
    total: int
    used: int
    engine_total: int
    engine_free: int
    display: int = 0  # bytes used by a display server; 0 = none attached
    instances: Mapping[str, int] = field(default_factory=dict)
    external: int = 0
    processes: tuple[Holder, ...] = ()


@dataclass(frozen=True, slots=True)
class Figures:
    """Numbers that vLLM itself printed during a start, in bytes (tokens for kv_tokens). None = not printed."""

    kv_bytes: int | None = None
    kv_tokens: int | None = None
    weights: int | None = None
    consumed: int | None = None  # weights + non-torch ("Actual usage is ...")
    peak: int | None = None  # activations
    graphs: int | None = None


@dataclass(frozen=True, slots=True)
class Learned:
    """What a good start taught, kept per (model, flags, vLLM version, device kind). Bytes are per device."""

    base: int  # everything but the KV cache, measured at its peak
    kv: int  # KV cache that it had
    phases: Mapping[str, float] = field(default_factory=dict)  # phase -> seconds, mean of the last starts
    total: float = 0.0  # seconds from spawn to ready, mean of the last starts


@dataclass(frozen=True, slots=True)
class Proof:
    """What a swap-test showed of an engine's sleep, kept as Learned is. Bytes of the device where it is worst, seconds of the
    slowest."""

    level: int  # of vLLM's sleep mode
    residual: int  # in use while it sleeps
    freed: int  # that others may have meanwhile; 0 = the build only pretends to sleep
    sleep_s: float
    wake_s: float


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything that is needed to become an engine. `env` is laid over a clean environment. `endpoint` is
    "http://127.0.0.1:8000" or "unix:/run/vllmd/NAME.sock"; `scratch` its own short TMPDIR, removed with it."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    endpoint: str
    served_name: str
    scratch: str
    cookie: str


@dataclass(frozen=True, slots=True)
class Need:
    """What one start takes of each of its devices. Sizes in bytes; `parts` add up to `total`."""

    total: int  # to reserve
    kv: int | None  # KV cache: exact when pinned, else what vLLM should come to
    pinned: bool  # pass --kv-cache-memory-bytes
    share: float | None  # --gpu-memory-utilization; None = not needed (CPU with pinned KV)
    base: int  # all but the KV cache
    context: int  # tokens of one request that the KV cache is meant to hold; 0 = not known
    measured: bool  # from a good start, not from rules
    parts: Parts
