"""Becoming an engine, and hearing of its end.

A child gets its own session, so that one number reaches all that does not run away; its output goes to a file, so that
it outlives us; its environment was chosen, not inherited. Its end is told by a pidfd in the loop: no polling, no
SIGCHLD. The exit status is read without reaping: as long as the zombie stands, its pid, and so the number of its group
and session, cannot be given to a stranger. kill_tree reaps it, when nothing is left.
"""

import asyncio
import ctypes
import errno
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

from vllmd.edge.procfs import Member, Table, exit_of_stranger, open_pidfd, pid_of, read_stat, reap
from vllmd.edge.tree import COOKIE
from vllmd.facts import Launch

NOT_RUNNABLE = (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.EPERM, errno.ENOTDIR, errno.ELOOP)

_PR_SET_CHILD_SUBREAPER = 36

# What a model may take from the daemon's own environment; everything else comes from its `env`. Left out on purpose:
# NOTIFY_SOCKET, WATCHDOG_*, LISTEN_*, CREDENTIALS_DIRECTORY (the daemon's ties to systemd), PYTHONPATH and VIRTUAL_ENV
# (the daemon's Python, not the engine's), LD_PRELOAD and TMPDIR (meant for one program), VLLM_* (VLLM_PORT is an
# internal base port, and a value like tcp://... from a container's service links aborts the start),
# CUDA_VISIBLE_DEVICES (placement is ours).
INHERITED = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ",
        "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME",
        "CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH",  # where a driver or toolkit lives outside the usual places
        "CC", "CXX", "CPATH", "LIBRARY_PATH",  # Triton and inductor compile at start
        "HUGGING_FACE_HUB_TOKEN", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
        "http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    }
)  # fmt: skip
INHERITED_PREFIXES = ("LC_", "HF_", "TRANSFORMERS_", "NCCL_", "NVIDIA_")

_leaders: "dict[int, Child]" = {}  # our own children that are not closed yet, by pid
_parked: set[int] = set()  # our own children that wait to become an engine

# argv stays the real one: the shell becomes it. A cgroup that cannot be entered costs accounting, not the start.
_ENTER_CGROUP = 'echo 0 > "$0"; exec "$@"'


@dataclass(slots=True, eq=False)
class Child:
    """An engine's leader. `cgroup` is its own directory, if it has one. Closed once, after kill_tree."""

    leader: Member
    pidfd: int
    cookie: str
    endpoint: str
    scratch: str
    cgroup: Path | None = None
    log: tuple[int, int] | None = None  # device and inode of the file that it writes to
    status: int | None = None  # exit status once ended; None also for a process that is not our child
    ended: bool = False
    _end: "asyncio.Future[int | None] | None" = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        return self.leader.pid

    async def wait(self) -> int | None:
        """Returns when the leader has ended: its exit status (negative = signal), None when it is not our child."""
        if self.ended:
            return self.status
        if self._end is None:
            loop = asyncio.get_running_loop()
            self._end = loop.create_future()
            loop.add_reader(self.pidfd, self._on_end)
        return await asyncio.shield(self._end)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self.pidfd)
        self.ended = True
        if self.status is None:
            self.status = reap(self.pidfd, keep=True)
        if self.status is None:
            self.status = exit_of_stranger(self.pidfd)
        if self._end is not None and not self._end.done():
            self._end.set_result(self.status)

    def terminate(self, signum: signal.Signals = signal.SIGTERM) -> bool:
        """Signal the leader alone: vLLM drains by itself. False when it has ended."""
        if self.ended:
            return False
        try:
            signal.pidfd_send_signal(self.pidfd, signum)
        except ProcessLookupError:
            return False
        return True

    def reap(self) -> None:
        """Free the number of an ended leader. `status` stays known."""
        if self.pidfd < 0:
            return
        status = reap(self.pidfd)
        if status is not None:
            self.status, self.ended = status, True

    def close(self) -> None:
        """Reap the leader if it has ended and let go of it. May be called twice; `wait` is cancelled."""
        if self.pidfd < 0:
            return
        if self._end is not None and not self._end.done():
            asyncio.get_running_loop().remove_reader(self.pidfd)
            self._end.cancel()
        self.reap()
        if _leaders.get(self.pid) is self:
            del _leaders[self.pid]
        _parked.discard(self.pid)
        os.close(self.pidfd)
        self.pidfd = -1


def spawn(launch: Launch, *, log_fd: int, cwd: Path, cgroup: Path | None = None, control: int | None = None) -> Child:
    """Start the engine; a few milliseconds, on the main thread. The caller keeps and closes `log_fd`. With `control`, a
    descriptor for it to keep, it is no engine yet: `enlist` makes it one.

    Raises OSError when it cannot be executed (in a cgroup: exit status 126 or 127 of the shell that tries).
    """
    argv = list(launch.argv)
    if cgroup is not None:
        argv = ["/bin/sh", "-c", _ENTER_CGROUP, str(cgroup / "cgroup.procs"), *argv]
    with _plain_signals():
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log_fd, stderr=log_fd, cwd=cwd,
            env=environment(launch, os.environ), start_new_session=True, umask=0o077,
            pass_fds=() if control is None else (control,),
        )  # fmt: skip
    process.returncode = 0  # disown: Popen would reap it behind our back, and warn when it is collected
    pidfd = os.pidfd_open(process.pid)  # not reaped, so the number is still its own
    stat = read_stat(process.pid)
    if stat is None:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        raise OSError(f"cannot watch pid {process.pid}: no /proc entry (is /proc mounted, and not with hidepid=2?)")
    child = Child(stat.member, pidfd, launch.cookie, launch.endpoint, launch.scratch, cgroup, _file(os.fstat(log_fd)))
    if control is None:
        _leaders[process.pid] = child
    else:
        _parked.add(process.pid)
    return child


