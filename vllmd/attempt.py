"""One attempt of one instance, as the edges see it: spawn, follow the log, watch the tree, probe, pulse, kill.

Everything it learns becomes an event with its attempt's number; it decides nothing.
"""

import asyncio
import os
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

from vllmd.core.phases import Sign
from vllmd.core.phases import read as read_sign
from vllmd.core.words import leader_ended, member_died
from vllmd.edge import cgroup, logfile
from vllmd.edge.kill import kill_tree
from vllmd.edge.process import Child, adopt, environment, why_not_run
from vllmd.edge.procfs import Member, Table, bytes_read, exit_of_stranger
from vllmd.edge.tasks import in_thread
from vllmd.edge.tree import TreeWatch
from vllmd.events import Adopt, Alive, Broken, Event, Gone, Printed, Progress, Ready, Spawn, Spawned
from vllmd.facts import Figures, Phase
from vllmd.inquest import find_cause, tell_runaways
from vllmd.inquiry import Inquiry, Wish
from vllmd.shared import Shared
from vllmd.spec import ModelSpec
from vllmd.traces import Traces
from vllmd.transcript import Transcript
from vllmd.veil import Veil, secrets_in

FOLLOW_STARTING, FOLLOW_READY = 0.1, 1.0  # seconds between looks at the log


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
        self.veil = Veil(shared.secrets | secrets_in(environment(command.launch, os.environ), spec.env))
        self.is_ready = False
        self._what = ""
        self._status: int | None = None
        self._bytes_read = 0
        self.traces = Traces(command.instance, command.launch, shared.records_dir, shared.cgroups)
        self._works: set[asyncio.Task[Any]] = set()
        self._killing = False  # told to end
        self._ending = False  # an end is under way
        self.over = False  # nothing of it is left
        self._terminated = False
        self._complained = False

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
        except (OSError, ValueError) as error:
            self._what, self._status = why_not_run(self.launch, error)
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
        self.traces.enclose(self.spec.memory_max)
        self.traces.recall()
        log = self.shared.log_dir / f"{self.instance}.log"
        self.child = adopt(leader, self.launch, cgroup=self.traces.cgroup, pidfd=pidfd, log=log)
        self.watch = TreeWatch(self.child.leader, self._member_died)
        self.transcript = Transcript(self.instance, self.number, self.shared, self.veil)
        for text in self.transcript.resume(starting=not command.ready):
            if (sign := read_sign(text)) is not None:
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

    def _spawn(self) -> None:
        scratch = self.traces.make(self.spec.memory_max)
        log = logfile.open_log(self.shared.log_dir, self.instance, self.shared.log_keep)
        if log.trouble:
            self.shared.complain(log.trouble)
        try:
            self.child = self.shared.begin(self.launch, log_fd=log.fd, cwd=scratch, cgroup=self.traces.cgroup)
        finally:
            os.close(log.fd)
        self.transcript = Transcript(self.instance, self.number, self.shared, self.veil)

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self.shared.tasks.start(self._contained(work, name), f"{name} of {self.instance}#{self.number}")
        self._works.add(task)
        task.add_done_callback(self._works.discard)

    async def _contained(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """A defect in handling one engine ends that engine, by the policy for crashes, and no other."""
        try:
            await work
        except Exception as error:
            self._what = self.veil(f"internal error of vllmd ({name}): {error!r}")
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
        """Read the log as it grows: phases, numbers, signs of life."""
        assert self.transcript is not None
        while True:
            self.read_log()
            usual = FOLLOW_READY if self.is_ready and not self._terminated else FOLLOW_STARTING
            await asyncio.sleep(self.transcript.pause(usual))

    def read_log(self) -> None:
        """What the log has new, as events. A line that we cannot cope with is our defect, not the engine's."""
        assert self.transcript is not None
        lines = []
        try:
            lines = self.transcript.read()
            for text in lines:
                if (sign := read_sign(text)) is not None:
                    self._heed(sign)
        except Exception as error:
            if not self._complained:
                self._complained = True
                self.shared.complain(f"cannot follow the log of {self.instance}: {error!r} (a defect of vllmd)")
        if lines and not self.is_ready:
            self.post(Alive(self.instance, self.number))

    def _heed(self, sign: Sign) -> None:
        assert self.transcript is not None
        if sign.phase is not None:
            if sign.phase is Phase.LOAD is not self.transcript.phase:
                self._begin(self._find_files(), "shared memory")
            self.transcript.phase = sign.phase
            self.post(Progress(self.instance, self.number, sign.phase, sign.fraction, self.veil(sign.note)))
            if sign.phase is Phase.HTTP:
                self.inquiry.soon()
        if sign.figures is not None or sign.measured:
            self.post(Printed(self.instance, self.number, sign.figures or Figures(), sign.measured))
        if sign.drained and self._terminated and "data-parallel-size" not in self.spec.args:
            self._begin(self._drained(), "drain")

    async def _find_files(self) -> None:
        """While they live: a dead process does not show what it had mapped. From loading on vLLM has its queues."""
        assert self.watch is not None
        await self.traces.find([member.pid for member in self.watch.known])

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
            known = self.watch.known
            return frozenset(m.pid for m in known if m.pid in table and table[m.pid].member.start == m.start)
        group = cgroup.pids(self.child.cgroup if self.child else None)
        pids = frozenset(member.pid for member in self.watch.look(pids=group, table=table))
        if not self.is_ready:
            self._begin(self._count_bytes(pids), "reading")
        return pids

    async def _count_bytes(self, pids: frozenset[int]) -> None:
        read = await in_thread(lambda: sum(map(bytes_read, pids)), 2.0, 0)
        if read > self._bytes_read + (1 << 20):
            self._bytes_read = read
            self.post(Alive(self.instance, self.number))

    def terminate(self) -> None:
        """SIGTERM to the leader alone."""
        if self.child is not None:
            self._terminated = True
            self.child.terminate()

    async def _drained(self) -> None:
        """All requests are done. vLLM now waits 11 s for workers that do not go, more on a busy machine. A kill is 0.1 s,
        due as soon as no client reads the last words any more."""
        await self.inquiry.until_alone()
        self.post(Broken(self.instance, self.number, "drained", 0))

    def inquire(self, command: Wish) -> None:
        """Ask it for a token, to sleep, or to wake."""
        self._begin(self.inquiry.fulfil(command, self.spec.category), type(command).__name__.lower())

    async def kill(self, *, crashed: bool) -> None:
        """End everything of it and report Gone, with the cause when it crashed. Told again before it is over, it tries again
        what failed: without Gone what the engine held is never given to anybody."""
        if self._ending or self.over:
            return
        self._killing = self._ending = True
        try:
            memory = cgroup.memory(self.child.cgroup) if self.child and self.child.cgroup else None
            oom = memory.peak or memory.current if memory and memory.oom_kills else None
            left = await self.end()
            self.over = True
        except Exception as error:
            self.shared.complain(f"cannot end {self.instance}: {error!r} (a defect of vllmd); it is tried again")
            return
        finally:
            self._ending = False
        cause = None
        try:
            self.shared.notifier.drop(self.instance)
            if crashed:
                cause = await find_cause(
                    self.transcript, self.shared.rules, self.veil,
                    status=self._status, what=self._what, ready=self.is_ready, oom=oom,
                )  # fmt: skip
                if self.transcript is not None:
                    await self.transcript.keep()
        except Exception as error:
            self.shared.complain(f"{self.instance}: {self.veil(repr(error))} (a defect of vllmd)")
        finally:
            self.post(Gone(self.instance, self.number, cause, left))

    async def end(self) -> tuple[int, ...]:
        """Kill the tree, whatever was under way; returns the pids that live on. May be called again."""
        for task in list(self._works):
            task.cancel()
        left: tuple[int, ...] = ()
        if (child := self.child) is not None and self.watch is not None:
            known = self.watch.known
            self.watch.close()
            left = await kill_tree(child, known, files=self.traces.files)
            await tell_runaways(child, self.instance, self.shared.complain)
            child.close()
        else:
            await self.traces.remove()
        if self.transcript is not None:
            await self.transcript.finish()
        return left

    async def let_go(self) -> None:
        """Follow it no more and leave it running, for the daemon that comes."""
        for task in list(self._works):
            task.cancel()
        if self.watch is not None:
            self.watch.close()
        if self.transcript is not None:
            self.transcript.close()
