"""Where everything meets: a queue of events, the core, and the edges that do what it says.

All concurrency of the decision is in `Daemon._decide`: one event at a time, its commands carried out at once, none of them
awaited. If the core raises, that is a bug: its story is logged and the daemon exits, so that it can be started afresh.
"""

import asyncio
import gc
import os
import time
from pathlib import Path

from vllmd import __version__
from vllmd.attempt import Attempt
from vllmd.core.cause import parse_rules
from vllmd.core.core import Core
from vllmd.deeds import Deeds
from vllmd.edge.http import ListenError, Listeners
from vllmd.edge.journal import Lines, Log, configure, find_journal
from vllmd.edge.probe import Probe
from vllmd.edge.records import Records, boot_id
from vllmd.edge.rules import load_rules
from vllmd.edge.store import Store, Taken
from vllmd.edge.stream import EventLog
from vllmd.edge.systemd import Given, Unit
from vllmd.edge.tasks import Tasks, in_thread
from vllmd.ending import Ending
from vllmd.events import (
    Answer,
    Boot,
    DevicesRead,
    Event,
    Note,
    Save,
)
from vllmd.gateway.gateway import Gateway
from vllmd.ground import clear_scratch, prepare
from vllmd.lookout import Lookout
from vllmd.parking import Parking
from vllmd.saver import Saver
from vllmd.service import Service
from vllmd.shared import Shared
from vllmd.spec import Settings
from vllmd.survivors import look_back
from vllmd.ties import Ties, summary
from vllmd.voice import Voice

COLLECT = (50_000, 20, 50)  # objects, and generations, after which garbage is looked for
SAVE_AFTER = 0.2  # seconds that changes are collected before they are written


