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
from vllmd.core.phases import Sign
from vllmd.core.phases import read as read_sign
from vllmd.core.words import leader_ended, member_died
from vllmd.edge import cgroup, logfile
from vllmd.edge.kill import in_thread, kill_tree
from vllmd.edge.leftovers import shared_files
from vllmd.edge.listener import connections
from vllmd.edge.logread import tail
from vllmd.edge.process import Child, adopt, spawn
from vllmd.edge.procfs import Member, Table, bytes_read, exit_of_stranger
from vllmd.edge.tree import TreeWatch
from vllmd.events import Adopt, Alive, Broken, Event, Gone, Printed, Progress, Ready, Spawn, Spawned
from vllmd.facts import Figures, Phase
from vllmd.inquiry import Inquiry
from vllmd.shared import Shared
from vllmd.spec import ModelSpec
from vllmd.transcript import Transcript

FOLLOW_STARTING, FOLLOW_READY = 0.1, 1.0  # seconds between looks at the log
DELIVER = 10.0  # seconds for the API server to hand on the last words of an engine that has finished
READ_LIMIT = 5.0  # seconds that the log may take to be read for the cause
NOT_RUNNABLE = (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.EPERM, errno.ENOTDIR, errno.ELOOP)
DIAGNOSED = 5000  # lines of the log's end that are searched for the cause


