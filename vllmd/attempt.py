"""One attempt of one instance, as the edges see it: spawn, follow the log, watch the tree, probe, pulse, kill.

Everything it learns becomes an event with its attempt's number; it decides nothing.
"""

import asyncio
import errno
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllmd.core.cause import diagnose
from vllmd.core.phases import read as read_sign
from vllmd.core.words import leader_ended, member_died
from vllmd.edge import cgroup, logfile
from vllmd.edge.kill import in_thread, kill_tree
from vllmd.edge.leftovers import shared_files
from vllmd.edge.listener import connections, listener_owner
from vllmd.edge.logread import tail
from vllmd.edge.probe import Counters, ProbeError
from vllmd.edge.process import Child, spawn
from vllmd.edge.procfs import Member, Table, bytes_read, read_table
from vllmd.edge.tree import TreeWatch, fast_members
from vllmd.events import Alive, Broken, CanaryBack, Event, Gone, Printed, Progress, Pulse, Ready, Spawn, Spawned
from vllmd.facts import Figures, Phase
from vllmd.shared import Shared
from vllmd.spec import ModelSpec

FOLLOW_STARTING, FOLLOW_READY = 0.1, 1.0  # seconds between looks at the log
PROBE_EVERY = 0.5  # seconds between probes of a start; the log's last line calls for one at once
PULSE_EVERY = 5.0  # seconds between looks at a ready engine's counters, at most
PROBE_TIMEOUT = 5.0
DELIVER = 10.0  # seconds for the API server to hand on the last words of an engine that has finished
READ_LIMIT = 5.0  # seconds that the log may take to be read for the cause
NOT_RUNNABLE = (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.EPERM, errno.ENOTDIR, errno.ELOOP)
DIAGNOSED = 5000  # lines of the log's end that are searched for the cause


