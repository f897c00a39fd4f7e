"""What the listeners may ask of the daemon (the Backend of vllmd/edge/backend.py): look at the world, hand in wishes."""

import asyncio
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllmd import __version__
from vllmd.config import schema as config_schema
from vllmd.config.change import Change, Verdict
from vllmd.config.change import plan as plan_change
from vllmd.config.load import ConfigError, load
from vllmd.core import plan, view
from vllmd.core.placing import never_fit
from vllmd.core.world import Instance
from vllmd.edge.backend import Access, Caller, LogReader, Refused, Tallies, Verb
from vllmd.edge.logview import LogView, find_log
from vllmd.events import Answer, Event, Reload, Restart, Start, Stop
from vllmd.spec import Cause, Settings

if TYPE_CHECKING:
    from vllmd.daemon import Daemon

HIDDEN = "(hidden)"
SECRET_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD")


class Service:
    """The daemon, as its listeners see it."""

    def __init__(self, daemon: "Daemon") -> None:
        self.daemon = daemon
        self._reloading = asyncio.Lock()

    @property
    def world(self) -> Any:
        return self.daemon.core.world

    # -- look

    def ready(self) -> bool:
        return self.daemon.serving

    def status(self) -> dict[str, Any]:
        me = {
            "version": __version__,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "uptime_s": round(time.monotonic() - self.daemon.started, 1),
            "config": str(self.daemon.path),
            "access": Access.READ,
        }
        return view.status(self.world, me, time.monotonic())

    def model(self, name: str) -> dict[str, Any]:
        inst = self._instance(name)
        settings: Settings = self.world.settings
        spec = settings.models.get(name, inst.spec)
        launch = inst.launch
        learned = self.world.learned.get(inst.key)
        return view.model(self.world, inst, time.monotonic()) | {
            "spec": hide(spec, settings.secrets),
            "argv": list(launch.argv) if launch else None,
            "env": hide(dict(launch.env), settings.secrets) if launch else None,
            "parts": [{"label": label, "size": size} for label, size in inst.need.parts] if inst.need else [],
            "learned": hide(learned, frozenset()),
            "engine": {"executable": inst.found.engine.executable, "version": inst.found.engine.version}
            if inst.found
            else None,
            "log": str(self.daemon.settings.daemon.log_dir / f"{name}.log"),
        }

    def why(self, name: str) -> dict[str, Any]:
        return view.story(self.world, self._instance(name), time.monotonic())

    def schema(self) -> dict[str, Any]:
        return config_schema.schema()

    def tallies(self) -> Tallies:
        counted: Mapping[tuple[str, ...], int] = self.world.counters
        seconds: dict[tuple[str, str], float] = {}
        for inst in self.world.instances.values():
            if learned := self.world.learned.get(inst.key):
                seconds |= {(inst.id, phase): value for phase, value in learned.phases.items()}
                seconds[inst.id, "total"] = learned.total
        return Tallies(
            restarts={(key[1], key[2]): n for key, n in counted.items() if key[0] == "restarts"},
            start_seconds=seconds,
            hangs={key[1]: n for key, n in counted.items() if key[0] == "hangs"},
            overruns={key[1]: n for key, n in counted.items() if key[0] == "overruns"},
        )

    def log(self, name: str, *, lines: int, since: float | None, failed: bool, previous: bool) -> LogReader:
        self._instance(name)
        path = find_log(self.daemon.settings.daemon.log_dir, name, failed=failed, previous=previous)
        if path is None:
            kind = "failed start" if failed else ("previous start" if previous else "start")
            raise Refused(404, "no-log", f"{name} has no log of a {kind}", f"vllmctl start {name}")
        return LogView(path, lines=lines, since=since, follow=not (failed or previous))

    # -- act

    async def act(self, verb: Verb, names: Sequence[str], now: bool, caller: Caller) -> Mapping[str, Answer]:
        futures = {}
        for name in names:
            ticket, futures[name] = self.daemon.ask()
            event: Event
            match verb:
                case Verb.START:
                    event = Start(name, ticket)
                case Verb.STOP:
                    event = Stop(name, ticket, now)
                case Verb.RESTART:
                    event = Restart(name, ticket)
            self.daemon.post(event)
        return {name: await future for name, future in futures.items()}

    async def reload(self, dry_run: bool, caller: Caller) -> Answer:
        async with self._reloading:
            return await self._reload(dry_run)

    async def _reload(self, dry_run: bool) -> Answer:
        old: Settings = self.world.settings
        try:
            new = await asyncio.to_thread(load, self.daemon.path)
        except ConfigError as error:
            problems = [str(problem) for problem in error.problems]
            count = len(problems)
            text = f"configuration not reloaded: {count} problem{'s' if count > 1 else ''}; the old one stays"
            self.daemon.log.error(text, first=str(error.problems[0]))
            return Answer(0, 422, text, "bad-config", tuple(problems[:1]), {"problems": problems})
        if impossible := never_fit(self.world, new):
            return Answer(
                0, 422, f"configuration not reloaded: {impossible[0]}", "too-big", (), {"problems": impossible}
            )
        change = plan_change(old, new)
        data = change_rows(change) | {"warnings": list(new.warnings)}
        if dry_run:
            return Answer(0, 200, "nothing was changed", data=data)
        ticket, future = self.daemon.ask()
        self.daemon.adopt(keep_fixed(new, old))
        restart = frozenset(name for name, what in change.models.items() if what.verdict is Verdict.RESTART)
        self.daemon.post(Reload(self.daemon.settings, restart, ticket))
        answer = await future
        return Answer(0, answer.status, answer.message, data=data)

    async def reload_by_signal(self) -> None:
        """SIGHUP."""
        await self.reload(False, Caller(Access.ADMIN, "signal"))

    async def validate(self, text: str) -> dict[str, Any]:
        def check() -> dict[str, Any]:
            try:
                settings = load(self.daemon.path, content=text.encode())
            except ConfigError as error:
                return {"ok": False, "problems": [problem_row(p) for p in error.problems], "warnings": []}
            return {"ok": True, "problems": [], "warnings": list(settings.warnings)}

        return await asyncio.to_thread(check)

    async def plan(self, names: Sequence[str]) -> dict[str, Any]:
        wanted = list(names) or list(self.world.settings.models)
        found = await asyncio.gather(*(self.daemon.inspect(name) for name in wanted))
        known = {
            name: result if result is not None else Cause("unknown", f"{name} is not configured any more", "unknown")
            for name, result in zip(wanted, found, strict=True)
        }
        return plan.plan(self.world, known)

    # -- tell

    def changed(self, caller: Caller, what: str, names: Sequence[str]) -> None:
        self.daemon.log.info(f"{what} asked for", models=list(names), uid=caller.uid, pid=caller.pid, peer=caller.peer)

    def fault(self, ident: str, where: str, error: BaseException) -> None:
        self.daemon.log.error(f"internal error {ident} in {where}: {error!r}", exc_info=error)

    def _instance(self, name: str) -> Instance:
        inst: Instance | None = self.world.instances.get(name)
        if inst is None:
            raise Refused(404, "unknown-model", f"no model is called {name!r}", "vllmctl status lists them")
        return inst