class Attempt:
    """The processes of one attempt, from spawn to the last of them gone."""

    def __init__(self, command: Spawn | Adopt, spec: ModelSpec, shared: Shared) -> None:
        self.instance, self.number, self.launch = command.instance, command.attempt, command.launch
        self.spec = spec
        self.shared = shared
        self.child: Child | None = None
        self.watch: TreeWatch | None = None
        self.transcript: Transcript | None = None
        self.inquiry = Inquiry(command.instance, command.attempt, command.launch, spec.hang_after, shared)
        self.is_ready = False
        self._what = ""
        self._status: int | None = None
        self._bytes_read = 0
        self._files: frozenset[Path] = frozenset()
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
        if self._killing:
            return
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
        self.post(Spawned(self.instance, self.number, self.child.pid, self.child.leader.start))
        self._keep_pidfd()
        self._begin(self._leader(), "leader")
        self._begin(self._follow(), "log")
        self._begin(self._until_ready(), "probe")

    def _keep_pidfd(self) -> None:
        """Have systemd keep it; two under one name would come back in any order."""
        assert self.child is not None
        self.shared.notifier.drop(self.instance)
        self.shared.notifier.store(self.instance, self.child.pidfd)

    def adopt(self, command: Adopt, pidfd: int | None) -> None:
        """Take over what an earlier daemon started. A leader that is gone is reported as Broken."""
        # With no pid there was no process that anybody saw; what is found by its cookie can still be killed.
        leader = Member(command.pid or 0, "", command.start)
        self.child = adopt(leader, self.launch, cgroup=self._cgroup(), pidfd=pidfd)
        self.watch = TreeWatch(self.child.leader, self._member_died)
        self.transcript = Transcript(self.instance, self.number, self.shared)
        for text in self.transcript.resume():
            if not command.ready and (sign := read_sign(text)) is not None:
                self._heed(sign)
        if self.child.ended:
            self._what = "ended while vllmd was away"
            self.post(Broken(self.instance, self.number, self._what))
            return
        self._keep_pidfd()
        self.is_ready = command.ready
        self._begin(self._leader(), "leader")
        self._begin(self._follow(), "log")
        if command.ready:
            self.watch.ready(pids=cgroup.pids(self.child.cgroup))
            self._begin(self._find_files(), "shared memory")
            self._begin(self.inquiry.pulses(), "pulse")
        else:
            self._begin(self._until_ready(), "probe")

    def _cgroup(self) -> Path | None:
        return cgroup.make(self.shared.cgroups, self.instance, self.spec.memory_max) if self.shared.cgroups else None

    def _spawn(self) -> None:
        scratch = Path(self.launch.scratch)
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.launch.endpoint.startswith("unix:"):
            # vLLM leaves its socket behind and will not start on one that exists.
            path = Path(self.launch.endpoint.removeprefix("unix:"))
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        log = logfile.open_log(self.shared.log_dir, self.instance, self.shared.log_keep)
        if log.trouble:
            self.shared.complain(log.trouble)
        try:
            self.child = spawn(self.launch, log_fd=log.fd, cwd=scratch, cgroup=self._cgroup())
        finally:
            os.close(log.fd)
        self.transcript = Transcript(self.instance, self.number, self.shared)

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
        for _ in range(5 if status is None else 0):  # an adopted one: its status is told once its parent has reaped it
            await asyncio.sleep(0.01)
            if (status := exit_of_stranger(self.child.pidfd)) is not None:
                break
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
        assert self.transcript is not None
        lines = self.transcript.read()
        for text in lines:
            if (sign := read_sign(text)) is not None:
                self._heed(sign)
        if lines and not self.is_ready:
            self.post(Alive(self.instance, self.number))
        if self.is_ready:
            self.transcript.rotate()

    def _heed(self, sign: Sign) -> None:
        assert self.transcript is not None
        if sign.phase is not None:
            if sign.phase is Phase.LOAD is not self.transcript.phase:
                self._begin(self._find_files(), "shared memory")
            self.transcript.phase = sign.phase
            self.post(Progress(self.instance, self.number, sign.phase, sign.fraction, sign.note))
            if sign.phase is Phase.HTTP:
                self.inquiry.soon()
        if sign.figures is not None or sign.measured:
            self.post(Printed(self.instance, self.number, sign.figures or Figures(), sign.measured))
        if sign.drained and self._terminated and "data-parallel-size" not in self.spec.args:
            self._begin(self._drained(), "drain")

    async def _find_files(self) -> None:
        """While they live: a dead process does not show what it had mapped. From loading on vLLM has its queues."""
        assert self.watch is not None
        pids = [member.pid for member in self.watch.known]
        self._files |= await in_thread(lambda: shared_files(pids), 2.0, self._files)

    async def _until_ready(self) -> None:
        assert self.watch is not None
        await self.inquiry.until_ready(self.watch)
        await self._find_files()
        self._became_ready()
        await self.inquiry.pulses()

    def _became_ready(self) -> None:
        assert self.watch is not None
        self.is_ready = True
        members = self.watch.ready(pids=cgroup.pids(self.child.cgroup if self.child else None))
        self.read_log()  # numbers that were printed before it served belong to the start
        self.post(Ready(self.instance, self.number, tuple(sorted(member.pid for member in members))))

    # -- what it is asked

    def look(self, table: Table) -> frozenset[int]:
        """Its processes now. During a start, bytes they read are a sign of life."""
        if self.watch is None:
            return frozenset()
        if self._killing:  # until the last of them is gone what they hold is theirs
            return frozenset(member.pid for member in self.watch.known if member.pid in table)
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

    def begin_canary(self) -> None:
        """One token through the engine, within hang_after."""
        self._begin(self.inquiry.canary(self.spec.category), "canary")

    async def kill(self, *, crashed: bool) -> None:
        """End everything of it and report Gone, with the cause when it crashed."""
        if self._killing:
            return
        self._killing = True
        memory = cgroup.memory(self.child.cgroup) if self.child and self.child.cgroup else None
        oom = memory.peak or memory.current if memory and memory.oom_kills else None
        left = await self.end()
        self.shared.notifier.drop(self.instance)
        cause = None
        if crashed:
            path = self.shared.log_dir / f"{self.instance}.log"
            lines: list[str] = (
                await in_thread(lambda: tail(path, DIAGNOSED), READ_LIMIT, list[str]()) if self.child else []
            )
            cause = diagnose(
                lines, status=self._status, what=self._what, rules=self.shared.rules, ready=self.is_ready,
                phase=self.transcript.phase if self.transcript else None, oom=oom,
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
        if self.transcript is not None:
            self.transcript.rest()
            self.transcript.close()
        return left

    async def let_go(self) -> None:
        """Follow it no more and leave it running, for the daemon that comes."""
        for task in list(self._works):
            task.cancel()
        if self.watch is not None:
            self.watch.close()
        if self.transcript is not None:
            self.transcript.close()
