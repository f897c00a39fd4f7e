"""`vllmd`: read the arguments and the configuration, then run. Exit codes: 0 ended as asked, 1 failed, 2 usage, 78 bad
configuration (EX_CONFIG, so that systemd does not try again), 130 interrupted before it had begun.

What takes time to import is imported where it is needed: an interrupt meanwhile must find us where we can answer it.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllmd import __version__
from vllmd.units import count

if TYPE_CHECKING:
    from vllmd.config.load import ConfigError
    from vllmd.spec import Settings

EX_CONFIG, INTERRUPTED = 78, 130
FILES = 65536  # open files that are enough


def parser() -> argparse.ArgumentParser:
    """The daemon's command line."""
    root = argparse.ArgumentParser(
        prog="vllmd",
        description="Keeps vLLM models running inside a memory budget. Runs in the foreground; Ctrl-C stops all models.",
        epilog="Then: vllmctl status. `vllmd sweep` ends what a killed vllmd left (vllmd sweep --help). Exit codes: 0 ended as"
        " asked, 1 failed, 2 usage, 78 the configuration is wrong.",
    )
    root.add_argument(
        "-c", "--config", type=Path, metavar="FILE", help="configuration (default: /etc/vllmd/vllmd.toml)"
    )
    root.add_argument(
        "--check-config",
        nargs="?",
        const=True,
        metavar="FILE",
        help="print every problem of the configuration and exit",
    )
    root.add_argument("--print-schema", action="store_true", help="print the configuration's JSON schema and exit")
    root.add_argument("--json", action="store_true", help="with --check-config: print JSON")
    root.add_argument("--version", action="version", version=f"vllmd {__version__}")
    return root


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        return command(argv)
    except KeyboardInterrupt:
        return INTERRUPTED


def command(argv: list[str] | None) -> int:
    """What the arguments ask for."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["sweep"]:
        return sweep(words[1:])
    args = parser().parse_args(words)
    if args.print_schema:
        from vllmd.config.schema import schema

        print(json.dumps(schema(), indent=2))
        return 0
    from vllmd.config.load import ConfigError, find_config, load

    named = Path(args.check_config) if isinstance(args.check_config, str) else args.config
    path = (named or find_config()).absolute()
    if args.check_config:
        try:
            return approve(load(path), path, as_json=args.json)
        except ConfigError as error:
            return refuse(error, path, as_json=args.json)
    return serve(path)


def sweep_parser() -> argparse.ArgumentParser:
    """The command line of `vllmd sweep`."""
    root = argparse.ArgumentParser(
        prog="vllmd sweep",
        description="Ends the models of a vllmd that is gone and will not come back. While one runs, or systemd is about"
        " to start it again, nothing is touched. Run by systemd after each end of vllmd.service.",
    )
    root.add_argument("--unit", metavar="NAME", help="the service whose models are meant (default: the one we are in)")
    root.add_argument("--state-dir", type=Path, metavar="DIR", help="its state directory (default: as vllmd's own)")
    return root


def sweep(words: list[str]) -> int:
    """Run `vllmd sweep`."""
    import asyncio

    from vllmd.config.paths import is_root, places
    from vllmd.sweep import run

    args = sweep_parser().parse_args(words)
    state_dir = (args.state_dir or places(os.environ, is_root())["state_dir"]).absolute()
    return asyncio.run(run(state_dir, args.unit, os.environ))


def serve(path: Path) -> int:
    """Be the daemon."""
    if sys.stderr is not None:
        faulthandler.enable()  # SIGABRT, as from systemd's watchdog: say where every thread was
    import asyncio

    from vllmd.config.load import ConfigError, load
    from vllmd.edge.systemd import take, under_systemd, unit_of

    allow_files()
    unit = unit_of() if under_systemd(os.environ) else None
    given = take(os.environ)
    try:
        settings = load(path)
    except ConfigError as error:
        given.notify.status(f"cannot start: {error.problems[0]}")
        return refuse(error, path, as_json=False)
    for warning in settings.warnings:
        warn(warning)
    for name in given.closed:
        warn(f"a socket or descriptor named {name!r} came from systemd and is not used")
    from vllmd.daemon import run  # everything that costs time to import, only when it is needed

    return asyncio.run(run(settings, path, given, unit))


def allow_files() -> None:
    """As many open files as we may have: each client is one, and each request at an engine. The usual limit of 1024 is for
    programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def warn(text: str) -> None:
    """To standard error, wherever that leads: a pipe that is closed must not keep models from running."""
    with contextlib.suppress(OSError):
        os.write(2, f"warning: {text}\n".encode(errors="replace"))


def refuse(error: "ConfigError", path: Path, *, as_json: bool) -> int:
    """All problems at once."""
    if as_json:
        rows = [
            {"file": str(p.file), "line": p.line, "key": p.key, "message": p.message, "hint": p.hint, "text": str(p)}
            for p in error.problems
        ]
        print(json.dumps({"ok": False, "file": str(path), "problems": rows}, indent=2))
        return EX_CONFIG
    for problem in error.problems:
        print(problem, file=sys.stderr)
    print(f"cannot use {path}: {count(len(error.problems), 'problem')}", file=sys.stderr)
    return EX_CONFIG


def approve(settings: "Settings", path: Path, *, as_json: bool) -> int:
    """Say that it is good, and what is strange about it."""
    if as_json:
        warnings = list(settings.warnings)
        print(
            json.dumps({"ok": True, "file": str(path), "models": list(settings.models), "warnings": warnings}, indent=2)
        )
        return 0
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    files = len(settings.files)
    print(f"{path}: good, {count(len(settings.models), 'model')}" + (f" in {files} files" if files > 1 else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
