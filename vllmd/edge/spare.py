"""The warm spare: a process that has imported an engine beforehand and becomes the next start.

vLLM imports for a quarter of its start and more before it looks at its arguments. One process per environment has done
that already, touching no GPU, and waits at a socket (vllmd/data/spare.py, run by the engine's own Python). Taken, it is
the launch's leader: our child, in its own session, found by the launch's cookie, with the plain start's arguments,
environment, log, directory, cgroup and umask. It is taken only when the plain start would have imported the very same;
otherwise `take` says why not, and whoever asked takes the plain way.

A parked process ends with its socket, so with the daemon. Until it is taken it bears a cookie of its own.
"""

import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from vllmd.edge.kill import kill_members
from vllmd.edge.process import Child, enlist, environment, spawn
from vllmd.edge.procfs import read_stat
from vllmd.facts import Launch

PROGRAM = Path(__file__).parent.parent / "data" / "spare.py"
ANSWER = 0.5  # seconds that a parked process may take to become an engine, while the loop waits; it takes a fiftieth
OLDEST = 6 * 3600.0  # seconds that one may be parked
RETRY = 3600.0  # seconds until parking is tried again for an environment in which it failed
ROOM = 24576  # bytes kept free in its arguments, and in its environment, for those of a launch
IMPORTING, ENDED, NONE = "it still imports", "it has ended", "none is parked"
INSTANCE = "(spare)"  # in its cookie, where others have the name of their instance

#: First lines of a console script: an interpreter by its path, in the second form one too long for the kernel.
SHEBANG = re.compile(r"#!(/\S*python[\d.]*)\n")
TRAMPOLINE = re.compile(r"#!/bin/sh\n'''exec' (?P<quote>\"?)(/.+?python[\d.]*)(?P=quote) \"\$0\" \"\$@\"\n")


@dataclass(slots=True, eq=False)
class _Parked:
    """One parked process. `said` is a file that holds what it printed."""

    child: Child
    channel: socket.socket
    said: int
    scratch: Path
    since: float = field(default_factory=time.monotonic)
    imported: bool = False
    why: str = IMPORTING  # it cannot be taken; "" when it can

    def look(self) -> str:
        """What keeps it from being taken now, "" when nothing does."""
        if self.why == IMPORTING:
            try:
                answer = json.loads(self.channel.recv(4096, socket.MSG_DONTWAIT) or b"{}")
            except BlockingIOError:
                return IMPORTING
            except (OSError, ValueError):
                answer = {}
            self.imported = "ready" in answer
            self.why = "" if self.imported else str(answer.get("no") or self.last_words())
        if not self.why and ((stat := read_stat(self.child.pid)) is None or stat.dead):
            self.why = ENDED
        if not self.why and time.monotonic() - self.since > OLDEST:
            self.why = "it is too old"
        return self.why

    def last_words(self) -> str:
        """The last line that it printed, where an exception's name stands."""
        size = os.fstat(self.said).st_size
        lines = os.pread(self.said, 4096, max(0, size - 4096)).decode(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), ENDED)


