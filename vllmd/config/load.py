"""A file and its drop-ins -> Settings, or ConfigError with every problem of all of them.

    bytes -parse-> layers -substitute-> layers -read-> a draft of each (for its own mistakes)
                                        merged -read-> the draft of all -rules, defaults-> Settings

Drop-ins are `vllmd.toml.d/*.toml` beside `vllmd.toml`, merged in name order: tables merge, everything else replaces.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from vllmd.config.draft import Draft, read
from vllmd.config.engine import spelling
from vllmd.config.kinds import Fault, Place
from vllmd.config.options import OPTIONS, RESTART, SECTIONS, Section, default_of
from vllmd.config.parse import MAX_BYTES, Layer, parse
from vllmd.config.paths import complete, find_config, home, is_root, own_config
from vllmd.config.problems import ConfigError, Key, Problem, spell
from vllmd.config.rules import Known, broken, strange
from vllmd.config.substitute import Filler
from vllmd.spec import ApiKey, DaemonSpec, DeviceRule, HttpSpec, ModelSpec, Overrun, RestartRule, Settings

__all__ = ["ConfigError", "Problem", "Verdict", "check", "find_config", "load"]

_PATHS: Final = ("socket", "state_dir", "runtime_dir", "log_dir", "cache_dir")
_ADDED: Final = ("args", "env", "restart")  # tables in which a model's keys are added to those of [defaults]
_MISSING: Final = object()


def load(
    path: Path,
    *,
    root: bool | None = None,
    env: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    content: bytes | None = None,
) -> Settings:
    """The configuration in `path` and its drop-ins, checked. Raises ConfigError with all problems, and nothing else.

    `root` chooses the default paths (None: by the user id). `overrides` go over the files: {"daemon.socket": "/x"}.
    `content` is checked in place of what `path` holds.
    """
    found = _examine(path, root, env, overrides, content)
    if found.problems:
        raise ConfigError(found.problems)
    return _settings(found.draft, found.paths, found.layers, tuple(map(str, found.warnings)), found.secrets)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with a file and what is strange about it, as somebody sees it who is not vllmd."""

    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    models: tuple[str, ...]
    files: tuple[str, ...]


def check(path: Path, *, env: Mapping[str, str] = os.environ, content: bytes | None = None) -> Verdict:
    """As load(), away from vllmd: what only its environment and its credentials could fill in is a warning."""
    found = _examine(path, None, env, {}, content, offline=True)
    files = tuple(layer.file for layer in found.layers[:-1])
    return Verdict(tuple(sorted(found.problems)), tuple(found.warnings), tuple(found.draft.models), files)


@dataclass(frozen=True, slots=True)
class _Found:
    """A configuration as far as it could be read."""

    layers: list[Layer]
    draft: Draft
    paths: dict[str, Path]
    problems: set[Problem]
    warnings: list[Problem]
    secrets: frozenset[str]


def _examine(
    path: Path,
    root: bool | None,
    env: Mapping[str, str],
    overrides: Mapping[str, Any],
    content: bytes | None,
    *,
    offline: bool = False,
) -> _Found:
    path = Path(path).absolute()
    system = is_root() if root is None else root
    missing = "" if path != find_config(env, system) else _way_out(system, env)
    layers = [*_files(path, content, missing), _overrides(overrides)]
    problems = {problem for layer in layers for problem in layer.problems}
    warnings: set[Problem] = set()
    secrets: set[str] = set()
    for layer in layers:
        filler = Filler(env, offline)
        layer.data = filler.fill(layer.data)
        secrets |= filler.secrets
        problems |= _locate(filler.faults, [layer])
        warnings |= _locate(filler.missing, [layer])
        layer.holes |= {fault.at for fault in (*filler.faults, *filler.missing)}
    own = home(env)
    if len(layers) > 2:  # what a later file replaces must be right too
        for layer in layers:
            problems |= _locate(read(layer.data, _places([layer], own)).faults, [layer])
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer.data)
    draft = read(merged, _places(layers, own))
    problems |= _locate(draft.faults, layers)
    given = {key: value for key, value in draft.daemon.items() if key in _PATHS}
    paths = complete(given, env, system)
    known = Known(
        written=frozenset(_written(layers)),
        stubs=frozenset(name for name in draft.models if _is_stub(_value(merged, ("models", name)))),
        torn=any(layer.torn for layer in layers),
        troubled=bool(problems),
        paths=paths,
    )
    problems |= _locate(broken(draft, known), layers)
    warnings |= _locate(_without_effect(draft), layers) | _locate(strange(draft), layers)
    return _Found(layers, draft, paths, problems, sorted(warnings), frozenset(secrets))


