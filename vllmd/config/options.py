"""The one table of keys. Checks, defaults, the JSON Schema, the reload plan and docs/config.md all come from it.

`python -m vllmd.config.options` prints docs/config.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from vllmd.config import access, engine, kinds, names
from vllmd.config.kinds import Bad, Fault, Kind, Place, choice, duration, whole
from vllmd.config.problems import nearest, quote

_ENOUGH: Final = 50  # faults of one table after which no more hints are sought: that is not our file


class Section(StrEnum):
    """The tables of the file; `restart` is the one inside a model."""

    DAEMON = "daemon"
    HTTP = "http"
    DEVICES = "devices"
    MODELS = "models"
    KEYS = "keys"
    RESTART = "restart"


@dataclass(frozen=True, slots=True)
class Option:
    """One key. `default` is written as in the file; None means that there is none, and `absent` says what then holds.

    `restarts`: a change ends a running engine (of a model) or needs a new daemon (of [daemon] and [http]).
    `later`: what the key waits for; until then it is understood and has no effect, except for its default.
    """

    section: Section
    key: str
    kind: Kind
    default: Any
    doc: str
    absent: str = ""
    restarts: bool = False
    later: str = ""


def _section(section: Section) -> Callable[..., Option]:
    def make(key: str, kind: Kind, default: Any, doc: str, **more: Any) -> Option:
        return Option(section, key, kind, default, doc, **more)

    return make


def read_table(
    options: Mapping[str, Option], table: Mapping[str, Any], place: Callable[[str], Place]
) -> tuple[dict[str, Any], list[Fault]]:
    """What is right in a table, typed, by key; and the faults of the rest."""
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    for key, value in table.items():
        if key not in options:
            near = len(faults) < _ENOUGH
            faults.append(unknown(options, key, value) if near else Fault("unknown key", at=(key,)))
        else:
            try:
                values[key] = options[key].kind.read(value, place(key))
            except Bad as exc:
                faults += [Fault(f.message, f.hint, (key, *f.at)) for f in exc.faults]
    return values, faults


def unknown(options: Mapping[str, Option], key: str, value: Any) -> Fault:
    """The fault of a key that the table does not have, with the one that was surely meant."""
    if homes := [option.section for option in OPTIONS if option.key == key]:
        return Fault("unknown key", f"it belongs into {header(homes[0])}", (key,))
    near = nearest(key, options)
    of_model = "model" in options
    split = of_model and not near and isinstance(value, dict)  # [models.a.b]: perhaps a name that lacks its quotes
    whole = split and not set(value).isdisjoint(options)
    if of_model and not whole and (hint := engine.as_key(key, value, near is not None)):
        return Fault("unknown key", hint, (key,))
    if near:
        return Fault("unknown key", f"did you mean {near}?", (key,))
    if split:
        return Fault("unknown key", 'a model\'s name with a dot needs quotes: [models."a.b"]', (key,))
    return Fault("unknown key", "known: " + ", ".join(options), (key,))


def header(section: Section) -> str:
    """How a table of this section is opened."""
    return {
        Section.DEVICES: '[devices."*"]',
        Section.MODELS: "[models.NAME]",
        Section.KEYS: "[keys.NAME]",
        Section.RESTART: "restart = { }",
    }.get(section, f"[{section}]")


def _read_restart(value: Any, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise kinds.bad(f"{quote(value)} is not a table", 'try { max_failures = 5, window = "15m" }')
    values, faults = read_table(RESTART, value, lambda _: place)
    if faults:
        raise Bad(*faults)
    return values


def _restart_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {o.key: {**o.kind.schema, "description": o.doc, "default": o.default} for o in RESTART.values()},
    }


_d, _h, _v = _section(Section.DAEMON), _section(Section.HTTP), _section(Section.DEVICES)
_m, _r, _k = _section(Section.MODELS), _section(Section.RESTART), _section(Section.KEYS)

_RESTART_OPTIONS: Final = (
    _r("backoff", duration("100ms", "1h"), "1s", "The pause after the first crash; it doubles with each further one."),
    _r("backoff_max", duration("100ms", "1d"), "300s", "The longest pause."),
    _r("max_failures", whole(1, 1000), 5, "So many crashes within `window` and it is `failed`, its memory free."),
    _r("window", duration("1s", "7d"), "15m", "The time in which crashes are counted."),
    _r("reset_after", duration("1s", "7d"), "10m", "After so long in health the next crash counts as the first."),
)
RESTART: Final = {o.key: o for o in _RESTART_OPTIONS}
_RESTART_KIND: Final = Kind("a table", _restart_schema(), _read_restart)

OPTIONS: Final = (
    # -- [daemon]
    _d("socket", names.PATH, None, "The control socket, for vllmctl. At most 100 bytes long.", restarts=True,
       absent="`/run/vllmd.sock`; when not root `vllmd.sock` in `runtime_dir`"),
    _d("state_dir", names.PATH, None, "What must survive: our processes, what each model needs.", restarts=True,
       absent="`$STATE_DIRECTORY`, or `/var/lib/vllmd`; when not root `$XDG_STATE_HOME/vllmd` or "
              "`~/.local/state/vllmd`"),
    _d("runtime_dir", names.PATH, None, "Sockets and scratch directories of engines.", restarts=True,
       absent="`$RUNTIME_DIRECTORY`, or `/run/vllmd`; when not root `$XDG_RUNTIME_DIR/vllmd` or `vllmd-UID` in the "
              "directory for temporary files"),
    _d("log_dir", names.PATH, None, "What engines print, one file per model.", restarts=True,
       absent="`$LOGS_DIRECTORY`, or `/var/log/vllmd`; when not root `log` in `state_dir`"),
    _d("cache_dir", names.PATH, None, "Compiled graphs and kernels, shared by all engines.", restarts=True,
       absent="`$CACHE_DIRECTORY`, or `/var/cache/vllmd`; when not root `$XDG_CACHE_HOME/vllmd` or `~/.cache/vllmd`"),
    _d("log_level", choice("debug", "info", "warning", "error"), "info", "How much vllmd itself says."),
    _d("log_format", choice("auto", "console", "json", "journal"), "auto", restarts=True,
       doc="How vllmd's own log looks. `journal`: entries with fields, such as VLLMD_MODEL; a console where there is no "
           "journal. `auto`: `journal` under systemd, else `console`."),
    _d("log_size", kinds.size(least=64 << 10), "20MiB", "A model's log file is rotated at this size."),
    _d("log_keep", whole(1, 1000), 10, "So many rotated files are kept per model."),
    _d("spare", whole(0, 1, (("auto", None),)), "auto",
       "A process that has imported vLLM beforehand and becomes the next start, which is a third shorter; about 0.5 GB of host "
       "memory. `auto`: where there are 8 GiB to spare."),
    # -- [http]
    _h("listen", names.LISTEN, ["127.0.0.1:8400"], restarts=True,
       doc="Addresses of the gateway and of the status API. `[]` = none. One that other machines can reach needs [keys.NAME]."),
    _h("tls_cert", names.PATH, None, "The certificate with its chain, PEM, for TLS on all addresses. Read again at a reload; "
       "to begin or end TLS vllmd must be restarted.",
       absent="no TLS"),
    _h("tls_key", names.PATH, None, "Its private key, PEM.", absent="no TLS"),
    _h("hosts", names.HOSTS, [], "Names under which clients ask for this machine, beside its own: others are refused."),
    _h("origins", names.ORIGINS, [], "Pages of other sites that may ask from a browser."),
    _h("open_loopback", kinds.BOOL, True,
       "Who comes from this machine needs no key to ask models and to look. Turn it off behind a reverse proxy."),
    _h("max_body", kinds.size(least=64 << 10), "256MiB", "The largest request; never more than `memory`."),
    _h("memory", kinds.size(least=1 << 20), "512MiB", "All requests together that wait or are on their way to an engine."),
    # -- [devices."*"]
    _v("reserve", kinds.size(auto=True, least=0), "auto",
       "Left to others. `auto`: 512 MiB, or with a display attached what it uses + 1 GiB."),
    _v("limit", kinds.SIZE_OR_AUTO, "auto", "The most that all models together take. `auto`: no limit but `reserve`."),
    # -- [keys.NAME]
    _k("hash", access.HASH, None, "SHA-256 of the key, as `vllmctl key NAME` prints it. The key itself is nowhere.",
       absent="needed"),
    _k("scopes", access.SCOPES, ["infer"], "What it is good for: `infer` asks models, `read` looks, `admin` changes."),
    _k("models", access.MODELS, None, "The models that it may ask.", absent="all"),
    _k("priority", whole(-100, 100), 0, "Added to the model's for who waits with it."),
    # -- [models.NAME] and [defaults]
    _m("model", names.MODEL, None, restarts=True, absent="needed",
       doc="A hub id (`owner/name`) or a path: `./folder` (beside the file), `/folder`, `~/folder`."),
    _m("category", names.CATEGORIES, [], "What it is for, in words of your own: `ocr`, `vlm`, `llm`, `embed`. "
       "For `vllmctl start --category ocr`."),
    _m("vram", kinds.VRAM, "auto", restarts=True,
       doc="Memory on each device it uses, all included: weights, KV cache, CUDA context. A size, a part of the "
           "device's budget (`\"50%\"`, `0.5`), or `auto`: estimated, and measured from the first good start on."),
    _m("kv_cache", kinds.SIZE_OR_AUTO, "auto", restarts=True,
       doc="Memory of the KV cache alone, as part of `vram`. `auto`: what is left of `vram`, or enough for one request "
           "of `max_model_len`."),
    _m("memory_max", kinds.SIZE, None, restarts=True, absent="no limit of its own",
       doc="Host memory that the engine and all its processes may take, beside the GPU's: beyond it the kernel ends this model "
           "and no other. Needs systemd with the memory controller."),
    _m("max_model_len", whole(1, 1 << 30), None, restarts=True, absent="the model's own maximum",
       doc="The longest request, prompt and answer, in tokens. The KV cache must hold one such request."),
    _m("gpus", names.GPUS, "auto", restarts=True,
       doc="`auto` = one device, chosen by room; a count = so many at once (tensor parallel); a list of indices or "
           "UUIDs (`[0, 1]`, `[\"GPU-...\"]`); `[\"cpu\"]`."),
    _m("args", engine.ARGS, {}, restarts=True,
       doc="Further flags of `vllm serve`, without dashes in front. `true` = the bare flag, `false` = `--no-flag`, a "
           "list = several values, a table = JSON. Added to those of [defaults], flag by flag."),
    _m("env", engine.ENV, {}, restarts=True,
       doc="Further environment variables. The place for secrets: `HF_TOKEN = \"${credential:hf}\"`. Added to those of "
           "[defaults], name by name."),
    _m("executable", names.COMMAND, "vllm", "The command, or a path to it.", restarts=True),
    _m("environment", names.ENVIRONMENT, None, "The environment to run in.", restarts=True,
       absent="`executable` as it is", later="environments come in a later version; use executable"),
    _m("port", kinds.PORT, None, restarts=True, absent="a unix socket",
       doc="A port on 127.0.0.1 for direct use, from 1024 to 65535, or `auto` for a free one."),
    _m("autostart", kinds.BOOL, False, "Start it with the daemon."),
    _m("restart", _RESTART_KIND, {}, "How crashes are answered; see the next table. Added to [defaults], key by key."),
    _m("on_overrun", choice("warn", "restart", "stop"), "warn", "When it uses more memory than it reserved."),
    _m("start_stall", duration("5s", "1d"), "180s",
       "A start is given up after so long without a log line, a byte read or memory growth."),
    _m("hang_after", duration("5s", "1d"), "120s", "A ready engine that makes no progress for so long is restarted."),
    _m("drain", duration("0s", "1d"), "30s", restarts=True,
       doc="A stop lets running requests finish for so long (`--shutdown-timeout`)."),
    _m("stop_timeout", duration("1s", "1h"), "20s", "After the drain the process gets so long before it is killed."),
    _m("queue_timeout", duration("1s", "1d"), "300s",
       "A start waits so long for memory or for its turn on a device, and a request for its model."),
    _m("on_demand", kinds.BOOL, True, "A request starts it, and others make room for it. `false`: only an operator does."),
    _m("pinned", kinds.BOOL, False, "Never stopped to make room for another."),
    _m("home", kinds.BOOL, False, "Comes back when there is room again after it made room for another."),
    _m("ttl", duration("1s", "366d", off=True), "off", "Stop when idle for so long, counted from the end of the last request."),
    _m("priority", whole(-100, 100), 0, "Who comes first where several wait."),
    _m("aliases", access.ALIASES, [],
       "Further names for requests: a list, or a table in which each can fill in, force or drop parameters: "
       "`{ terse = { defaults = { max_tokens = 50 }, force = { temperature = 0 }, drop = [\"seed\"] } }`."),
    _m("queue", whole(1, 100_000), 256, "So many requests may wait for it; who comes then is told to come later (429)."),
    _m("concurrency", whole(1, 100_000), 1024, "So many requests are given to its engine at once; the others wait."),
    _m("min_resident", duration("0s", "1d"), "60s", "Once used it stays for so long before it makes room."),
    _m("max_wait", duration("0s", "1d"), "120s",
       "The patience of who waits for it: after that even busy and just used ones have to make room."),
    _m("max_drain", duration("0s", "1d"), "10m", "One that makes room may finish its requests for so long."),
    _m("swap", choice("stop", "sleep1", "sleep2"), "stop", "Making room: stop it, or vLLM's sleep level 1 or 2, once"
       " `vllmctl swap-test` has proved it.", restarts=True),
    _m("replicas", names.REPLICAS, 1, "Instances of it: a number, or `{ min = 0, max = 2 }`.",
       later="replicas come in a later version"),
    *_RESTART_OPTIONS,
)  # fmt: skip

SECTIONS: Final = {section: {o.key: o for o in OPTIONS if o.section is section} for section in Section}
#: Keys at the top of the file: the sections, and [defaults], which takes the keys of a model.
TOP: Final = (
    Section.DAEMON.value, Section.HTTP.value, Section.DEVICES.value, "defaults", Section.MODELS.value, Section.KEYS.value,
)  # fmt: skip


def default_of(option: Option) -> Any:
    """The default, typed as `read` gives it; None where there is none."""
    anywhere = Place(kinds.ROOT, kinds.ROOT)
    return None if option.default is None else option.kind.read(option.default, anywhere)


if __name__ == "__main__":
    import sys

    from vllmd.config.manual import page

    sys.stdout.write(page())
