"""What the operator wants, as values that have been checked once (vllmd/config makes them) and never change.

Sizes are bytes, times are seconds. `None` for a size means "auto". Everything in vllmd reads these; nothing writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class Overrun(StrEnum):
    """What to do when an instance uses more memory than it reserved."""

    WARN = "warn"
    RESTART = "restart"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a device's budget, 0 < part <= 1."""

    part: float


@dataclass(frozen=True, slots=True)
class RestartRule:
    """How crashes are answered: backoff doubles up to `backoff_max`; `max_failures` within `window` is the end."""

    backoff: float = 1.0
    backoff_max: float = 300.0
    max_failures: int = 5
    window: float = 900.0
    reset_after: float = 600.0


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name for requests to a model. `defaults` fill parameters that a request leaves out, `force` replaces them, `drop`
    takes them out. Values as in JSON."""

    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    force: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One [models.NAME] table with [defaults] applied."""

    name: str
    model: str  # hub id or path, as given to vLLM
    category: tuple[str, ...] = ()
    executable: str = "vllm"
    environment: str | None = None
    vram: int | Share | None = None
    kv_cache: int | None = None
    memory_max: int | None = None  # of host memory, for all its processes
    gpus: int | tuple[str, ...] | None = None  # a count, names (index, UUID, "cpu"), or None = auto (one device)
    replicas: tuple[int, int] = (1, 1)
    max_model_len: int | None = None
    args: Mapping[str, Any] = field(
        default_factory=dict
    )  # flag without dashes -> value; True = bare flag, False = --no-flag
    env: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None  # a number; 0 = "auto"; None = unix socket
    autostart: bool = False
    pinned: bool = False
    ttl: float | None = None
    priority: int = 0
    aliases: tuple[Alias, ...] = ()
    on_demand: bool = True  # a request starts it
    home: bool = False  # comes back when there is room after it had to make room
    queue: int = 256  # requests that may wait for it
    concurrency: int = 1024  # requests that are handed to its engine at once
    min_resident: float = 60.0  # once used it stays for so long
    max_wait: float = 120.0  # patience of who waits for it: after that it need not be considerate
    swap: str = "stop"
    on_overrun: Overrun = Overrun.WARN
    start_stall: float = 180.0
    hang_after: float = 120.0
    drain: float = 30.0
    max_drain: float = 600.0
    stop_timeout: float = 20.0
    queue_timeout: float = 300.0
    restart: RestartRule = RestartRule()


def level_of(spec: ModelSpec) -> int:
    """The level of vLLM's sleep mode at which a model makes room; 0 = it does not sleep."""
    return {"sleep1": 1, "sleep2": 2}.get(spec.swap, 0)


@dataclass(frozen=True, slots=True)
class DeviceRule:
    """One [devices.X] table. `reserve` None = auto."""

    reserve: int | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class DaemonSpec:
    """The [daemon] table with all paths absolute."""

    socket: Path
    state_dir: Path
    runtime_dir: Path
    log_dir: Path
    cache_dir: Path
    log_level: str = "info"
    log_format: str = "auto"  # auto | console | json
    log_size: int = 20 << 20  # bytes of one model log file before it is rotated
    log_keep: int = 10  # rotated files kept per model
    spare: int | None = (
        None  # engines that have imported beforehand, per executable; None = where there is memory for it
    )


class Scope(StrEnum):
    """What an API key is good for: requests to models, looking, changing. Each is given for itself."""

    INFER = "infer"
    READ = "read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One [keys.NAME] table. The key itself is nowhere: `digest` is the SHA-256 of it, in hex. `models` None = all of them."""

    name: str
    digest: str
    scopes: frozenset[Scope] = frozenset({Scope.INFER})
    models: tuple[str, ...] | None = None
    priority: int = 0  # added to the model's


@dataclass(frozen=True, slots=True)
class HttpSpec:
    """The [http] table; `listen` holds (host, port), empty = no TCP listener. Sizes in bytes."""

    listen: tuple[tuple[str, int], ...] = (("127.0.0.1", 8400),)
    tls_cert: Path | None = None  # both or none; a chain in PEM
    tls_key: Path | None = None
    hosts: tuple[str, ...] = ()  # names under which we may be asked, beside our own
    origins: tuple[str, ...] = ()  # pages that may ask ("https://ui.example"), beside our own
    open_loopback: bool = True  # who comes from this machine needs no key to look and to ask models
    max_body: int = 256 << 20  # of one request
    memory: int = 512 << 20  # of all requests that wait or are on their way to an engine


@dataclass(frozen=True, slots=True)
class Settings:
    """A whole configuration. `warnings` are sentences (file:line: ...) about what is allowed but surely not meant."""

    daemon: DaemonSpec
    http: HttpSpec = HttpSpec()
    devices: Mapping[str, DeviceRule] = field(default_factory=dict)  # key: "*", an index, a UUID or "cpu"
    models: Mapping[str, ModelSpec] = field(default_factory=dict)  # in file order
    keys: Mapping[str, ApiKey] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()
    secrets: frozenset[str] = frozenset()  # what ${...} put into `env`, whole values and parts: to be shown nowhere


@dataclass(frozen=True, slots=True)
class Remedy:
    """One thing to do about a cause. `action` is set where vllmd itself could do it: {"method", "path"} of the API."""

    text: str
    action: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Cause:
    """Why something is not as wanted: `text` is the whole sentence, `short` at most 24 characters for a table.

    `heals` says whether trying the same again may succeed; a cause that cannot heal is never retried.
    `detail` is the root exception or log line it was read from, `phase` where in the start it happened.
    """

    kind: str  # short-with-dashes, as in data/rules.toml: "kv-too-small", "no-room", "crashed", "hung"
    text: str
    short: str
    remedies: tuple[Remedy, ...] = ()
    heals: bool = True
    detail: str = ""
    phase: str = ""
