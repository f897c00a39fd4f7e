"""Imports go one way: values <- core, config, edges <- wiring. Read from the source with `ast`; nothing is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "vllmd"
VALUES = {"vllmd", "vllmd.spec", "vllmd.events", "vllmd.facts", "vllmd.record", "vllmd.units", "vllmd.modelconfig"}
WIRING = {
    "vllmd.attempt",
    "vllmd.transcript",
    "vllmd.inquest",
    "vllmd.traces",
    "vllmd.veil",
    "vllmd.inquiry",
    "vllmd.saver",
    "vllmd.survivors",
    "vllmd.sweep",
    "vllmd.ties",
    "vllmd.ending",
    "vllmd.daemon",
    "vllmd.deeds",
    "vllmd.parking",
    "vllmd.service",
    "vllmd.places",
    "vllmd.voice",
    "vllmd.lookout",
    "vllmd.ground",
    "vllmd.shared",
    "vllmd.__main__",
}

#: One edge may be several files. A file imports values and its own edge; `tasks` is the one tool that all may use.
EDGES = {
    "process": {"process", "procfs", "tree", "kill", "strays", "leftovers", "listener", "cgroup", "spare"},
    "logs": {"logfile", "logread", "logtext", "logview"},
    "http": {
        "http", "bind", "auth", "gate", "route", "routes", "params", "schemas", "openapi", "backend", "sse", "stream",
        "metrics",
    },
    "devices": {"devices", "nvml", "ram"},
    "inspect": {"inspect", "engine", "hub", "port", "weights"},
    "probe": {"probe"},
    "store": {"store", "records"},
    "journal": {"journal", "journald"},
    "systemd": {"systemd"},
    "rules": {"rules"},
    "tasks": {"tasks"},
}  # fmt: skip

#: The core computes: what talks to the outside has no place in it. Reason beside each.
FORBIDDEN_IN_PURE = {
    "asyncio": "no loop", "os": "no files or processes", "socket": "no sockets", "subprocess": "no processes",
    "time": "`now` is an argument", "datetime": "`now` is an argument", "logging": "notes are commands",
    "structlog": "notes are commands", "threading": "one event at a time", "random": "the same story, the same answer",
    "psutil": "readings are events", "aiohttp": "no network", "pynvml": "readings are events",
}  # fmt: skip


def module_of(path: Path) -> str:
    parts = ("vllmd", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """Every module that the file names in an import, wherever it stands, unless only for type checking."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and getattr(test.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module)):
                for alias in node.names:
                    whole = f"{module}.{alias.name}"
                    yield whole if whole in MODULES else module


def edge_of(module: str) -> str | None:
    name = module.removeprefix("vllmd.edge.").split(".")[0]
    return next((edge for edge, files in EDGES.items() if name in files), None)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    """Values import values; core, config and each edge import values and themselves; ctl imports only itself."""
    ours = {name for name in imports(MODULES[module]) if name.split(".")[0] == "vllmd"}
    part = module.split(".")[1] if "." in module else ""
    match part:
        case "core" | "config":
            allowed = {name for name in ours if name in VALUES or name.startswith(f"vllmd.{part}")}
        case "ctl":
            allowed = {name for name in ours if name == "vllmd" or name.startswith("vllmd.ctl")}
        case "edge" if module != "vllmd.edge":
            edge = edge_of(module)
            assert edge is not None, f"{module} belongs to no edge: add it to EDGES in this test"
            allowed = {
                name for name in ours
                if name in VALUES or name in ("vllmd.edge", "vllmd.edge.tasks")
                or (name.startswith("vllmd.edge.") and edge_of(name) == edge)
            }  # fmt: skip
        case "gateway":
            shared = {"vllmd.edge.tasks", "vllmd.edge"}
            allowed = {n for n in ours if n in VALUES | shared or n.split(".")[1:2] == ["gateway"]}
        case _ if module in WIRING:
            allowed = ours
        case _:
            allowed = ours & VALUES
    assert not ours - allowed, f"{module} must not import {sorted(ours - allowed)}"


@pytest.mark.parametrize("module", [m for m in MODULES if m in VALUES or m.startswith("vllmd.core")])
def test_the_pure_part_touches_nothing(module: str) -> None:
    """What decides knows no clock, loop, file, socket, process or log."""
    if module.endswith("states"):
        return  # prints its own diagram when run as a program
    for name in imports(MODULES[module]):
        reason = FORBIDDEN_IN_PURE.get(name.split(".")[0])
        assert reason is None, f"{module} imports {name}: {reason}"


def test_the_daemon_never_imports_what_it_supervises() -> None:
    """Neither torch nor vllm: the daemon outlives their upgrades and costs none of their memory."""
    for module, path in MODULES.items():
        assert not {"torch", "vllm", "transformers"} & {n.split(".")[0] for n in imports(path)}, module


#: Files that may be longer than 320 lines, each with its reason (HACKING.md has them too).
LONG: dict[str, str] = {"vllmd.events": "the whole border of the core, and nothing else"}


@pytest.mark.parametrize("module", MODULES)
def test_files_stay_small(module: str) -> None:
    """About 300 lines: beyond that there is a seam, or a reason."""
    length = len(MODULES[module].read_text().splitlines())
    assert length <= 320 or module in LONG, f"{module} has {length} lines"
