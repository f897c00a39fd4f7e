"""What must hold between values: nothing named twice, nothing needed missing, nothing that can never fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vllmd.config.draft import Draft
from vllmd.config.kinds import Fault
from vllmd.config.names import is_loopback
from vllmd.config.options import RESTART, SECTIONS, Section, default_of
from vllmd.config.problems import Key, nearest, quote, spell
from vllmd.units import gib

_SOCKET_BYTES: Final = 100  # the kernel takes 107; the rest is for a temporary name beside it
_ENGINE_SOCKET_BYTES: Final = 107
_MAKE: Final = "`vllmctl key NAME` makes a key and prints the line"


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the files beside the draft.

    `written`: the paths of models' keys, right or wrong. `stubs`: models that only have tables, [models.x.env] but no
    [models.x]. `torn`: lines are lost; `troubled`: there are other problems. `paths` of [daemon], with defaults.
    """

    written: frozenset[Key]
    stubs: frozenset[str]
    torn: bool
    troubled: bool
    paths: dict[str, Path]


def broken(draft: Draft, known: Known) -> Iterator[Fault]:
    """Every rule between values that the draft breaks."""
    # The second table of a name (marked by NUL) takes no part: it repeats the first.
    names = [name for name in draft.models if "\0" not in name]
    yield from _missing(names, known)
    yield from _ports(draft, names)
    yield from _request_names(draft, names)
    yield from _access(draft, names)
    yield from _bounds(draft)
    yield from _pinned(draft, names)
    yield from _sockets(draft, names, known.paths)
    for name in names:
        yield from _sizes(draft, name)
        if draft.of(name, "swap") not in (None, "stop") and draft.of(name, "port") is not None:
            text = "a model that sleeps has no port: whoever reaches it could put it to sleep, and do more"
            yield Fault(text, "leave port out: it gets a unix socket", draft.source(name, "port"))
    for at, rule in (("defaults",), draft.defaults), *((("models", n), draft.models[n]) for n in names):
        yield from _restart(at, rule.get("restart", {}))


def strange(draft: Draft) -> Iterator[Fault]:
    """What is allowed and surely not meant."""
    listen = draft.http.get("listen", default_of(SECTIONS[Section.HTTP]["listen"]))
    if draft.http.get("open_loopback") is False and listen and not draft.keys:
        yield Fault("nobody can ask over TCP without a key", _MAKE, ("http", "open_loopback"))
    for name, table in draft.models.items():
        if table.get("home") and draft.of(name, "pinned"):
            yield Fault("no effect: a pinned model never makes room", "leave out home", ("models", name, "home"))


def _missing(names: list[str], known: Known) -> Iterator[Fault]:
    """Models without `model`, but for those where that surely comes from another mistake, which has been reported."""
    meant = {path[:-1] for path in known.written if path[-1] == "model" or _means_model(str(path[-1]))}
    for name in names:
        excused = known.torn or (known.troubled and name in known.stubs)
        if ("models", name) not in meant and ("defaults",) not in meant and not excused:
            yield Fault("needs the key model", 'model = "owner/name" or a path', ("models", name))


def _means_model(key: str) -> bool:
    return (
        3 <= len(key) <= 7 and key not in SECTIONS[Section.MODELS] and nearest(key, SECTIONS[Section.MODELS]) == "model"
    )


def _ports(draft: Draft, names: list[str]) -> Iterator[Fault]:
    listen = draft.http.get("listen", default_of(SECTIONS[Section.HTTP]["listen"]))
    taken = {port: "http.listen" for _, port in listen}
    for name in names:
        port = draft.of(name, "port")
        if not port:
            continue
        if port in taken:
            hint = 'give each its own, or "auto"'
            yield Fault(f"{port} is the port of {taken[port]} already", hint, draft.source(name, "port"))
        taken.setdefault(port, spell(("models", name)))


def _request_names(draft: Draft, names: list[str]) -> Iterator[Fault]:
    taken = {name: f"the name of {spell(('models', name))}" for name in names}
    for name in names:
        for alias in draft.of(name, "aliases") or ():
            if alias.name in taken:
                yield Fault(f"{quote(alias.name)} is {taken[alias.name]} already", "", draft.source(name, "aliases"))
            taken.setdefault(alias.name, f"an alias of {spell(('models', name))}")