class Spares:
    """At most one parked process for each environment, by its command. All on the loop's thread."""

    def __init__(self, scratch: Path, mark: str) -> None:
        """`scratch` is the root of scratch directories, `mark` begins the cookies (places.py)."""
        self._scratch, self._mark = scratch, mark
        self._parked: dict[str, _Parked] = {}
        self._failed: dict[str, tuple[float, str]] = {}
        self._ending: list[_Parked] = []
        self._number = 0

    def prepare(self, executable: str, env: Mapping[str, str]) -> str:
        """Park a process for this command, unless there is one; some milliseconds, its import runs on beside us. `env` is
        Launch.env of a launch that is likely: the more of it the next one has, the surer it fits. Returns why there will
        be none, or ""."""
        self._bury()
        if (parked := self._parked.get(executable)) is not None:
            why = parked.look()
            if why in ("", IMPORTING):
                return ""
            self._end(executable)
        when, why = self._failed.get(executable, (-RETRY, ""))
        if time.monotonic() - when < RETRY:
            return f"the last one failed: {why}"
        interpreter = interpreter_of(executable)
        if interpreter is None:
            return f"{executable} is not a console script whose Python can be told"
        try:
            self._parked[executable] = self._park(executable, interpreter, env)
        except (OSError, ValueError) as error:
            self._failed[executable] = time.monotonic(), str(error)
            return str(error)
        return ""

    def _park(self, executable: str, interpreter: str, env: Mapping[str, str]) -> _Parked:
        self._number += 1
        # As an attempt's directory, but no instance has such a name: what is left of it is cleared with theirs.
        scratch = self._scratch / f"spare~-{self._number}"
        with ExitStack() as undo:
            shutil.rmtree(scratch, ignore_errors=True)  # an earlier daemon's
            scratch.mkdir(mode=0o700)
            undo.callback(shutil.rmtree, scratch, ignore_errors=True)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(ours.close)
            said = os.memfd_create("vllmd-spare")
            undo.callback(os.close, said)
            own = {name: str(scratch) for name in ("TMPDIR", "VLLM_RPC_BASE_PATH")}
            launch = Launch(
                argv=(interpreter, str(PROGRAM), str(theirs.fileno()), executable, "-" * ROOM),
                env={**env, **own, "VLLMD_ROOM": "-" * ROOM},
                endpoint="",
                served_name="",
                scratch=str(scratch),
                cookie=f"{self._mark}:{INSTANCE}:{self._number}",
            )
            with theirs:
                child = spawn(launch, log_fd=said, cwd=scratch, control=theirs.fileno())
            undo.pop_all()
        return _Parked(child, ours, said, scratch)

    def take(self, launch: Launch, *, log_fd: int, cwd: Path, cgroup: Path | None = None) -> Child | str:
        """The parked process as this launch's engine, as `spawn` would have started it; or why it must be spawned. Takes
        10 to 20 ms, at worst ANSWER. The caller keeps and closes `log_fd`."""
        self._bury()
        executable = launch.argv[0]
        parked = self._parked.get(executable)
        if parked is None:
            return NONE
        if why := parked.look():
            if why != IMPORTING:
                self._end(executable)
            return why
        message = {
            "argv": launch.argv, "env": environment(launch, os.environ), "cwd": str(cwd),
            "cgroup": str(cgroup) if cgroup else None,
        }  # fmt: skip
        try:
            parked.channel.settimeout(ANSWER)
            socket.send_fds(parked.channel, [json.dumps(message).encode()], [log_fd])
            answer = json.loads(parked.channel.recv(4096) or b"{}")
        except (OSError, ValueError) as error:
            self._end(executable)
            return f"it does not answer: {error}"
        if not answer.get("yes"):
            return str(answer.get("no") or ENDED)
        del self._parked[executable]
        child = enlist(parked.child, launch, log_fd=log_fd, cgroup=cgroup)
        self._let_go(parked)
        return child

    async def drop(self) -> None:
        """End all that are parked. Returns when they are gone."""
        for executable in list(self._parked):
            self._end(executable)
        await kill_members(frozenset(parked.child.leader for parked in self._ending))
        self._bury()

    def pids(self) -> frozenset[int]:
        """The parked processes: their memory is ours, and no instance's."""
        return frozenset(parked.child.pid for parked in (*self._parked.values(), *self._ending))

    def ready(self) -> bool:
        """Whether one has imported and can be taken."""
        return any(not parked.look() for parked in self._parked.values())

    def rss(self) -> int:
        """Bytes that they hold which nobody else has."""
        return sum(map(anonymous, self.pids()))

    def _end(self, executable: str) -> None:
        parked = self._parked.pop(executable)
        if not parked.imported and parked.why != IMPORTING:
            self._failed[executable] = time.monotonic(), parked.why
        parked.child.terminate(signal.SIGKILL)
        self._ending.append(parked)

    def _bury(self) -> None:
        """Reap those that have ended meanwhile, and let go of what is left of them."""
        for parked in list(self._ending):
            parked.child.reap()
            if parked.child.ended or read_stat(parked.child.pid) is None:
                self._ending.remove(parked)
                parked.child.close()
                self._let_go(parked)

    def _let_go(self, parked: _Parked) -> None:
        parked.channel.close()
        os.close(parked.said)
        shutil.rmtree(parked.scratch, ignore_errors=True)


def interpreter_of(executable: str) -> str | None:
    """The Python that runs a console script; None for a program of another kind, or one that is started in a way of its own."""
    try:
        with Path(executable).open("rb") as file:
            head = file.read(4096).decode(errors="replace")
    except OSError:
        return None
    if match := SHEBANG.match(head):
        return match[1]
    match = TRAMPOLINE.match(head)
    return match[2] if match else None


def anonymous(pid: int) -> int:
    """Bytes of memory that a process has for itself; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(kib) for kib in re.findall(r"^(?:RssAnon|RssShmem):\s*(\d+)", text, re.MULTILINE))
