"""What a tree of TOML says, read key by key into typed values: the step between files and Settings.

A draft holds only what was written and is right; defaults come later, so that [defaults] and drop-ins can go between.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllmd.config.kinds import Bad, Fault, Place
from vllmd.config.names import read_device, read_name
from vllmd.config.options import SECTIONS, TOP, Section, header, read_table
from vllmd.config.problems import Key, nearest, quote


@dataclass(slots=True)
class Draft:
    """Typed values by key, as far as they were written. `models`, `keys` and `devices` by name, in file order."""

    daemon: dict[str, Any] = field(default_factory=dict)
    http: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    devices: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def source(self, name: str, key: str) -> Key:
        """Where the value of a model's key was written."""
        return ("models", name, key) if key in self.models[name] else ("defaults", key)

    def of(self, name: str, key: str) -> Any:
        """A model's value with [defaults] applied; None if it was not written."""
        return self.models[name].get(key, self.defaults.get(key))


def read(data: Mapping[str, Any], place: Callable[[Key], Place]) -> Draft:
    """The draft of a tree; `place` tells what the path at a key is relative to. Raises nothing: see `faults`."""
    draft = Draft()

    def table(value: Any, path: Key, section: Section) -> dict[str, Any]:
        if not isinstance(value, dict):
            opening = f"[{path[0]}]" if len(path) == 1 else header(section)
            draft.faults.append(Fault(f"{quote(value)} is not a table", f"open it with {opening}", path))
            return {}
        values, faults = read_table(SECTIONS[section], value, lambda key: place((*path, key)))
        draft.faults += [Fault(f.message, f.hint, (*path, *f.at)) for f in faults]
        return values

    def family(value: Any, at: str, section: Section) -> dict[str, dict[str, Any]]:
        if not isinstance(value, dict):
            hint = f"open one with {header(section)}"
            draft.faults.append(Fault(f"{quote(value)} is not a table", hint, (at,)))
            return {}
        check = _check_device if section is Section.DEVICES else _check_name
        members: dict[str, dict[str, Any]] = {}
        for name, inner in value.items():
            try:
                check(name)
            except Bad as exc:
                draft.faults += [Fault(f.message, f.hint, (at, name)) for f in exc.faults]
            members[name] = table(inner, (at, name), section)
        return members

    for key, value in data.items():
        # A misnamed table is read for the mistakes in it, where it is clear which one was meant.
        meant = key if key in TOP or not isinstance(value, dict) else nearest(key, TOP)
        read_as: dict[str, Any] = {}
        match meant:
            case "daemon" | "http":
                read_as = table(value, (key,), Section(meant))
            case "defaults":
                read_as = table(value, (key,), Section.MODELS)
            case "devices" | "models" | "keys":
                read_as = family(value, key, Section(meant))
        if key in TOP:
            setattr(draft, key, read_as)
        else:
            draft.faults.append(_unknown_table(key, value))
    return draft


def _check_name(name: str) -> None:
    # A tail after NUL marks the second table of a name in a file with errors: parse has reported it.
    if "\0" not in name:
        read_name(name)


def _check_device(name: str) -> None:
    if name != "*" and "\0" not in name:
        try:
            read_device(name)
        except Bad as exc:
            raise Bad(Fault(exc.faults[0].message, '"*" for all, ' + exc.faults[0].hint)) from None


def _unknown_table(key: str, value: Any) -> Fault:
    what = "table" if isinstance(value, dict) else "key"
    homes = [section for section, options in SECTIONS.items() if key in options]
    if near := nearest(key, TOP):
        hint = f"did you mean [{near}]?"
    else:
        hint = f"it belongs into {header(homes[0])}" if homes else "known: " + ", ".join(TOP)
    return Fault(f"unknown {what}", hint, (key,))