def keep_fixed(new: Settings, old: Settings) -> Settings:
    """What a running daemon cannot change (sockets, directories) stays; `change` has told the operator."""
    live = {name: getattr(new.daemon, name) for name in ("log_size", "log_keep", "log_level")}
    return replace(new, daemon=replace(old.daemon, **live), http=old.http)


def change_rows(change: Change) -> dict[str, Any]:
    """A reload's plan as JSON: {"models": {"chat": "restart (vram, args)"}, "live": [...], "daemon restart": [...]}."""
    models = {
        name: str(what.verdict) + (f" ({', '.join(what.keys)})" if what.keys else "")
        for name, what in change.models.items()
    }
    return {"models": models, "live": list(change.live), "needs a restart of vllmd": list(change.daemon)}


def problem_row(problem: Any) -> dict[str, Any]:
    """One configuration problem as JSON."""
    return {
        "file": str(problem.file),
        "line": problem.line,
        "key": problem.key,
        "message": problem.message,
        "hint": problem.hint,
        "text": str(problem),
    }


def hide(value: Any, secrets: frozenset[str]) -> Any:
    """The value as JSON, with everything secret replaced: known secrets, and what has a secret's name."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    match value:
        case Mapping():
            return {
                key: HIDDEN if looks_secret(str(key)) and isinstance(item, str) else hide(item, secrets)
                for key, item in value.items()
            }
        case list() | tuple():
            return [hide(item, secrets) for item in value]
        case str() if any(secret and secret in value for secret in secrets):
            return HIDDEN
        case Path():
            return str(value)
    return value


def looks_secret(name: str) -> bool:
    return any(part in name.upper() for part in SECRET_NAMES) and name.upper() not in ("KEY",)