def _files(path: Path, content: bytes | None, missing: str) -> list[Layer]:
    """The file and its drop-ins, parsed. One that cannot be read is a layer with that problem."""
    layers = [_file(path, missing) if content is None else parse(content, str(path), path.parent)]
    folder = path.with_name(path.stem + ".toml.d")
    try:
        names = sorted(p.name for p in folder.iterdir() if p.suffix == ".toml" and not p.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return layers
    except OSError as exc:
        trouble = Problem(str(folder), 0, "", f"cannot be read: {exc.strerror}")
        return [*layers, Layer(str(folder), folder, problems=[trouble], torn=True)]
    return layers + [_file(folder / name) for name in names]


def _way_out(system: bool, env: Mapping[str, str]) -> str:
    """What to do where the file that is read by default is missing."""
    where = "it" if system or env.get("VLLMD_CONFIG") else str(own_config(env))
    return f"write {where}, or name a file with --config; etc/vllmd.toml of the source is a commented example"


def _file(path: Path, missing: str = "") -> Layer:
    try:
        with path.open("rb") as file:
            return parse(file.read(MAX_BYTES + 1), str(path), path.parent)
    except (OSError, ValueError) as exc:
        why = getattr(exc, "strerror", None) or str(exc)
        hint = missing if isinstance(exc, FileNotFoundError) else ""
        trouble = Problem(str(path), 0, "", f"cannot be read: {why}", hint)
        return Layer(str(path), path.parent, problems=[trouble], torn=True)


def _overrides(overrides: Mapping[str, Any]) -> Layer:
    layer = Layer("command line", Path.cwd())
    for dotted, value in overrides.items():
        tree = value
        for part in reversed(dotted.split(".")):
            tree = {part: tree}
        layer.data = _merge(layer.data, tree)
    return layer


def _merge(below: dict[str, Any], above: dict[str, Any], at: Key = ()) -> dict[str, Any]:
    """`above` over `below`: tables merge, everything else replaces. In `args` that is a flag, however it is spelt."""
    merged = dict(below)
    match at:
        case ("models", _, "args") | ("defaults", "args"):
            flags = {spelling(key) for key in above}
            merged = {key: value for key, value in below.items() if key in above or spelling(key) not in flags}
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value, (*at, key)) if both else value
    return merged


def _value(data: Any, path: Key) -> Any:
    """What is at `path`, or _MISSING."""
    for part in path:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if not inside:
            return _MISSING
        data = data[part]
    return data


def _owner(layers: Sequence[Layer], path: Key) -> Layer:
    """The layer that a value comes from: the last that has it; for a table the first, which opened it."""
    for end in range(len(path), 0, -1):
        having = [layer for layer in layers if _value(layer.data, path[:end]) is not _MISSING]
        if having:
            return having[0] if isinstance(_value(having[-1].data, path[:end]), dict) else having[-1]
    return layers[0]


def _places(layers: Sequence[Layer], own: Path) -> Callable[[Key], Place]:
    """What a path at a key is relative to."""
    return lambda key: Place(_owner(layers, key).folder, own)


def _locate(faults: Sequence[Fault] | Iterator[Fault], layers: Sequence[Layer]) -> set[Problem]:
    """The faults as problems of the files they are in, without those of values already reported as unreadable."""
    problems = set()
    for fault in faults:
        layer = _owner(layers, fault.at)
        if not any(fault.at[:end] in layer.holes for end in range(len(fault.at) + 1)):
            problems.add(Problem(layer.file, layer.line(fault.at), spell(fault.at), fault.message, fault.hint))
    return problems


def _written(layers: Sequence[Layer]) -> Iterator[Key]:
    """The keys of models that stand in a file, readable or not."""
    for layer in layers:
        yield from layer.holes
        models, defaults = layer.data.get("models"), layer.data.get("defaults")
        yield from (("defaults", key) for key in (defaults if isinstance(defaults, dict) else ()))
        for name, table in models.items() if isinstance(models, dict) else ():
            yield from (("models", name, key) for key in (table if isinstance(table, dict) else ("model",)))


def _is_stub(table: Any) -> bool:
    return isinstance(table, dict) and bool(table) and all(isinstance(value, dict) for value in table.values())


def _without_effect(draft: Draft) -> Iterator[Fault]:
    """A warning for each key whose feature is not there yet, where it is set to something else than its default."""
    tables = [(("defaults",), draft.defaults), *((("models", name), table) for name, table in draft.models.items())]
    for option in OPTIONS:
        for at, table in tables if option.later else ():
            if option.key in table and table[option.key] != default_of(option):
                yield Fault("understood, no effect in this version", option.later, (*at, option.key))


# -- Settings ---------------------------------------------------------------------------------------------------------


def _settings(
    draft: Draft, paths: dict[str, Path], layers: Sequence[Layer], warnings: tuple[str, ...], secrets: frozenset[str]
) -> Settings:
    return Settings(
        daemon=DaemonSpec(**{**_filled(Section.DAEMON, draft.daemon), **paths}),
        http=_http(draft.http),
        devices={name: DeviceRule(**_filled(Section.DEVICES, rule)) for name, rule in draft.devices.items()},
        models={name: _model(name, draft.defaults, table) for name, table in draft.models.items()},
        keys={name: _key(name, table) for name, table in draft.keys.items()},
        files=tuple(Path(layer.file) for layer in layers[:-1]),
        warnings=warnings,
        secrets=secrets,
    )


def _http(own: Mapping[str, Any]) -> HttpSpec:
    values = _filled(Section.HTTP, own)
    return HttpSpec(**{**values, "max_body": min(values["max_body"], values["memory"])})


def _key(name: str, own: Mapping[str, Any]) -> ApiKey:
    values = _filled(Section.KEYS, own)
    return ApiKey(name, values["hash"], values["scopes"], values["models"], values["priority"])


def _filled(section: Section, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a table with the defaults of the keys that it does not have."""
    return {key: values[key] if key in values else default_of(option) for key, option in SECTIONS[section].items()}


def _model(name: str, defaults: Mapping[str, Any], own: Mapping[str, Any]) -> ModelSpec:
    values = _filled(Section.MODELS, {**defaults, **own})
    for key in _ADDED:
        values[key] = {**defaults.get(key, {}), **own.get(key, {})}
    rule = {key: values["restart"].get(key, default_of(option)) for key, option in RESTART.items()}
    values |= {
        "args": MappingProxyType(values["args"]),
        "env": MappingProxyType(values["env"]),
        "restart": RestartRule(**rule),
        "on_overrun": Overrun(values["on_overrun"]),
    }
    return ModelSpec(name=name, **values)