class Daemon:
    """One running vllmd."""

    def __init__(self, settings: Settings, path: Path, log: Log, given: Given, unit: Unit | None) -> None:
        self.settings, self.path, self.log = settings, path, log
        self.given, self.ties = given, Ties(given, unit)
        self.started = time.monotonic()
        self.events = EventLog()
        self.voice = Voice(log, self.events)
        self.store = Store(settings.daemon.state_dir, settings.daemon.runtime_dir)
        self.records = Records(settings.daemon.state_dir / "instances", boot_id())
        self.saver = Saver(self.records, lambda text: self.voice.note(Note("store", text, "error")))
        self.tasks = Tasks(self._task_failed)
        self.attempts: dict[str, Attempt] = {}
        self.lookout = Lookout(self.attempts, self._seen)
        self.answers: dict[int, asyncio.Future[Answer]] = {}
        self.serving = False
        self.exit_code = 0
        self._tickets = 0
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self.unsaved = asyncio.Event()
        self.finished = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.ending = Ending(self)
        self.deeds = Deeds(self)

    # -- life

    async def run(self) -> int:
        """Serve until told to end; returns the exit code."""
        try:
            self.store.lock()
        except (Taken, OSError) as error:
            self.log.error(str(error))
            return 1
        self.ending.catch_signals()
        try:
            await self._prepare()
        except ListenError as error:
            self.log.error(str(error))
            await self.ending.give_up()
            return 1
        try:
            await self.finished.wait()
        finally:
            await self.ending.leave()
        return self.exit_code

    async def _prepare(self) -> None:
        spec = self.settings.daemon
        self.service = Service(self)
        self.gateway = Gateway(
            self.post, self.service.outlook, self.service.rows, self.service.fault, asyncio.get_running_loop()
        )  # fmt: skip
        self.gateway.configure(self.settings.models, self.settings.http)
        control = self.given.sockets.get("control", ())
        self.listeners = Listeners(
            self.service,
            self.events,
            spec.socket,
            self.settings.http,
            given=control,
            tcp=self.given.sockets.get("http", ()),
            front=self.gateway,
            keys=self.settings.keys,
        )
        await self.listeners.open()  # all that may refuse us, before anything of an earlier daemon is touched
        places, cgroups = prepare(spec, self.log, self.ties.user_cgroup)
        left = await look_back(self.records, self.settings, places.mark, self.log)
        await clear_scratch(places.scratch, left.scratch)
        self.core = Core(self.settings, places, self.store.learned())
        self.core.world.good.update(self.store.good())
        self.core.world.proofs.update(self.store.proofs())
        self.parking = Parking(self, places.scratch, places.mark)
        journal = find_journal(spec.log_format)
        self.shared = Shared(
            self.post,
            self.tasks,
            Probe(),
            parse_rules(load_rules()),
            spec.log_dir,
            spec.log_size,
            spec.log_keep,
            cgroups,
            self.records.directory,
            Lines(journal) if journal else None,
            self.given.notify,
            lambda text: self.voice.note(Note("log", text, "error")),
            self.parking.begin,
            self.settings.secrets,
        )
        self._complain()
        self.handle(await self.lookout.devices(left.pids))
        await self.listeners.start()
        self.serving = True
        self.tasks.start(self._decide(), "core")
        self.tasks.start(self.lookout.watch(), "devices")
        self.tasks.start(self.parking.run(), "spare")
        self.tasks.start(self._save(), "store")
        self.tasks.start(self.saver.run(), "records")
        self.tasks.start(self.ties.beat(lambda: self._queue.put_nowait(None)), "watchdog")
        where = control[0].getsockname() if control else str(spec.socket)
        self.log.info(
            "vllmd is ready",
            version=__version__,
            models=len(self.settings.models),
            socket=where,
            web=self.listeners.urls,
        )
        self.handle(Boot(left.survivors))
        for instance in self.given.pidfds.keys() - self.attempts.keys():
            os.close(self.given.pidfds[instance])
            self.given.notify.drop(instance)
        self.given.notify.ready(summary(self.core.world))
        # What is here now stays; what requests leave is soon gone. Collecting both over and over cost a third of the CPU of
        # 256 requests at once.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*COLLECT)

    # -- the loop

    def post(self, event: Event) -> None:
        """Hand an event to the core. From the event loop only."""
        self._queue.put_nowait(event)

    def ask(self) -> tuple[int, asyncio.Future[Answer]]:
        """A new ticket and the future that its one answer resolves."""
        self._tickets += 1
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.answers[self._tickets] = future
        return self._tickets, future

    def adopt(self, settings: Settings) -> None:
        """A reloaded configuration: what of it concerns the wiring."""
        old, self.settings = self.settings, settings
        self.gateway.configure(settings.models, settings.http)
        if trouble := self.listeners.reconfigure(settings.http, settings.keys):
            self.voice.note(Note("http", trouble, "error"))
        self.shared.log_size, self.shared.log_keep = settings.daemon.log_size, settings.daemon.log_keep
        self.shared.secrets |= settings.secrets
        if settings.daemon.log_level != old.daemon.log_level:
            self.log = self.voice.log = configure(settings.daemon.log_level, settings.daemon.log_format)

    async def _decide(self) -> None:
        while True:
            self.handle(await self._queue.get())
            self.ties.feed(time.monotonic())

    def handle(self, event: Event | None) -> None:
        """One event through the core, and all that follows."""
        now = time.monotonic()
        commands = self.core.handle(event, now)
        touched = {getattr(event, "instance", None), getattr(event, "model", None)}
        for command in commands:
            self.deeds.do(command)
            touched.add(getattr(command, "instance", None))
        self._set_timer()
        if self.serving and any(isinstance(command, Save) for command in commands):
            self.ties.tell(self.core.world)
        self.voice.changed(self.core.world, event, touched, now)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self.core.next_deadline()
        self._timer = None
        if due is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, due - time.monotonic()), self._queue.put_nowait, None)

    # -- tasks

    def _seen(self, read: DevicesRead) -> None:
        self.post(read)
        self._complain()

    async def _save(self) -> None:
        """Write what was learned, a moment after it changed."""
        while True:
            await self.unsaved.wait()
            await asyncio.sleep(SAVE_AFTER)
            self.unsaved.clear()
            await in_thread(self.write, 60.0, None)

    def write(self) -> None:
        """What was learned, to disk. May block."""
        self.store.keep_learned(dict(self.core.world.learned))
        self.store.keep_good(dict(self.core.world.good))
        self.store.keep_proofs(dict(self.core.world.proofs))

    def _complain(self) -> None:
        for text in self.store.complaints():
            self.voice.note(Note("store", text, "error"))

    def _task_failed(self, name: str, error: BaseException) -> None:
        """A bug. Models are ended by the same path as always; whoever started us may start us again."""
        self.exit_code = 1
        self.finished.set()
        story = list(self.core.world.story)[-20:]
        self.log.error(f"internal error in {name}: {error!r}; vllmd ends", story=story, exc_info=error)


async def run(settings: Settings, path: Path, given: Given, unit: Unit | None) -> int:
    """The whole life of a daemon. `given`: what systemd handed over; `unit`: the service we are, if we are one."""
    log = configure(settings.daemon.log_level, settings.daemon.log_format)
    return await Daemon(settings, path, log, given, unit).run()