def _access(draft: Draft, names: list[str]) -> Iterator[Fault]:
    """Who may come in: nobody from elsewhere without a key."""
    for at, (host, port) in enumerate(draft.http.get("listen", ())):
        if not draft.keys and not is_loopback(host):
            text = f"{host}:{port} is open to other machines, which needs an API key"
            hint = f"`vllmctl key NAME` makes one; or listen on 127.0.0.1:{port}"
            yield Fault(text, hint, ("http", "listen", at))
    told = {fault.at for fault in draft.faults}
    for given, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
        if given in draft.http and other not in draft.http and ("http", other) not in told:
            yield Fault(f"needs {other} as well", "", ("http", given))
    for key, table in draft.keys.items():
        if "hash" not in table and ("keys", key, "hash") not in told and "\0" not in key:
            yield Fault("needs the key hash", _MAKE, ("keys", key))
        for name in table.get("models") or ():
            if name not in names:
                near = nearest(name, names)
                hint = f"did you mean {near}?" if near else f"configured: {', '.join(names[:20]) or 'none'}"
                yield Fault(f"no model is called {quote(name)}", hint, ("keys", key, "models"))
    digests = [table["hash"] for table in draft.keys.values() if "hash" in table]
    for key, table in draft.keys.items():
        if digests.count(table.get("hash")) > 1:
            yield Fault("is the hash of another key as well", "each needs its own", ("keys", key, "hash"))


def _bounds(draft: Draft) -> Iterator[Fault]:
    most, memory = draft.http.get("max_body", 0), draft.http.get("memory", default_of(SECTIONS[Section.HTTP]["memory"]))
    if most > memory:
        text = f"no request of {gib(most)} would ever be let in: all together may take {gib(memory)}"
        yield Fault(text, "lower max_body or raise memory", ("http", "max_body"))


def _pinned(draft: Draft, names: list[str]) -> Iterator[Fault]:
    """Pinned models that can never be up together: the first one there would shut out the rest for good."""
    on: dict[str, list[str]] = {}
    for name in names:
        gpus = draft.of(name, "gpus")
        if draft.of(name, "pinned") and isinstance(gpus, tuple) and isinstance(draft.of(name, "vram"), int):
            for device in gpus:
                on.setdefault(device, []).append(name)
    for device, pinned in on.items():
        at, limit = _limit(draft, device)
        need = sum(draft.of(name, "vram") for name in pinned)
        if limit is not None and need > limit and len(pinned) > 1:
            sums = f"need {gib(need)} together; models may use {gib(limit)} of device {device}"
            text = f"{', '.join(pinned)} are pinned and {sums}"
            hint = f"unpin one, lower vram, or raise limit in {spell(at)}"
            yield Fault(text, hint, draft.source(pinned[-1], "pinned"))


def _limit(draft: Draft, device: str) -> tuple[Key, int | None]:
    """The table that surely holds for a device, and its limit; None where there is none, or it is not sure."""
    if device in draft.devices:
        return ("devices", device), draft.devices[device].get("limit")
    sure = device == "cpu" or set(draft.devices) == {"*"}  # else a table may be this one's by another name
    return ("devices", "*"), draft.devices.get("*", {}).get("limit") if sure else None


def _sizes(draft: Draft, name: str) -> Iterator[Fault]:
    vram, kv_cache = draft.of(name, "vram"), draft.of(name, "kv_cache")
    if isinstance(vram, int) and isinstance(kv_cache, int) and kv_cache >= vram:
        text = f"{gib(kv_cache)} of KV cache leave nothing of the {gib(vram)} of vram for the model itself"
        yield Fault(text, "lower kv_cache or raise vram", draft.source(name, "kv_cache"))
    # With other rules than "*" which device it will be is not known yet.
    limit = draft.devices["*"].get("limit") if set(draft.devices) == {"*"} else None
    least = max((size for size in (vram, kv_cache) if isinstance(size, int)), default=0)
    if limit is not None and least > limit:
        key = "vram" if least == vram else "kv_cache"
        text = f"{gib(least)} can never fit: all models together may use {gib(limit)} of a device"
        yield Fault(text, 'raise limit in [devices."*"]', draft.source(name, key))


def _restart(at: Key, rule: dict[str, Any]) -> Iterator[Fault]:
    first, longest = (rule.get(key, default_of(RESTART[key])) for key in ("backoff", "backoff_max"))
    if rule and first > longest:
        yield Fault("backoff is longer than backoff_max", "lower backoff or raise backoff_max", (*at, "restart"))


def _sockets(draft: Draft, names: list[str], paths: dict[str, Path]) -> Iterator[Fault]:
    length = len(bytes(paths["socket"]))
    if length > _SOCKET_BYTES:
        text = f"a path of {length} bytes is too long for a unix socket"
        key = "socket" if "socket" in draft.daemon or "runtime_dir" not in draft.daemon else "runtime_dir"
        yield Fault(text, f"at most {_SOCKET_BYTES} bytes", ("daemon", key))
    room = _ENGINE_SOCKET_BYTES - len(bytes(paths["runtime_dir"])) - len("/.sock")
    for name in names:
        if len(name) > room and draft.of(name, "port") is None:
            text = f"its socket in {paths['runtime_dir']} would have too long a path by {len(name) - room} bytes"
            yield Fault(text, "a shorter name, a shorter daemon.runtime_dir, or a port", ("models", name))
        if paths["runtime_dir"] / f"{name}.sock" == paths["socket"] and draft.of(name, "port") is None:
            text = f"its socket would be vllmd's own control socket {paths['socket']}"
            yield Fault(text, "another name, or a port", ("models", name))