class Attempt:
    """The processes of one attempt, from spawn to the last of them gone."""

    def __init__(self, command: Spawn, spec: ModelSpec, shared: Shared) -> None:
        self.instance, self.number, self.launch = command.instance, command.attempt, command.launch
        self.spec = spec
        self.shared = shared
        self.child: Child | None = None
        self.watch: TreeWatch | None = None
        self.follower: logfile.Follower | None = None
        self.phase: Phase | None = None
        self.is_ready = False
        self._what = ""
        self._status: int | None = None
        self._bytes_read = 0
        self._files: frozenset[Path] = frozenset()
        self._counters: Counters | None = None
        self._look_now = asyncio.Event()
        self._works: set[asyncio.Task[Any]] = set()
        self._killing = False
        self._terminated = False

    @property
    def live(self) -> bool:
        """Whether it has processes, as far as we know, and is not being ended."""
        return self.child is not None and not self._killing

    @property
    def port(self) -> int | None:
        """The TCP port it serves on, or None."""
        return urlsplit(self.launch.endpoint).port if self.launch.endpoint.startswith("http") else None

    def post(self, event: Event) -> None:
        self.shared.post(event)

    def start(self) -> None:
        """Spawn; what goes wrong is reported as Broken. Some milliseconds, on the loop."""
        try:
            self._spawn()
        except OSError as error:
            self._what = f"cannot run {self.launch.argv[0]}: {error.strerror or error}"
            # 127: it cannot be run. Anything else may be over at the next try: no processes, no disk, no descriptors left.
            self._status = 127 if error.errno in NOT_RUNNABLE else 126
            self.post(Broken(self.instance, self.number, self._what, self._status))
            return
        assert self.child is not None
        self.watch = TreeWatch(self.child.leader, self._member_died)
        self.post(Spawned(self.instance, self.number, self.child.pid))
        self._begin(self._leader(), "leader")
        self._begin(self._follow(), "log")
        self._begin(self._until_ready(), "probe")

    def _spawn(self) -> None:
        scratch = Path(self.launch.scratch)
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.launch.endpoint.startswith("unix:"):
            # vLLM leaves its socket behind and will not start on one that exists.
            path = Path(self.launch.endpoint.removeprefix("unix:"))
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        group = cgroup.make(self.shared.cgroups, self.instance) if self.shared.cgroups else None
        log = logfile.open_log(self.shared.log_dir, self.instance, self.shared.log_keep)
        if log.trouble:
            self.shared.complain(log.trouble)
        try:
            self.child = spawn(self.launch, log_fd=log.fd, cwd=scratch, cgroup=group)
        finally:
            os.close(log.fd)
        self.follower = logfile.Follower(log.path)

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self.shared.tasks.start(self._contained(work, name), f"{name} of {self.instance}#{self.number}")
        self._works.add(task)
        task.add_done_callback(self._works.discard)

    async def _contained(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """A defect in handling one engine ends that engine, by the policy for crashes, and no other."""
        try:
            await work
        except Exception as error:
            self._what = f"internal error of vllmd ({name}): {error!r}"
            self.shared.complain(f"{self.instance}: {self._what}")
            self.post(Broken(self.instance, self.number, self._what))

    # -- what happens by itself

    async def _leader(self) -> None:
        """The leader's end, told within a millisecond by its pidfd."""
        assert self.child is not None
        status = await self.child.wait()
        self._status = status
        self._what = self._what or leader_ended(status)
        self.post(Broken(self.instance, self.number, self._what, status if status is not None else -1))

    def _member_died(self, member: Member) -> None:
        """An engine process died under a live leader: vLLM's own API server would take 4 to 11 s to notice."""
        self._what = self._what or member_died(member.name, member.pid)
        self.post(Broken(self.instance, self.number, self._what))

    async def _follow(self) -> None:
        """Read the log as it grows: phases, numbers, signs of life; rotate it."""
        while True:
            self.read_log()
            await asyncio.sleep(FOLLOW_READY if self.is_ready and not self._terminated else FOLLOW_STARTING)

    def read_log(self) -> None:
        """What the log has new, as events."""
        assert self.follower is not None
        lines = self.follower.read_new()
        for line in lines:
            sign = read_sign(line.text)
            if sign is None:
                continue
            if sign.phase is not None:
                if sign.phase is Phase.LOAD is not self.phase:
                    self._begin(self._find_files(), "shared memory")
                self.phase = sign.phase
                self.post(Progress(self.instance, self.number, sign.phase, sign.fraction, sign.note))
                if sign.phase is Phase.HTTP:
                    self._look_now.set()
            if sign.figures is not None or sign.measured:
                self.post(Printed(self.instance, self.number, sign.figures or Figures(), sign.measured))
            if sign.drained and self._terminated and "data-parallel-size" not in self.spec.args:
                self._begin(self._drained(), "drain")
        if lines and not self.is_ready:
            self.post(Alive(self.instance, self.number))
        if self.is_ready:
            before = self.follower.trouble
            self.follower.rotate(self.shared.log_size, self.shared.log_keep)
            if self.follower.trouble and self.follower.trouble != before:
                self.shared.complain(self.follower.trouble)

    async def _find_files(self) -> None:
        """While they live: a dead process does not show what it had mapped. From loading on vLLM has its queues."""
        assert self.watch is not None
        pids = [member.pid for member in self.watch.known]
        self._files |= await in_thread(lambda: shared_files(pids), 2.0, self._files)

    async def _until_ready(self) -> None:
        """Ask until it serves, names us, and the listening socket is our tree's."""
        while not await self._serves():
            try:
                async with asyncio.timeout(PROBE_EVERY):
                    await self._look_now.wait()
                await asyncio.sleep(0.02)  # the last line is printed just before it listens
            except TimeoutError:
                continue
            self._look_now.clear()
        assert self.watch is not None
        self.is_ready = True
        members = self.watch.ready(pids=cgroup.pids(self.child.cgroup if self.child else None))
        pids = tuple(sorted(member.pid for member in members))
        await self._find_files()
        self.read_log()  # numbers that were printed before it served belong to the start
        self.post(Ready(self.instance, self.number, pids))
        self._begin(self._pulses(), "pulse")

    async def _serves(self) -> bool:
        endpoint = self.launch.endpoint
        try:
            if not await self.shared.probe.health(endpoint, timeout=PROBE_TIMEOUT):
                return False
            if self.launch.served_name not in await self.shared.probe.served(endpoint, timeout=PROBE_TIMEOUT):
                return False
        except ProbeError:
            return False
        members = await in_thread(self._members_now, 2.0, frozenset[int]())
        owners = await in_thread(lambda: listener_owner(endpoint, members), 2.0, None)
        return owners is not None and bool(owners & members)

    def _members_now(self) -> frozenset[int]:
        assert self.watch is not None
        return frozenset(member.pid for member in fast_members(self.watch.leader, self.watch.known, table=read_table()))

    async def _pulses(self) -> None:
        """Counters of the ready engine. One that does not answer gives no pulse: the core counts the silence."""
        while True:
            try:
                self._pulse(await self.shared.probe.counters(self.launch.endpoint, timeout=PROBE_TIMEOUT))
            except ProbeError:
                pass
            await asyncio.sleep(min(PULSE_EVERY, self.spec.hang_after / 4))

    def _pulse(self, seen: Counters) -> None:
        before, self._counters = self._counters, seen
        moved = before is not None and seen.progress != before.progress
        tokens = seen.generation_tokens
        self.post(Pulse(self.instance, self.number, seen.running, seen.waiting, tokens, moved, seen.kv_usage))

    # -- what it is asked

    def look(self, table: Table) -> frozenset[int]:
        """Its processes now. During a start, bytes they read are a sign of life."""
        if self.watch is None or not self.live:
            return frozenset()
        group = cgroup.pids(self.child.cgroup if self.child else None)
        pids = frozenset(member.pid for member in self.watch.look(pids=group, table=table))
        if not self.is_ready:
            read = sum(map(bytes_read, pids))
            if read > self._bytes_read + (1 << 20):
                self._bytes_read = read
                self.post(Alive(self.instance, self.number))
        return pids

    def terminate(self) -> None:
        """SIGTERM to the leader alone."""
        if self.child is not None:
            self._terminated = True
            self.child.terminate()

    async def _drained(self) -> None:
        """All requests are done. vLLM now waits 11 s for workers that do not go, more on a busy machine. A kill is 0.1 s,
        due as soon as no client reads the last words any more."""
        for _ in range(int(DELIVER / FOLLOW_STARTING)):
            if not await in_thread(lambda: connections(self.launch.endpoint), 1.0, 0):
                break
            await asyncio.sleep(FOLLOW_STARTING)
        self.post(Broken(self.instance, self.number, "drained", 0))

    async def canary(self) -> None:
        """One token through the engine, within hang_after."""
        ok = None
        try:
            ok = await self.shared.probe.canary(
                self.launch.endpoint, self.launch.served_name, self.spec.category, timeout=self.spec.hang_after
            )
        except ProbeError:
            ok = False
        self.post(CanaryBack(self.instance, self.number, ok))

    def begin_canary(self) -> None:
        self._begin(self.canary(), "canary")

    async def kill(self, *, crashed: bool) -> None:
        """End everything of it and report Gone, with the cause when it crashed."""
        if self._killing:
            return
        self._killing = True
        left = await self.end()
        cause = None
        if crashed:
            path = self.shared.log_dir / f"{self.instance}.log"
            lines: list[str] = (
                await in_thread(lambda: tail(path, DIAGNOSED), READ_LIMIT, list[str]()) if self.child else []
            )
            cause = diagnose(
                lines, status=self._status, what=self._what, phase=self.phase, rules=self.shared.rules,
                ready=self.is_ready,
            )  # fmt: skip
            trouble = logfile.keep_failed(self.shared.log_dir, self.instance)
            if trouble:
                self.shared.complain(trouble)
        self.post(Gone(self.instance, self.number, cause, left))

    async def end(self) -> tuple[int, ...]:
        """Kill the tree, whatever was under way; returns the pids that live on. May be called again."""
        for task in list(self._works):
            task.cancel()
        left: tuple[int, ...] = ()
        if self.child is not None and self.watch is not None:
            known = self.watch.known
            self.watch.close()
            left = await kill_tree(self.child, known, files=self._files)
            self.child.close()
        if self.follower is not None:
            self.follower.close()
        return left
