"""A file and its drop-ins -> Settings, or ConfigError with every problem of all of them.

    bytes -parse-> layers -substitute-> layers -read-> a draft of each (for its own mistakes)
                                        merged -read-> the draft of all -rules, defaults-> Settings

Drop-ins are `vllmd.toml.d/*.toml` beside `vllmd.toml`, merged in name order: tables merge, everything else replaces.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from vllmd.config.draft import Draft, read
from vllmd.config.kinds import Fault, Place
from vllmd.config.options import OPTIONS, RESTART, SECTIONS, Section, default_of
from vllmd.config.parse import MAX_BYTES, Layer, parse
from vllmd.config.paths import complete, find_config, home, is_root
from vllmd.config.problems import ConfigError, Key, Problem, spell
from vllmd.config.rules import Known, broken
from vllmd.config.substitute import Filler
from vllmd.spec import DaemonSpec, DeviceRule, HttpSpec, ModelSpec, Overrun, RestartRule, Settings

__all__ = ["ConfigError", "Problem", "find_config", "load"]

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
    path = Path(path).absolute()
    layers = [*_files(path, content), _overrides(overrides)]
    problems = {problem for layer in layers for problem in layer.problems}
    secrets: set[str] = set()
    for layer in layers:
        filler = Filler(env)
        layer.data = filler.fill(layer.data)
        secrets |= filler.secrets
        problems |= _locate(filler.faults, [layer])
        layer.holes |= {fault.at for fault in filler.faults}
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
    paths = complete(given, env, is_root() if root is None else root)
    known = Known(
        written=frozenset(_written(layers)),
        stubs=frozenset(name for name in draft.models if _is_stub(_value(merged, ("models", name)))),
        torn=any(layer.torn for layer in layers),
        troubled=bool(problems),
        paths=paths,
    )
    problems |= _locate(broken(draft, known), layers)
    if problems:
        raise ConfigError(problems)
    warnings = sorted(_locate(_without_effect(draft), layers))
    return _settings(draft, paths, layers, tuple(map(str, warnings)), frozenset(secrets))


def _files(path: Path, content: bytes | None) -> list[Layer]:
    """The file and its drop-ins, parsed. One that cannot be read is a layer with that problem."""
    layers = [_file(path) if content is None else parse(content, str(path), path.parent)]
    folder = path.with_name(path.stem + ".toml.d")
    try:
        names = sorted(p.name for p in folder.iterdir() if p.suffix == ".toml" and not p.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return layers
    except OSError as exc:
        trouble = Problem(str(folder), 0, "", f"cannot be read: {exc.strerror}")
        return [*layers, Layer(str(folder), folder, problems=[trouble], torn=True)]
    return layers + [_file(folder / name) for name in names]


def _file(path: Path) -> Layer:
    try:
        with path.open("rb") as file:
            return parse(file.read(MAX_BYTES + 1), str(path), path.parent)
    except (OSError, ValueError) as exc:
        why = getattr(exc, "strerror", None) or str(exc)
        trouble = Problem(str(path), 0, "", f"cannot be read: {why}")
        return Layer(str(path), path.parent, problems=[trouble], torn=True)


def _overrides(overrides: Mapping[str, Any]) -> Layer:
    layer = Layer("command line", Path.cwd())
    for dotted, value in overrides.items():
        tree = value
        for part in reversed(dotted.split(".")):
            tree = {part: tree}
        layer.data = _merge(layer.data, tree)
    return layer


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`: tables merge, everything else replaces."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
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
        http=HttpSpec(**_filled(Section.HTTP, draft.http)),
        devices={name: DeviceRule(**_filled(Section.DEVICES, rule)) for name, rule in draft.devices.items()},
        models={name: _model(name, draft.defaults, table) for name, table in draft.models.items()},
        files=tuple(Path(layer.file) for layer in layers[:-1]),
        warnings=warnings,
        secrets=secrets,
    )


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
