"""What the listeners may ask of the daemon (the Backend of vllmd/edge/backend.py): look at the world, hand in wishes."""

import asyncio
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllmd import __version__
from vllmd.config import schema as config_schema
from vllmd.config.change import Change, Verdict
from vllmd.config.change import plan as plan_change
from vllmd.config.load import ConfigError, load
from vllmd.core import plan, view
from vllmd.core.refusals import never_fit
from vllmd.core.words import explain, outlook
from vllmd.core.world import Instance
from vllmd.edge.backend import Access, Caller, LogReader, Refused, Tallies, Verb
from vllmd.edge.logview import LogView, find_log
from vllmd.edge.process import inherited
from vllmd.edge.tasks import in_thread
from vllmd.events import Answer, Doze, Event, Lend, Reload, Restart, Start, Stop, SwapTest
from vllmd.facts import Inspection
from vllmd.gateway.waiting import Outlook
from vllmd.spec import Cause, ModelSpec, Settings
from vllmd.veil import Veil, hide, secrets_in

if TYPE_CHECKING:
    from vllmd.daemon import Daemon

LOOKS = 2  # logs that are searched at once
LOAD_LIMIT = 20.0  # seconds that reading a configuration may take


class Service:
    """The daemon, as its listeners see it."""

    def __init__(self, daemon: "Daemon") -> None:
        self.daemon = daemon
        self._reloading = asyncio.Lock()
        self._looks = asyncio.Semaphore(LOOKS)

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
            "http": self.daemon.listeners.urls,
            "spare": self.daemon.parking.used(),
            "spare_ready": self.daemon.parking.spares.ready(),
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

    def rows(self) -> list[dict[str, Any]]:
        """The models as the status has them."""
        return [view.model(self.world, inst, time.monotonic()) for inst in self.world.instances.values()]

    def outlook(self, name: str) -> Outlook:
        """How far a model is, for those who wait for it."""
        inst: Instance | None = self.world.instances.get(name)
        if inst is None:
            return Outlook("removed", "")
        now = time.monotonic()
        said, start = explain(self.world, inst, now), outlook(self.world, inst, now)
        return Outlook(str(inst.state), said.text, start.left)

    def tallies(self) -> Tallies:
        counted: Mapping[tuple[str, ...], int] = self.world.counters
        gate = self.daemon.gateway.counted
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
            swaps={(key[1], key[2]): n for key, n in counted.items() if key[0] == "swaps"},
            idle_stops={key[1]: n for key, n in counted.items() if key[0] == "idle_stops"},
            answers=gate.answers,
            refusals=gate.refusals,
            retries=gate.retries,
            waits=gate.waits,
            wait_seconds=gate.wait_seconds,
            held_bytes=gate.memory,
        )

    def log(
        self, name: str, *, lines: int, since: float | None, failed: bool, previous: bool, follow: bool, most: int
    ) -> LogReader:
        inst = self._instance(name)
        path = find_log(self.daemon.settings.daemon.log_dir, name, failed=failed, previous=previous)
        if path is None:
            kind = "failed start" if failed else ("previous start" if previous else "start")
            raise Refused(404, "no-log", f"{name} has no log of a {kind}", f"vllmctl start {name}")
        known = self.world.settings.secrets | self.daemon.shared.secrets
        veil = Veil(known | secrets_in(inst.spec.env, inherited(os.environ)))
        return LogView(
            path, lines=lines, since=since, follow=follow and not (failed or previous), slots=self._looks, most=most,
            conceal=veil,
        )  # fmt: skip

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
                case Verb.SLEEP:
                    event = Doze(name, ticket)
                case Verb.WAKE:
                    event = Start(name, ticket)
                case Verb.SWAP_TEST:
                    event = SwapTest(name, ticket)
            self.daemon.post(event)
        return {name: await future for name, future in futures.items()}

    async def lend(self, size: int, seconds: float, device: str | None, caller: Caller) -> Answer:
        ticket, future = self.daemon.ask()
        self.daemon.post(Lend(size, seconds, device, ticket))
        return await future

    async def reload(self, dry_run: bool, caller: Caller) -> Answer:
        async with self._reloading:
            answer = await self._reload(dry_run)
        if answer.status >= 400 and not dry_run:
            self.daemon.log.error(answer.message, first=next(iter(answer.data.get("problems", ())), ""))
        return answer

    async def _reload(self, dry_run: bool) -> Answer:
        old: Settings = self.world.settings
        unread: Settings | None = None
        try:
            new = await in_thread(lambda: load(self.daemon.path), LOAD_LIMIT, unread)
        except ConfigError as error:
            problems = [str(problem) for problem in error.problems]
            count = len(problems)
            text = f"configuration not reloaded: {count} problem{'s' if count > 1 else ''}; the old one stays"
            return Answer(0, 422, text, "bad-config", tuple(problems[:1]), {"problems": problems})
        if new is None:
            return Answer(0, 503, "configuration not reloaded: its files do not answer; the old one stays", "busy")
        change = plan_change(old, new)
        if causes := self._newly_impossible(old, new, change):
            problems = [cause.text for cause in causes]
            remedies = tuple(remedy.text for remedy in causes[0].remedies)
            return Answer(
                0, 422, f"configuration not reloaded: {problems[0]}", "too-big", remedies, {"problems": problems}
            )
        data = change_rows(change) | {"warnings": list(new.warnings)}
        if dry_run:
            return Answer(0, 200, "nothing was changed", data=data)
        ticket, future = self.daemon.ask()
        self.daemon.adopt(keep_fixed(new, old))
        restart = frozenset(name for name, what in change.models.items() if what.verdict is Verdict.RESTART)
        self.daemon.post(Reload(self.daemon.settings, restart, ticket))
        answer = await future
        return Answer(0, answer.status, answer.message, data=data)

    def _newly_impossible(self, old: Settings, new: Settings, change: Change) -> list[Cause]:
        """The models that can never fit, but for those that could not before either: they have been told of, and must not
        keep anything else from being changed."""
        known = never_fit(self.world, old)
        same = (Verdict.UNCHANGED, Verdict.LIVE)
        return [
            cause
            for name, cause in never_fit(self.world, new).items()
            if name not in known or change.models[name].verdict not in same
        ]

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

        nothing: dict[str, Any] | None = None
        found = await in_thread(check, LOAD_LIMIT, nothing)
        if found is None:
            raise Refused(503, "busy", "the files of the configuration do not answer", "try again")
        return found

    async def plan(self, names: Sequence[str]) -> dict[str, Any]:
        wanted = list(names) or list(self.world.settings.models)
        results = await asyncio.gather(*(self._facts(name) for name in wanted))
        found = {n: r for n, r in zip(wanted, results, strict=True) if n in self.world.settings.models}
        return plan.plan(self.world, found, together=bool(names))

    async def _facts(self, name: str) -> Inspection | Cause:
        """What preflight finds of a model. The port that its own engine holds is no reason against it."""
        attempt = self.daemon.attempts.get(name)
        spec: ModelSpec = self.world.settings.models[name]
        found: Inspection | Cause | None
        if attempt is not None and attempt.live and spec.port and attempt.port == spec.port:
            found = await self.daemon.lookout.preflight(replace(spec, port=None), {}, self.daemon.settings.daemon)
        else:
            found = await self.daemon.deeds.inspect(name)
        return found or Cause("inspect-slow", f"the files of {name} do not answer", "files do not answer")

    # -- tell

    def changed(self, caller: Caller, what: str, names: Sequence[str]) -> None:
        who = {"uid": caller.uid, "pid": caller.pid} if caller.key is None else {"key": caller.key.name}
        self.daemon.log.info(f"{what} asked for", models=list(names), peer=caller.peer, **who)

    def fault(self, ident: str, where: str, error: BaseException) -> None:
        self.daemon.log.error(f"internal error {ident} in {where}: {error!r}", exc_info=error)

    def _instance(self, name: str) -> Instance:
        inst: Instance | None = self.world.instances.get(name)
        if inst is None:
            raise Refused(404, "unknown-model", f"no model is called {name!r}", "vllmctl status lists them")
        return inst


def keep_fixed(new: Settings, old: Settings) -> Settings:
    """What a running daemon cannot change (sockets, directories) stays; `change` has told the operator."""
    live = {name: getattr(new.daemon, name) for name in ("log_size", "log_keep", "log_level", "spare")}
    fixed: dict[str, Any] = {"listen": old.http.listen}
    if (old.http.tls_cert is None) != (new.http.tls_cert is None):  # with or without TLS is for a new daemon
        fixed |= {"tls_cert": old.http.tls_cert, "tls_key": old.http.tls_key}
    return replace(new, daemon=replace(old.daemon, **live), http=replace(new.http, **fixed))


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
