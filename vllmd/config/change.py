"""What a new configuration changes, model by model: what `vllmctl reload --dry-run` shows and a reload follows.

Whether a key needs a restart is a column of the table of keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import Any

from vllmd.config.options import SECTIONS, Option, Section
from vllmd.spec import ModelSpec, Settings


class Verdict(StrEnum):
    """What becomes of a model at a reload."""

    UNCHANGED = "unchanged"
    LIVE = "live"  # changed, and takes effect while it runs
    RESTART = "restart"  # changed in a way that a running engine cannot follow
    ADD = "add"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class ModelChange:
    """`keys` are those that changed, in the table's order; empty for a model that comes or goes."""

    verdict: Verdict
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """The whole plan. `models` in the order of the new file, those removed at the end.

    `live` are changed keys outside models that take effect at once ("daemon.log_level", "devices.*.limit");
    `daemon` those that need a new daemon ("daemon.socket", "http.listen") and keep their old value until then.
    """

    models: Mapping[str, ModelChange]
    live: tuple[str, ...] = ()
    daemon: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing changes at all."""
        return not (self.live or self.daemon or any(c.verdict is not Verdict.UNCHANGED for c in self.models.values()))


def plan(old: Settings, new: Settings) -> Change:
    """What changes between two configurations."""
    models = {name: _model(old.models.get(name), spec) for name, spec in new.models.items()}
    models |= {name: ModelChange(Verdict.REMOVE) for name in old.models if name not in new.models}
    changed = [
        (f"{section}.{option.key}", option.restarts or (option.key in _TLS and None in _both(option, before, after)))
        for section, before, after in ((Section.DAEMON, old.daemon, new.daemon), (Section.HTTP, old.http, new.http))
        for option in _differing(section, before, after)
    ]
    live = [key for key, restarts in changed if not restarts]
    for name in dict.fromkeys((*old.devices, *new.devices)):
        before, after = old.devices.get(name), new.devices.get(name)
        live += [f"devices.{name}.{option.key}" for option in _differing(Section.DEVICES, before, after)]
    live += [
        f"keys.{name}" for name in dict.fromkeys((*old.keys, *new.keys)) if old.keys.get(name) != new.keys.get(name)
    ]
    return Change(models, tuple(live), tuple(key for key, restarts in changed if restarts))


def _model(old: ModelSpec | None, new: ModelSpec) -> ModelChange:
    if old is None:
        return ModelChange(Verdict.ADD)
    changed = _differing(Section.MODELS, old, new)
    if not changed:
        return ModelChange(Verdict.UNCHANGED)
    verdict = Verdict.RESTART if any(option.restarts for option in changed) else Verdict.LIVE
    return ModelChange(verdict, tuple(option.key for option in changed))


def _differing(section: Section, old: Any, new: Any) -> list[Option]:
    """The options of a section whose fields differ; a table that is not there has none of its values."""
    return [
        option for key, option in SECTIONS[section].items() if getattr(old, key, _ABSENT) != getattr(new, key, _ABSENT)
    ]


def digest(spec: ModelSpec) -> dict[str, str]:
    """What a running engine cannot follow, key by key, as digests: to be compared with a later configuration's, and to be
    kept where the values themselves, some of them secret, have no place."""
    return {
        key: blake2b(repr(_plain(getattr(spec, key))).encode(), digest_size=8).hexdigest()
        for key, option in SECTIONS[Section.MODELS].items()
        if option.restarts and hasattr(spec, key)
    }


def differing(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, ...]:
    """The keys whose digests differ. A key that one side does not know is no difference: it came or went with a version."""
    return tuple(key for key, value in new.items() if old.get(key, value) != value)


def _plain(value: Any) -> Any:
    """The value without the order of its tables."""
    match value:
        case Mapping():
            return sorted((str(key), _plain(item)) for key, item in value.items())
        case list() | tuple():
            return [_plain(item) for item in value]
    return value


def _both(option: Option, before: Any, after: Any) -> tuple[Any, Any]:
    return getattr(before, option.key), getattr(after, option.key)


_ABSENT = object()
_TLS = ("tls_cert", "tls_key")  # other files are read at a reload; that there are any, or none any more, waits