def enlist(parked: Child, launch: Launch, *, log_fd: int, cgroup: Path | None = None) -> Child:
    """A parked process that has become this launch's engine, as `spawn` would return it. `parked` is used up."""
    stat = read_stat(parked.pid)
    leader = stat.member if stat is not None else parked.leader
    child = Child(leader, parked.pidfd, launch.cookie, launch.endpoint, launch.scratch, cgroup, _file(os.fstat(log_fd)))
    parked.pidfd = -1
    _leaders[child.pid] = child  # first: who looks from another thread must not find it nowhere
    _parked.discard(child.pid)
    return child


def why_not_run(launch: Launch, error: OSError | ValueError) -> tuple[str, int]:
    """Why `spawn` failed, as a sentence part, and the status that a shell would give: 127, it cannot be run. With 126 it may be
    over at the next try: no processes, no disk, no descriptors left."""
    number, said = (error.errno, error.strerror) if isinstance(error, OSError) else (errno.ENOEXEC, None)
    return f"cannot run {launch.argv[0]}: {said or error}", 127 if number in NOT_RUNNABLE else 126


def adopt(
    leader: Member, launch: Launch, *, cgroup: Path | None = None, pidfd: int | None = None, log: Path | None = None
) -> Child:
    """An engine that an earlier daemon started; when its leader is gone, a child that has ended. `log` is what it writes to.

    `pidfd`, if given, was opened by that daemon and is taken over (or closed): it is this very process for sure.
    """
    fd = pidfd
    if fd is not None and pid_of(fd) != leader.pid:
        os.close(fd)
        fd = None
    if fd is None:
        fd = open_pidfd(leader)
    try:
        written = _file(log.stat()) if log is not None else None
    except OSError:
        written = None
    stat = read_stat(leader.pid)
    if fd is None or stat is None or stat.dead:
        if fd is not None:
            os.close(fd)
        return Child(leader, -1, launch.cookie, launch.endpoint, launch.scratch, cgroup, written, ended=True)
    return Child(stat.member, fd, launch.cookie, launch.endpoint, launch.scratch, cgroup, written)


def environment(launch: Launch, own: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: what it may inherit of `own`, then the launch's, then the cookie."""
    env = inherited(own)
    # setproctitle, which vLLM uses, otherwise writes the title over the environment, and the cookie cannot be read.
    env["SPT_NOENV"] = "1"
    return env | dict(launch.env) | {COOKIE: launch.cookie}


def inherited(own: Mapping[str, str]) -> dict[str, str]:
    """What of our environment is every child's as well."""
    return {name: value for name, value in own.items() if name in INHERITED or name.startswith(INHERITED_PREFIXES)}


def leaders() -> dict[int, Child]:
    """The engines that we have started and not let go of, by pid. From any thread."""
    return dict(_leaders)


def parked() -> frozenset[int]:
    """Those of our children that wait to become an engine. From any thread."""
    return frozenset(_parked)


def _file(found: os.stat_result) -> tuple[int, int] | None:
    """Which file it is; None for what is none (/dev/null, a pipe)."""
    return (found.st_dev, found.st_ino) if S_ISREG(found.st_mode) else None


def become_subreaper() -> bool:
    """Make orphans among our descendants our children, so that they can be reaped. False when the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def reap_orphans(table: Table) -> None:
    """Reap the zombies that came to us as orphans of an engine: children in another session than ours that we did not
    spawn. A child of another kind stays in our session and is waited for by who started it."""
    own, session = os.getpid(), os.getsid(0)
    for stat in table.values():
        if stat.dead and stat.ppid == own and stat.session != session and stat.member.pid not in _leaders:
            try:
                os.waitpid(stat.member.pid, os.WNOHANG)  # a zombie of ours keeps its number
            except ChildProcessError:
                continue


@contextmanager
def _plain_signals() -> Iterator[None]:
    """No signal blocked, none ignored, for what is forked inside.

    A child keeps what we ignore and block. vLLM with SIGINT ignored (started by nohup, or by `&` in a script) cannot be
    interrupted before it serves. A handler that does nothing counts as ignored here and as default after exec.
    """
    ignored = [s for s in signal.valid_signals() if signal.getsignal(s) is signal.SIG_IGN]
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for signum in ignored:
        signal.signal(signum, lambda *_: None)
    try:
        yield
    finally:
        for signum in ignored:
            signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
